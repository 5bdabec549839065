"""One byte of any file of a run folder or a release is changed: every command that reads it names it or does the same.

A copy of a small run has one bit flipped at seeded places of every file, and every command that reads that
kind of file is run on it. ``named``: exit code 2 and one line with the name of the file; ``named, went on``: a line of
log names it, the command goes on without it (an earlier checkpoint, rows packed again, a revision stored again), and
comes to the same. ``harmless``: the result is that on the sound folder. Anything else would be ``silent``.
"""

import dataclasses
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cognica_poe.cli.main import main
from cognica_poe.files import MANIFEST, sha256_file
from cognica_poe.recipe.stored import save_recipe
from tests.runs import small_recipe, write_texts

KINDS = {
    "recipe": r"recipe\.json",
    "initial": r"initial/.*",
    "journal": r"(metrics|events)\.jsonl",
    "data": r"data/.*",
    "tokenizer": r"tokenizer/.*",
    "rows": r"rows/rows-.*",
    "latest checkpoint": r"checkpoints/step-12/.*",
    "earlier checkpoint": r"checkpoints/step-(3|6|9)/.*",
    "record": r"analysis/(step-12\..*|baseline\.json)",
    "other record": r"analysis/step-(6|13)\..*",
    "release": r"release/step-12/.*",
    "other release": r"release/step-(6|13)/.*",
    "hub": r"release/hub/models--[^/]*/(blobs|refs)/.*",
    "report": r"report/.*",
    "lock": r"(.*/)?\.[^/]*lock",
}
READERS = {
    "recipe": ("resume", "run", "from checkpoint", "analyze", "export", "publish", "report", "which-docs", "params"),
    "initial": ("resume", "run", "export"),
    "journal": ("resume", "run", "report"),
    "data": ("resume", "analyze", "export", "which-docs", "pack", "tokenizer", "report"),
    "tokenizer": ("resume", "from checkpoint", "analyze", "export", "which-docs", "pack"),
    "rows": ("resume", "which-docs", "pack"),
    "latest checkpoint": ("resume", "from checkpoint", "analyze", "export"),
    "earlier checkpoint": ("resume", "export 6"),
    "record": ("run", "analyze", "export", "report"),
    "other record": ("analyze", "export 6", "report"),
    "release": ("run", "publish", "from release", "generate", "serve", "calibrate"),
    "other release": ("publish",),
    "hub": ("publish", "report", "generate from hub"),
    "report": ("report",),
    "lock": ("resume", "which-docs"),
}
"""Commands that read a kind."""


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def facts_of(record: Path) -> dict:
    """A record without what a clock decides."""
    return {k: v for k, v in json.loads(record.read_text()).items() if k not in ("seconds", "sha256")}


def begin(out: Path, source: Path) -> tuple:
    """A short run from weights, with the recipe that lies beside all copies."""
    few = ("--training.steps", "2", "--training.schedule.warmup-steps", "1")
    return ("train", out.parents[1] / "recipe.json", "--out", out, "--init-from", source, *few)


TINY = ("--max-new-tokens", "4", "--json")
COMMANDS = {
    "resume": lambda run, out: ("train", run / "recipe.json", "--out", run, "--resume"),
    "run": lambda run, out: ("run", run / "recipe.json", "--out", run, "--resume"),
    "from checkpoint": lambda run, out: begin(out, run / "checkpoints/step-12"),
    "from release": lambda run, out: begin(out, run / "release/step-12"),
    "analyze": lambda run, out: ("analyze", run, "--step", "12"),
    "export": lambda run, out: ("export", run, "--step", "12", "--out", out),
    "export 6": lambda run, out: ("export", run, "--step", "6", "--out", out),
    "publish": lambda run, out: ("publish", run, "--to", f"file:{run / 'release/hub'}"),
    "report": lambda run, out: ("report", run, "--out", out),
    "which-docs": lambda run, out: ("data", "which-docs", run, "--step", "3", "--json"),
    "pack": lambda run, out: (
        "data", "pack", run / "data", "--tokenizer", run / "tokenizer", "--out", run / "rows", "--row-len", "65",
    ),
    "tokenizer": lambda run, out: ("tokenizer", "train", run / "data", "--out", out, "--vocab-size", "400"),
    "params": lambda run, out: ("params", run),
    "generate": lambda run, out: ("generate", run / "release/step-12", "def", *TINY),
    "generate from hub": lambda run, out: ("generate", "test/small", "def", *TINY, "--cache-dir", run / "release/hub"),
    "calibrate": lambda run, out: (
        "calibrate", run / "release/step-12", "--text", run.parent / "texts", "--tokens", "200", "--json",
    ),
    "serve": lambda run, out: ("serve", run / "release/step-12"),
}  # fmt: skip
"""The words of each command."""
LEFT = {
    "resume": lambda run, out: sha256_file(run / "checkpoints/step-13/model.safetensors"),
    "run": lambda run, out: (
        sha256_file(run / "release/step-13/model.safetensors"), facts_of(run / "analysis/step-13.json"),
    ),
    "from checkpoint": lambda run, out: sha256_file(out / "checkpoints/step-2/model.safetensors"),
    "from release": lambda run, out: sha256_file(out / "checkpoints/step-2/model.safetensors"),
    "analyze": lambda run, out: facts_of(run / "analysis/step-12.json"),
    "export": lambda run, out: digests(out),
    "export 6": lambda run, out: digests(out),
    "publish": lambda run, out: digests(run / "release/hub"),
    "report": lambda run, out: digests(out),
    "pack": lambda run, out: digests(run / "rows"),
    "tokenizer": lambda run, out: digests(out),
}  # fmt: skip
"""What a command leaves on disk, beside what it prints."""


@dataclasses.dataclass
class Outcome:
    """What came of a command."""

    code: int
    printed: str
    """On stdout, without names of folders and without speeds."""
    left: object
    said: str
    """On stderr."""

    def same_as(self, other):
        return (self.code, self.printed, self.left) == (other.code, other.printed, other.left)


class Lab:
    """A run of which the last step is to be trained again, copies of it, and what each command makes of a sound one."""

    def __init__(self, folder: Path):
        self.folder, self.sound, self.count = folder, {}, 0
        self.run = folder / "made" / "run"
        save_recipe(small_recipe(write_texts(folder / "made" / "texts"), steps=13), folder / "recipe.json")
        source, recipe = folder / "source", folder / "recipe.json"
        few = ["--training.steps", "2", "--training.schedule.warmup-steps", "1"]
        assert call(["train", recipe, "--out", source, *few]) == 0
        assert call(["run", recipe, "--out", self.run, "--init-from", source / "checkpoints" / "step-2"]) == 0
        shutil.rmtree(self.run / "checkpoints" / "step-13")  # for a step to be left

    def files(self, kind):
        """Files of a kind, as names below the run folder."""
        names = sorted(
            p.relative_to(self.run).as_posix() for p in self.run.rglob("*") if p.is_file() and not p.is_symlink()
        )
        return [name for name in names if kind_of(name) == kind]

    def copy(self):
        self.count += 1
        folder = self.folder / f"{self.count:05}"  # of one length, for tables of one width
        shutil.copytree(self.run.parent, folder, symlinks=True)
        return folder / "run"

    def outcome(self, command, capsys, run):
        out = run.parent / "out"
        capsys.readouterr()
        code = call(COMMANDS[command](run, out))
        shown, said = capsys.readouterr()
        if "generate" in command and code == 0:
            shown = json.loads(shown)["text"]
        if command == "run":  # it prints how fast it writes
            shown = ""
        shown = re.sub(rf"{self.folder}/\d+", "HERE", shown)
        left = LEFT[command](run, out) if code == 0 and command in LEFT else None
        return Outcome(code, shown, left, said)

    def expected(self, command, capsys):
        if command not in self.sound:
            run = self.copy()
            self.sound[command] = self.outcome(command, capsys, run)
            assert self.sound[command].code == 0, (command, self.sound[command].said)
            shutil.rmtree(run.parent)
        return self.sound[command]

    def attempt(self, name, place, bit, command, capsys):
        """``named`` or ``harmless``; the test fails on anything else."""
        expected, run = self.expected(command, capsys), self.copy()
        file = run / name
        flip(file, place, bit)
        known = names_of(run, file)
        found = self.outcome(command, capsys, run)
        shutil.rmtree(run.parent)
        told = any(path in found.said for path in known)
        where = f"{name}, byte {place:.3f}, bit {bit}, {command}: {found.said[-500:]}"
        assert "Traceback" not in found.said, where
        if found.code == 2:
            last = found.said.strip().splitlines()[-1]
            assert last.startswith("cognica-poe: ") and any(path in last for path in known), where
            return "named"
        assert found.same_as(expected), f"SILENT: {where}"
        return "named, went on" if told else "harmless"


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


def call(words):
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def flip(file, place, bit):
    """Flip a bit of the byte at ``place``, a share of the file's length; an empty file gets a byte."""
    data = bytearray(file.read_bytes()) or bytearray(1)
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    file.write_bytes(data)


def names_of(run, file):
    """Paths by which a message may name the file: its own, links to it, for a reference the folder of them, and for a
    manifest, whose first line is a folder's mark, that folder."""
    links = [str(path) for path in run.rglob("*") if path.is_symlink() and path.resolve() == file.resolve()]
    folders = [str(file.parent)] if file.parent.name == "refs" or file.name == MANIFEST else []
    return [str(file), *links, *folders]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    """``serve`` ends where it would begin to listen."""
    pytest.importorskip("fastapi")
    from transformers.cli import serve

    monkeypatch.setattr(serve, "Serve", lambda **_: None)


def report(title, counts):
    tried = sum(counts.values())
    print(
        f"{title}: {tried} tried, "
        + ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        + ", 0 silent"
    )


def test_every_file_of_a_run_has_a_kind_and_every_kind_its_readers(lab):
    names = [
        path.relative_to(lab.run).as_posix() for path in lab.run.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert [name for name in names if kind_of(name) is None] == []
    assert set(KINDS) == set(READERS) and {command for readers in READERS.values() for command in readers} <= set(
        COMMANDS
    )


def test_a_flipped_byte_of_every_kind_is_named_or_harmless(lab, capsys):
    rng, counts = random.Random(20261125), Counter()
    for kind in KINDS:
        if files := lab.files(kind):
            command = rng.choice(
                [reader for reader in READERS[kind] if reader not in ("analyze", "resume", "run")] or ["resume"]
            )
            counts[lab.attempt(rng.choice(files), rng.random(), rng.randrange(8), command, capsys)] += 1
    with capsys.disabled():
        report("a byte of each kind", counts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_of_every_file_are_named_or_harmless(lab, capsys, kind):
    rng, counts = random.Random(kind), Counter()
    places = int(os.environ.get("PLACES", "2"))
    for name in lab.files(kind):
        for command in READERS[kind]:
            for place in (rng.random() for _ in range(places)):
                counts[lab.attempt(name, place, rng.randrange(8), command, capsys)] += 1
    with capsys.disabled():
        report(kind, counts)
