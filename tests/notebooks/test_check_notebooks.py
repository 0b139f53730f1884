"""The kernel-free check: each thing that may be wrong is found and named."""

import nbformat
import pytest

from tools.build_notebooks import unexecuted
from tools.check_notebooks import check, main

SOURCE = "# %% [markdown]\n# # Title\n\n# %%\nprint(1)\n\n# %%\nplt.figure()\n"
PICTURE = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})


@pytest.fixture
def course(tmp_path):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    (tmp_path / "notebooks" / "src" / "01_title.py").write_text(SOURCE)
    return tmp_path


def problems(course, spoil=lambda notebook: None):
    notebook = unexecuted(SOURCE)
    _, one, two = notebook.cells
    one.execution_count, two.execution_count = 1, 2
    one.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    two.outputs = [PICTURE]
    spoil(notebook)
    nbformat.write(notebook, course / "notebooks" / "01_title.ipynb")
    return list(check(course))


def test_accepts_a_good_notebook(course, capsys):
    assert problems(course) == []
    assert main([], course) == 0
    assert "1 notebooks are executed" in capsys.readouterr().out


def stream(name, text):
    return [nbformat.v4.new_output("stream", name=name, text=text)]


def error(traceback):
    return nbformat.v4.new_output("error", ename="E", evalue="why", traceback=traceback)


def set_code(**fields):
    return lambda notebook: notebook.cells[1].update(fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_code(execution_count=None), "executed as number 1, got None"),
        (set_code(execution_count=3), "executed as number 1, got 3"),
        (set_code(source="print(2)"), "not in step with its source, first in cell 2"),
        (set_code(id="aaaa"), "not in step with its source, first in cell 2"),
        (set_code(metadata={"tags": ["x"]}), "not in step with its source, first in cell 2"),
        (lambda nb: nb.cells.pop(), "not in step with its source, first in the number of cells"),
        (set_code(outputs=stream("stderr", "Warning: x")), "wrote to stderr: Warning: x"),
        (set_code(outputs=stream("stdout", "/home/ann/x")), "belongs to one machine: /home/ann"),
        (set_code(outputs=stream("stdout", "<f at 0x7f3a2b1c0d>")), "at 0x7f3a2b1c0d"),
        (set_code(outputs=[error([])]), "raised E: why"),
        (lambda nb: nb.cells[2].update(outputs=[]), "draws a figure but shows no image"),
        (lambda nb: nb.metadata.update(widgets={}), "metadata: expected"),
        (set_code(outputs=stream("stdout", "x" * 3_000_001)), "bytes, at most"),
    ],
)  # fmt: skip
def test_names_what_is_wrong(course, spoil, message):
    assert any(message in problem for problem in problems(course, spoil))
    assert main([], course) == 1


def test_a_path_of_the_course_itself_is_found(course):
    spoil = set_code(outputs=stream("stdout", f"{course}/notebooks"))
    assert any("belongs to one machine" in p for p in problems(course, spoil))


def test_an_expected_error_is_accepted(course):
    source = SOURCE.replace("# %%\nprint", '# %% tags=["raises-exception"]\nprint')
    (course / "notebooks" / "src" / "01_title.py").write_text(source)

    def spoil(notebook):
        notebook.cells = unexecuted(source).cells
        notebook.cells[1].update(execution_count=1, outputs=[error(["E: why"])])
        notebook.cells[2].update(execution_count=2, outputs=[PICTURE])

    assert problems(course, spoil) == []


def test_a_notebook_without_source_is_found(course):
    problems(course)
    (course / "notebooks" / "02_left.ipynb").write_text("{}")
    assert list(check(course)) == ["notebooks/02_left.ipynb: has no notebooks/src/02_left.py"]
