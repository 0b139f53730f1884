"""Fetching systems to compare with: all or nothing of each, and a sentence for what is missing."""

import io
import subprocess
import tarfile

import pytest

from tools import fetch_oracles
from tools.fetch_oracles import DEEPSPEED, MEGATRON, main


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "oracles"


def archive_of(oracle, path, name):
    with tarfile.open(path / f"{oracle.folder}.tar.gz", "w:gz") as archive:
        for inside in (f"{oracle.folder}/{name}/__init__.py", f"{oracle.folder}/setup.py"):
            member = tarfile.TarInfo(inside)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"pass"))


def pip_that_fetches(name):
    """In place of pip: a wheel becomes a file, an archive holds a package of this name."""

    def run(command, **options):
        target = command[command.index("--target" if "install" in command else "--dest") + 1]
        if "install" in command:
            path = fetch_oracles.Path(target)
            path.mkdir()
            (path / "wheel.py").write_text("pass")
        else:
            archive_of(DEEPSPEED, fetch_oracles.Path(target), name)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_each_gets_a_folder_and_is_fetched_once(folder, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", pip_that_fetches("deepspeed"))
    assert main(["--folder", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {DEEPSPEED.folder, MEGATRON.folder}
    assert (folder / DEEPSPEED.folder / "deepspeed" / "__init__.py").read_text() == "pass"
    assert not (folder / DEEPSPEED.folder / "setup.py").exists()
    monkeypatch.setattr(subprocess, "run", None)
    assert main(["--folder", str(folder)]) == 0


def test_rejects_an_archive_without_the_package(folder, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", pip_that_fetches("other"))
    assert main(["--folder", str(folder)]) == 1
    assert "expected deepspeed-0.19.8/deepspeed/ in its archive" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [MEGATRON.folder]


def test_says_why_without_a_network(folder, monkeypatch, capsys):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: a\nERROR: No route to host\n")

    monkeypatch.setattr(subprocess, "run", offline)
    assert main(["--folder", str(folder)]) == 1
    told = capsys.readouterr().err
    assert told.count("ERROR: No route to host); tests that need it are skipped") == 2
    assert list(folder.iterdir()) == []
