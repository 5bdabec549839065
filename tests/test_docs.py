"""Documents name files that exist, and every module has its place in the map and in the pages of the interface."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
MODULES = sorted(
    path for path in (ROOT / "cognica_poe").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)
PATH = re.compile(r"\b((?:cognica_poe|tests|docs|benchmarks)/[\w/.-]*[\w/])(?!\w)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_files_exist(document):
    named = set(PATH.findall(document.read_text()))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "map.md").read_text()
    assert not [path.name for path in MODULES if f"`{path.relative_to(ROOT / 'cognica_poe').as_posix()}`" not in text]


def test_every_module_has_a_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    shown = [name for name in modules if not name.startswith("cognica_poe.cli.")]
    assert sorted(listed) == sorted([*shown, "cognica_poe"])
