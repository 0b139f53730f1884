"""`python -m tools.build_site`: notebooks, docs and API pages -> site/, to serve or open.

Nothing is executed and nothing is fetched. Warnings are errors. The pages of the API are made here,
one for each topic of `reference` and one for the autograder, and that of the composition matrix.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.composition import RECORD, page

ROOT = Path(__file__).resolve().parent.parent
SOURCE, SITE = ROOT / "build" / "site", ROOT / "site"
ONLY_TEXT = shutil.ignore_patterns("__pycache__", "*.orig.*")
DRAFT = ROOT / "build" / "html" / "site"  # myst-nb leaves a folder of its own beside it


def main() -> int:
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE)
    (SOURCE / "notebooks").mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, SOURCE / "notebooks")
    shutil.copytree(ROOT / "exercises", SOURCE / "exercises", ignore=ONLY_TEXT)
    write_api(SOURCE / "api")
    (SOURCE / "composition.json").unlink()
    (SOURCE / "composition.md").write_text(page(json.loads(RECORD.read_text())))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html",
               "-d", str(ROOT / "build" / "doctrees"), str(SOURCE), str(DRAFT)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.copytree(DRAFT, SITE)
        print(f"{SITE.name}/index.html")
    return done.returncode


def write_api(folder: Path) -> None:
    """A page for each topic, with a section for each module of it that has a docstring."""
    folder.mkdir()
    pages = [p for p in topics() if p]
    for name, modules in pages:
        lines = [name, "=" * len(name), ""]
        for module in modules:
            # A package's names are documented where they are defined.
            members = ["   :no-members:"] if (ROOT / module.replace(".", "/")).is_dir() else []
            lines += [module, "-" * len(module), "", f".. automodule:: {module}", *members, ""]
        (folder / f"{name}.rst").write_text("\n".join(lines))
    index = ["The library", "===========", "", ".. toctree::", "   :maxdepth: 1", ""]
    (folder / "index.rst").write_text("\n".join([*index, *(f"   {n}" for n, _ in pages), ""]))


def topics() -> list[tuple[str, list[str]]]:
    """Pages and the modules on them."""
    found = []
    for parent, prefix in ((ROOT / "reference", "reference"),
                           (ROOT / "reference" / "parallel", "reference.parallel")):  # fmt: skip
        for path in sorted(parent.iterdir()):
            if path.name.startswith(("_", ".")) or path.name == "parallel":
                continue
            if path.suffix == ".py":
                found.append((f"{prefix}.{path.stem}", [f"{prefix}.{path.stem}"]))
            elif (path / "__init__.py").exists():
                files = (m.relative_to(parent).with_suffix("") for m in path.rglob("*.py"))
                inside = {".".join(m.parts).removesuffix(".__init__") for m in files}
                found.append((f"{prefix}.{path.name}", sorted(f"{prefix}.{m}" for m in inside)))
    graders = ("declarations", "expect", "spies", "notebook")
    return [*found, ("autograder", ["autograder", *(f"autograder.{g}" for g in graders)])]


if __name__ == "__main__":
    sys.exit(main())
