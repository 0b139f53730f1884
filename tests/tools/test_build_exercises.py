"""The generator: answers out, starters in, a student's work never lost."""

import runpy

import pytest

from tools.build_exercises import MarkerError, generate, is_edited, main

SOLUTION = '''"""Chapter 99: doubling."""


def double(x):
    """Twice x."""
    # BEGIN SOLUTION
    y = x + x
    return y
    # END SOLUTION


class Doubler:
    """Doubles."""

    def __init__(self, times):
        """How often."""
        # BEGIN SOLUTION
        self.times = times

        def inner():
            return times

        self.inner = inner
        # END SOLUTION

    def name(self):
        return "given"


def repaired(x):
    """Half of x."""
    # BEGIN SOLUTION
    return x / 2
    # STARTER
    # | if x:
    # |     x = x * 2
    # |
    # | return x
    # END SOLUTION
'''

EXERCISE = '''"""Chapter 99: doubling."""


def double(x):
    """Twice x."""
    raise NotImplementedError("double: not written yet")


class Doubler:
    """Doubles."""

    def __init__(self, times):
        """How often."""
        raise NotImplementedError("Doubler.__init__: not written yet")

    def name(self):
        return "given"


def repaired(x):
    """Half of x."""
    if x:
        x = x * 2

    return x
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "doubling.py").write_text(SOLUTION)
    return tmp_path


def exercise_of(root):
    return root / "exercises" / "doubling.py"


def test_generates_the_exercise(root):
    header, body = generate(root / "solutions" / "doubling.py").split("\n", 1)
    assert body == EXERCISE
    assert header.startswith("# Exercise ") and len(header) <= 100


def test_generated_file_runs(root):
    main([], root)
    names = runpy.run_path(str(exercise_of(root)))
    with pytest.raises(NotImplementedError, match="^double: not written yet$"):
        names["double"](1)
    assert names["repaired"](3) == 6


def test_writes_once_and_then_is_in_step(root, capsys):
    assert main([], root) == 0
    assert "doubling.py: written" in capsys.readouterr().out
    assert main([], root) == 0
    assert "in step" in capsys.readouterr().out
    assert main(["--check"], root) == 0


def test_a_changed_solution_replaces_an_untouched_exercise(root, capsys):
    main([], root)
    solution = root / "solutions" / "doubling.py"
    solution.write_text(SOLUTION.replace("Twice x.", "Two times x."))
    assert main(["--check"], root) == 1
    assert "not in step" in capsys.readouterr().err
    assert main([], root) == 0
    assert "Two times x." in exercise_of(root).read_text()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('raise NotImplementedError("double: not written yet")', "pass"),
        lambda text: text + "\n",
        lambda text: text.split("\n", 1)[1],
        lambda text: "",
    ],
    ids=["answer", "blank line", "header removed", "emptied"],
)
def test_never_overwrites_work(root, capsys, edit):
    main([], root)
    exercise_of(root).write_text(mine := edit(exercise_of(root).read_text()))
    (root / "solutions" / "doubling.py").write_text(SOLUTION.replace("Twice", "Two times"))
    assert main([], root) == 1
    assert exercise_of(root).read_text() == mine
    assert "holds your work" in capsys.readouterr().out
    assert main(["--force"], root) == 0
    (backup,) = root.glob("exercises/doubling.py.orig.*")
    assert backup.read_text() == mine
    assert not is_edited(exercise_of(root).read_text())


def test_check_names_edited_missing_and_left_over_files(root, capsys):
    assert main(["--check"], root) == 1
    assert "doubling.py: missing" in capsys.readouterr().err
    main([], root)
    exercise_of(root).write_text("mine")
    (root / "exercises" / "gone.py").write_text("")
    assert main(["--check"], root) == 1
    told = capsys.readouterr().err
    assert "doubling.py: edited by hand" in told and "gone.py: has no solution" in told


def test_windows_line_ends_are_no_edit(root):
    main([], root)
    path = exercise_of(root)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert main(["--check"], root) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f():\n    # BEGIN SOLUTION\n    pass\n", ":2: # BEGIN SOLUTION without # END"),
        ("def f():\n    pass\n    # END SOLUTION\n", ":3: # END SOLUTION without # BEGIN"),
        ("def f():\n    pass\n    # STARTER\n", ":3: # STARTER without # BEGIN"),
        (
            "def f():\n    # BEGIN SOLUTION\n    # BEGIN SOLUTION\n    pass\n    # END SOLUTION\n",
            ":3: # BEGIN SOLUTION inside the block begun on line 2",
        ),
        ("# BEGIN SOLUTION\nx = 1\n# END SOLUTION\n", ":1: # BEGIN SOLUTION outside"),
        ("def f(:\n    pass\n", ":1: "),
        (
            "def f():\n    # BEGIN SOLUTION\n    pass\n    # STARTER\n    x = 1\n"
            "    # END SOLUTION\n",
            ":5: after # STARTER expected `# | code`, got `x = 1`",
        ),
        (
            "def f():\n    # BEGIN SOLUTION\n    pass\n    # STARTER\n    # | if x:\n"
            "    # END SOLUTION\n",
            "would not parse",
        ),
    ],
)
def test_rejects_markers_that_do_not_pair(root, capsys, text, message):
    (root / "solutions" / "doubling.py").write_text(text)
    with pytest.raises(MarkerError) as error:
        generate(root / "solutions" / "doubling.py")
    assert str(error.value).startswith("solutions/doubling.py:") and message in str(error.value)
    assert main([], root) == 1
    assert message in capsys.readouterr().err
    assert not exercise_of(root).exists()


def test_rejects_unknown_chapters(root, capsys):
    assert main(["tripling"], root) == 2
    assert "no solutions/ of: tripling" in capsys.readouterr().err
