"""Wrong command lines, made from right ones by the options' own types and ranges.

Every mistake is a right line with one thing changed, so that the line with the mistake taken back is a right one.
"""

import dataclasses
import inspect
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from cognica_poe.cli.main import Group, walk
from cognica_poe.recipe.fields import Range
from tests.border.forks import Line

COMMANDS = {" ".join(words): node for words, node in walk() if not isinstance(node, Group)}

RIGHT = {
    "run": "run {recipe} --out {new}",
    "train": "train {recipe} --out {new}",
    "plan": "plan {recipe} --gpus 2 --mfu 0.4",
    "params": "params tiny",
    "analyze": "analyze {run} --step 2",
    "calibrate": "calibrate {release} --text {texts} --tokens 600",
    "bpb": "bpb {release} --text {texts} --max-bytes 4000",
    "eval": "eval {release} --tasks arc_easy --limit 2",
    "export": "export {run} --step 2 --out {new}",
    "add-exit": "add-exit {release} --layer 1 --out {new} --text {texts} --tokens 600 --batch-rows 2",
    "publish": "publish {run} --to file:{new}",
    "report": "report {run} --out {new}",
    "follow": "follow {run} --publish-to file:{new}",
    "import": "import {release} --out {new} --text {texts} --measured-bytes 2000",
    "trajectory import": "trajectory import {release}/trajectory.csv --out {new} --drafts 420",
    "generate": "generate {release} Hi --max-new-tokens 4",
    "serve": "serve {release} --port {port}",
    "data mix show": "data mix show frontier_v1 --tokens 1000",
    "data mix pin": "data mix pin {mix} --bytes 1000 --out {new}.json",
    "data build": "data build {texts} --out {new} --val-min-bytes 20000",
    "data pack": "data pack {run}/data --tokenizer {run}/tokenizer --out {new} --row-len 65",
    "data task": "data task pack 0 --out {planned}",
    "data which-docs": "data which-docs {run} --step 0",
    "tokenizer train": "tokenizer train {run}/data --out {new} --vocab-size 400",
    "tokenizer report": "tokenizer report {run}/data --tokenizer {run}/tokenizer --max-bytes 20000",
    "bench train": "bench train --shapes 4x64 --modes none --dtypes float32 --compile off --rounds 1 --steps 1 "
    "--rows 2 --micro-rows 2 --vocab 300 --length 16",
    "bench decode": "bench decode {release} --text {texts} --prompts 1 --new-tokens 4 --prompt-tokens 4 --k-draft 2 "
    "--drafters stage --rounds 1 --dtype float32",
    "bench memory": "bench memory --width 32 --vocab 64 --length 16 --rows 1 --layers 1 1",
}
"""One line per command that works, on the world of :func:`tests.border.world.make_world`."""


@dataclass(frozen=True)
class Option:
    """A parameter of a command, or a field of one."""

    name: str
    """``--training.steps``, or the parameter's name where it is a position."""
    hint: Any
    """Its type, without what Annotated adds."""
    range: Range
    positional: bool
    required: bool

    @property
    def kinds(self) -> set[Any]:
        """int, float, str, bool, Path or Literal, whichever it takes."""
        return set(_kinds(self.hint))


def _kinds(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield Literal
    elif get_origin(hint) in (tuple, Union, types.UnionType, Annotated):
        for part in get_args(hint)[: 1 if get_origin(hint) is Annotated else None]:
            yield from _kinds(part)
    elif isinstance(hint, type) and hint is not type(None):
        yield hint


def options_of(command: str) -> list[Option]:
    """Every option and position of a command."""
    node = COMMANDS[command]
    found = []
    for name, hint in get_type_hints(node, include_extras=True).items():
        parameter = inspect.signature(node).parameters.get(name)
        if parameter is None:
            continue
        extras = getattr(hint, "__metadata__", ())
        bare = hint.__origin__ if extras else hint
        if dataclasses.is_dataclass(bare):
            found += list(_fields(bare))
            continue
        bounds = next((extra for extra in extras if isinstance(extra, Range)), Range(None))
        positional = any(extra is tyro.conf.Positional or "Positional" in repr(extra) for extra in extras)
        flag = name if positional else f"--{name.replace('_', '-')}"
        required = parameter.default is inspect.Parameter.empty and not (name == "out" and command in ("run", "train"))
        found.append(Option(flag, bare, bounds, positional, required))
    return found


def _fields(part: type, prefix: str = "--") -> Iterator[Option]:
    hints = get_type_hints(part)
    for field in dataclasses.fields(part):
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{name}.")
        else:
            yield Option(name, hints[field.name], field.metadata.get("range", Range()), False, False)


@dataclass(frozen=True)
class Mistake:
    """A wrong line."""

    command: str
    kind: str
    line: Line
    names: tuple[str, ...]
    """The message holds one of them."""


def all_mistakes(world: "dict[str, str]", seed: int) -> Iterator[Mistake]:
    """Every mistake that one change makes of the right lines; ``seed`` draws the values."""
    for command, template in RIGHT.items():
        draw = random.Random(f"{seed} {command}")
        words = right_words(template, world)
        for kind, changed, names, settings in _changes(command, words, world, draw):
            yield Mistake(command, kind, Line(changed, world["cwd"], **settings), names)


def right_words(template: str, world: dict[str, str]) -> list[str]:
    """The words of a right line."""
    return [word.format(**world) for word in template.split(" ")]


Change = tuple[str, list[str], tuple[str, ...], dict[str, Any]]


def _changes(command: str, words: list[str], world: dict[str, str], draw: random.Random) -> Iterator[Change]:
    depth = len(command.split())
    options = options_of(command)
    typo = draw.choice([option.name for option in options if not option.positional] or ["--json"]) + draw.choice("xz0")
    yield "unknown option", [*words, typo, "1"], (typo,), {}
    yield "unknown option", [*words, "-q"], ("-q",), {}
    yield (
        "one word too many",
        [*words[: depth + _positions(options)], "left", *words[depth + _positions(options) :]],
        ("left", "over"),
        {},
    )
    yield "unknown command", [words[0] + "x", *words[1:]], (words[0] + "x",), {}
    for position, option in enumerate(option for option in options if option.positional):
        at = depth + position
        yield (
            "missing position",
            [*words[:at], *words[at + 1 :]],
            (option.name, option.name.upper(), "missing", "MIX", "RUN", "CHECKPOINT", "recipe", "--step"),
            {},
        )
        for kind, value, settings in _paths(option.name, world, draw):
            yield f"position: {kind}", [*words[:at], value, *words[at + 1 :]], (option.name, *_shown(value)), settings
    for option in options:
        if option.positional or option.kinds == {bool}:
            continue
        if option.required:
            at = words.index(option.name)
            yield "missing option", [*words[:at], *words[at + 2 :]], (option.name,), {}
        yield "missing value", [*without(words, option.name), option.name], (option.name,), {}
        if command == "plan" and option.name == "--data.mix":
            continue  # it reads no text
        for kind, value, settings in _values(option, world, draw):
            if kind == "out: a foreign folder" and command in ("publish", "report"):
                continue  # these add to a folder
            changed = [*without(words, option.name), f"{option.name}={value}"]
            if not settings and not draw.randrange(4) and not value.startswith("-"):
                changed = [*without(words, option.name), option.name, value]
            yield (
                kind,
                changed,
                (option.name, option.name.removeprefix("--"), *_shown(value)),
                settings,
            )


def _positions(options: list[Option]) -> int:
    return sum(option.positional for option in options)


def without(words: list[str], option: str) -> list[str]:
    if option not in words:
        return words
    at = words.index(option)
    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[:at] + words[end:]


def _shown(value: str) -> tuple[str, ...]:
    """How a value may stand in a message."""
    if not value:
        return "''", "empty", " . ", " ."
    path = value.removeprefix("file:")
    escaped = path.encode("utf-8", "backslashreplace").decode()
    above = (str(Path(path).parent),) if path.startswith("/") else ()
    return (path, path[:40], repr(path)[1:-1], escaped, *above)


NUMBERS = {
    "nan": ("nan", "NaN", "-nan"),
    "infinite": ("inf", "-inf", "1e999", "-Infinity"),
    "huge": (str(10**30), str(-(10**30)), "9" * 400, "9" * 5000, "1e308", "-1e308"),
    "zero or below": ("0", "-1", "-0.5", "-100000"),
    "above": ("1.5", "65536", "1000001", "2000000000", "99999999999"),
}
WORDS = ("many", "", " ", "1,5", "0x10", "[red]3[/red]", "[/]", "1 2", "--", "\udcff\udcfe", "3\n4", "½", "None ")


def _values(option: Option, world: dict[str, str], draw: random.Random) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, value and the line's settings of values that ``option`` cannot have."""
    if Literal in option.kinds:
        for value in draw.sample(["", "fast", "[bold]", "None\n", "\udcff", "full,prefix", "FLAT"], 3):
            yield "unknown choice", value, {}
    elif number := option.kinds & {int, float}:
        kind = int if int in number else float
        for value in draw.sample(WORDS, 3):
            yield "wrong type", value, {}
        if kind is int:
            yield "wrong type", draw.choice(("1.5", "1e3", "nan", "inf", "-inf")), {}
        for name, values in NUMBERS.items():
            wrong = [value for value in values if _wrong(kind, option.range, value)]
            if wrong:
                yield name, draw.choice(wrong), {}
    elif Path in option.kinds or option.name in ("--data.mix", "--to"):
        yield from _paths(option.name, world, draw)
    elif option.name in FREE_TEXTS:
        for value in FREE_TEXTS[option.name]:
            yield "text", value, {}


FREE_TEXTS = {
    "--model.window-pattern": ("", "X", "[red]", "SSSX"),
    "--release.repo-id": ("", "x", "../..", "a/b/c", "a b/c", "[red]/x", "x/\udcff"),
    "--name": ("", ".", "..", "../x", "a/b", "\udcff", "x" * 300),
    "--gpu": ("", "a100", "[red]x[/red]", "\udcff"),
    "--shapes": ("", "4", "x", "4x", "0x64", "4x63", "-4x64", "[red]4x64[/red]", "9x99999999999999999999"),
    "--device": ("", "cpuu", "cuda:x", "[red]"),
    "--revision": ("step-2", "..", "[red]"),
}
"""Texts that these options cannot have; other texts may be anything."""


def _wrong(kind: type, bounds: Range, value: str) -> bool:
    try:
        return bounds.problem(kind(value)) is not None
    except ValueError:
        return True


def _paths(name: str, world: dict[str, str], draw: random.Random) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Paths that ``name``, an option or a position, cannot have."""
    broken = {
        "too long": world["base"] + "/" + "x" * 300,
        "much too long": world["base"] + "/x" * 3000,
        "a circle of links": world["loop"],
        "below a circle of links": world["loop"] + "/x",
        "below a file": world["file"] + "/x",
    }
    if name in ("--out", "--to"):
        before = "file:" if name == "--to" else ""
        wrong = {
            **broken,
            "a file": world["file"],
            "a foreign folder": world["foreign"],
            "deep below a file": world["file"] + "/x/y/z",
            "a device": "/dev/null",
            "the run itself": world["run"],
        }
        for kind, value in wrong.items():
            yield f"out: {kind}", before + value, {}
        yield "out: locked", f"{before}{world['locked']}/x", {"nobody": True}
        if name == "--to":
            for value in ("", "name", "a/b/c", "../..", "file:", "[red]/x", "x/\udcff"):
                yield "to", value, {}
        return
    if name == "prompt":
        yield "not UTF-8", "caf\udce9", {}
        yield "longer than the context", "word " * 300, {}
        return
    missing = {
        "missing": world["base"] + "/missing",
        "missing, in brackets": world["base"] + "/[red]missing[/red]",
        "missing, not UTF-8": world["base"] + "/missing\udcff",
        "missing, of two lines": world["base"] + "/missing\nline",
        "empty word": "",
        "a foreign folder": world["foreign"],
        "an empty folder": world["empty"],
        "a binary file": world["file"],
        "a device": "/dev/null",
    }
    if name in ("data", "mix", "--text", "--data.mix"):
        missing.pop("a foreign folder")
    for kind, value in (broken | missing).items():
        yield kind, value, {}
    yield "locked", world["locked"], {"nobody": True}
