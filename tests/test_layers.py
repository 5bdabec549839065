"""The import contracts of pyproject.toml hold, and each of them notices a violation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package that may be spoilt."""
    folder = tmp_path_factory.mktemp("layers")
    shutil.copytree(ROOT / "cognica_poe", folder / "cognica_poe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_contracts_hold(package):
    done = contracts(package)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("recipe/rules.py", "from cognica_poe.training import guard"),
        ("data/build.py", "from cognica_poe.recipe import fields"),
        ("training/objective.py", "from cognica_poe.analysis import record"),
        ("analysis/record.py", "from cognica_poe.release import export"),
        ("release/export.py", "import cognica_poe.serving.generation"),
        ("planning/costs.py", "from cognica_poe import pipeline"),
        ("pipeline.py", "from cognica_poe.cli import main"),
        ("files.py", "from cognica_poe.recipe.fields import Recipe"),
        ("modeling/configuration_cognica_poe.py", "from cognica_poe.errors import UserError"),
    ],
)
def test_a_violation_is_named_and_its_removal_passes(package, file, line):
    path = package / "cognica_poe" / file
    sound = path.read_text()
    path.write_text(f"{sound}\n\ndef violation():\n    {line}\n")
    try:
        done = contracts(package)
    finally:
        path.write_text(sound)
    module = "cognica_poe." + file.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1 and f"{module} -> " in done.stdout, done.stdout + done.stderr
    assert contracts(package).returncode == 0


def test_a_new_folder_must_find_its_layer(package):
    (package / "cognica_poe" / "elsewhere").mkdir()
    (package / "cognica_poe" / "elsewhere" / "__init__.py").touch()
    try:
        done = contracts(package)
    finally:
        shutil.rmtree(package / "cognica_poe" / "elsewhere")
    assert done.returncode == 1 and "elsewhere" in done.stdout, done.stdout
