"""The build on a course of one notebook: what it writes, twice the same, and what it refuses."""

import nbformat
import pytest

from tools.build_notebooks import WIDGET, is_current, main, unexecuted
from tools.check_notebooks import check, draws

SOURCE = """# %% [markdown] slideshow={"slide_type": "slide"}
# # 01 A title
#
# Maths: $x^2$.

# %% tags=["nbval-ignore-output"] editable=false
print("one")
print("two", flush=True)

# %%
print("one")
print("two", flush=True)

# %%
import ipywidgets
import matplotlib.pyplot as plt

figure, ax = plt.subplots()
line = ax.plot([1, 2])

# %%
ipywidgets.IntSlider()

# %% tags=["raises-exception"]
raise ValueError("expected")
"""


@pytest.fixture
def course(tmp_path):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    (tmp_path / "notebooks" / "src" / "01_title.py").write_text(SOURCE)
    return tmp_path


def built_of(course):
    return nbformat.read(course / "notebooks" / "01_title.ipynb", as_version=4)


def test_ids_follow_the_text_and_not_the_place():
    ids = [cell.id for cell in unexecuted(SOURCE).cells]
    assert len(set(ids)) == len(ids) == 6
    longer = [cell.id for cell in unexecuted("# %%\nx = 1\n\n" + SOURCE).cells]
    assert longer[1:] == ids


def test_keeps_only_metadata_that_something_reads():
    first, second, *_ = unexecuted(SOURCE).cells
    assert first.metadata == {"slideshow": {"slide_type": "slide"}}
    assert second.metadata == {"tags": ["nbval-ignore-output"]}
    assert first.source.startswith("# 01 A title\n\nMaths")


def test_builds_what_the_check_accepts_and_builds_it_once(course, capsys):
    assert [p for p in check(course)] == ["notebooks/01_title.ipynb: missing"]
    assert main([], course) == 0
    assert list(check(course)) == []
    notebook = built_of(course)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
    assert code[0].outputs[0].text == "one\ntwo\n" and len(code[0].outputs) == 1
    assert "image/png" in code[2].outputs[0].data
    assert WIDGET not in code[3].outputs[0].data
    assert code[4].outputs[0].traceback[-1].endswith("expected")
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    first = (course / "notebooks" / "01_title.ipynb").read_bytes()
    capsys.readouterr()
    assert main([], course) == 0
    assert "in step" in capsys.readouterr().out
    assert main(["--force", "01_title"], course) == 0
    assert (course / "notebooks" / "01_title.ipynb").read_bytes() == first


def test_an_error_leaves_the_old_notebook_in_place(course, capsys):
    source = course / "notebooks" / "src" / "01_title.py"
    source.write_text("# %%\nprint(1)\n")
    assert main([], course) == 0
    source.write_text("# %%\nprint(1)\nprint(1 / 0)\n")
    assert not is_current(course, "01_title")
    assert main([], course) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert built_of(course).cells[0].outputs[0].text == "1\n"
    assert [p.name for p in (course / "notebooks").glob("*.*")] == ["01_title.ipynb"]


def test_rejects_unknown_stems(course, capsys):
    assert main(["02_other"], course) == 2
    assert "no notebooks/src/ of: 02_other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("figure, ax = plt.subplots()", True),
        ("for i in range(2):\n    plt.figure()", True),
        ("def show():\n    plt.subplots()", False),
        ("Stepper(frames, draw)", True),
        ("stepper = Stepper(frames, draw)", False),
        ("x.figure()", False),
        ("%matplotlib inline", False),
        ("", False),
    ],
)
def test_knows_which_cells_draw(source, expected):
    assert draws(source) is expected
