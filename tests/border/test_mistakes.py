"""Every mistake on the command line is answered in one line, changes nothing, and taken back it is a right line."""

import collections
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from cognica_poe.cli.mistakes import LONGEST
from tests.border.environments import environment_mistakes
from tests.border.forks import Forks, Line
from tests.border.mistakes import COMMANDS, RIGHT, Mistake, all_mistakes, right_words
from tests.border.odd_files import OddFile, broken_json, spoilt, write_mix
from tests.border.odd_folders import broken_folders
from tests.border.odd_texts import odd_lines, odd_tables
from tests.border.odd_values import wrong_values
from tests.border.world import make_world, places, state_of

SEED = int(os.environ.get("MISTAKES_SEED", "1"))
PROGRESS = re.compile(r"(data|rows|tokenizer|baseline|serving|publish|release|step \d+): ")
FAST = 80
"""Wrong lines of the fast suite; the slow one tries as many as there are."""


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def world(forks):
    with make_world(forks) as world:
        yield world


def faults(done, names, progress: bool = False) -> list[str]:
    """What is wrong with the answer to a mistake; ``progress``: lines about the work so far may come before it."""
    lines = done.err.splitlines()
    if progress:
        lines = [line for line in lines if not PROGRESS.match(line)]
    found = []
    if done.code != 2:
        found.append(f"exit code {done.code}")
    if done.out:
        found.append("something on stdout")
    if len(lines) != 1 or not lines[0].startswith("cognica-poe: "):
        found.append(f"{len(lines)} lines on stderr")
    elif len(lines[0]) > LONGEST + len("cognica-poe: "):
        found.append(f"{len(lines[0])} characters")
    elif not any(name in lines[0] for name in names if name):
        found.append("names nothing")
    return found


def try_all(forks: Forks, world: dict[str, str], mistakes: list[Mistake]) -> dict[str, int]:
    """Run every mistake; asserts that none acted and prints how many of each kind there were."""
    before, wrong, kinds = state_of(world["base"]), [], collections.Counter()
    for mistake in mistakes:
        mistake.line.env = {**places(world), **mistake.line.env}
        done = forks.run(mistake.line)
        found = faults(done, mistake.names)
        after = state_of(world["base"])
        if after != before:
            changed = sorted({name for name, _ in before.items() ^ after.items()})
            found.append(f"changed {changed[:5]}")
            shutil.rmtree(world["new"], ignore_errors=True)
            before = state_of(world["base"])
        kinds[mistake.kind] += 1
        if found:
            wrong.append(
                f"{mistake.kind}: {' '.join(mistake.line.words)[:300]!r}: {', '.join(found)}\n{done.err[-600:]}"
            )
            print(wrong[-1], flush=True)
    print(f"seed {SEED}: {len(mistakes)} tried, {len(mistakes) - len(wrong)} refused in one line, {len(wrong)} other")
    for kind, count in sorted(kinds.items()):
        print(f"  {count:5} {kind}")
    assert not wrong, f"{len(wrong)} of {len(mistakes)}:\n" + "\n".join(wrong)
    return kinds


def test_every_command_has_a_right_line():
    assert set(RIGHT) == set(COMMANDS)


def test_wrong_lines(forks, world):
    lines = list(all_mistakes(world, SEED))
    chosen = random.Random(SEED).sample(lines, FAST)
    try_all(forks, world, chosen)


@pytest.mark.slow
def test_all_wrong_lines(forks, world):
    lines = list(all_mistakes(world, SEED))
    assert len(lines) >= 500
    try_all(forks, world, lines)


def all_odd_files() -> list[OddFile]:
    """Every odd file."""
    return [*broken_json(), *wrong_values(), *odd_lines(), *odd_tables(), *broken_folders()]


def try_odd_files(forks: Forks, world: dict[str, str], odd_files: list[OddFile]) -> None:
    """Run the right line on every odd file; asserts that each is refused in one line."""
    base, wrong = Path(world["base"]), []
    write_mix(base / "mix.json")
    for odd in odd_files:
        with spoilt(base, odd):
            before = state_of(world["base"])
            done = forks.run(Line(right_words(odd.line, world), world["cwd"], places(world)))
            found = faults(done, (Path(odd.file).stem, Path(odd.file).parent.name, "source fineweb-edu"), progress=True)
            after = state_of(world["base"])
            if after != before:
                changed = sorted({name for name, _ in before.items() ^ after.items()})
                found.append(f"changed {changed[:5]}")
                shutil.rmtree(world["new"], ignore_errors=True)
        if found:
            wrong.append(f"{odd.name}: {odd.line}: {', '.join(found)}\n{done.err[-600:]}")
            print(wrong[-1], flush=True)
    print(f"seed {SEED}: {len(odd_files)} odd files tried, {len(odd_files) - len(wrong)} refused, {len(wrong)} other")
    assert not wrong, f"{len(wrong)} of {len(odd_files)}:\n" + "\n".join(wrong)


def test_odd_files(forks, world):
    try_odd_files(forks, world, random.Random(SEED).sample(all_odd_files(), FAST // 2))


@pytest.mark.slow
def test_all_odd_files(forks, world):
    try_odd_files(forks, world, all_odd_files())


def test_right_lines(forks, world):
    """Every mistake is one change of one of these. `serve` ends at a signal alone, `eval` needs an extra: tests/serving
    runs both."""
    for command, template in RIGHT.items():
        if command in ("serve", "eval"):
            continue
        done = forks.run(Line(right_words(template, world), world["cwd"], places(world), 300))
        assert done.code == 0, (command, done.err)
        path = Path(world["new"])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_wrong_environments(forks, world):
    try_all(forks, world, list(environment_mistakes(world)))
