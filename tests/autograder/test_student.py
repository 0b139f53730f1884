"""An answer file that does not import says where and why."""

import pytest
import torch

from autograder import refusals, student
from autograder.refusals import Refusal
from autograder.student import load_module

BROKEN = [
    (b"def f(:\n    pass\n", "not valid Python: invalid syntax, line 1: `def f(:`"),
    (b"import torch\nx = undefined_name\n", "NameError"),
    (b"x = 1\n\ny = x / 0\n", "(line 3, in <module>: `y = x / 0`)"),
    (b"import sys\nsys.exit(0)\n", "SystemExit"),
    (b"import no_such_module\n", "No module named 'no_such_module'"),
    (b"x = '\xff\xfe'\n", "not valid Python"),
    (b"x = 1\x00\n", "null bytes"),
    (b"raise BaseException('odd')", "BaseException: odd"),
]


@pytest.mark.parametrize("source, message", BROKEN)
def test_rejects_file_that_does_not_import(tmp_path, source, message):
    path = tmp_path / "toy.py"
    path.write_bytes(source)
    with pytest.raises(Refusal) as refused:
        load_module(path, "exercises/toy.py")
    assert refused.value.kind == refusals.IMPORT_FAILED
    assert "exercises/toy.py" in refused.value.message
    assert message in refused.value.message


def test_settings_of_an_answer_file_stay_in_it(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
    )
    load_module(path, "exercises/toy.py")
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_rejects_missing_file(tmp_path):
    with pytest.raises(Refusal, match="make exercises"):
        load_module(tmp_path / "gone.py", "exercises/gone.py")


def test_rejects_import_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "IMPORT_SECONDS", 0.3)
    path = tmp_path / "toy.py"
    path.write_text("while True: pass")
    with pytest.raises(Refusal, match="still running after"):
        load_module(path, "exercises/toy.py")


def test_module_is_read_afresh(tmp_path):
    path = tmp_path / "toy.py"
    for value in (1, 22):
        path.write_text(f"x = {value}")
        assert load_module(path, "toy.py").x == value
