"""The tree of commands. Exit code 0 on success, 2 for a user's mistake, 128 + n after signal n, each with one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from cognica_poe import __version__, interrupts
from cognica_poe.cli import analysis, bench, data, imports, inference, mixes, release, tokenizer, training
from cognica_poe.cli.arguments import RecipeName, named_types, require_options, with_ranges_in_help
from cognica_poe.cli.evaluation import bpb, eval_tasks
from cognica_poe.cli.mistakes import one_line, refusals
from cognica_poe.cli.progress import log, quiet_transformers
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.files import safe_name
from cognica_poe.leftovers import drop_owned
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.named import RECIPES, find_recipe

Command = Callable[..., Any]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Commands under one word."""

    about: str
    commands: Mapping[str, Command | Group]


TREE = Group(
    "Product-of-Experts language models: pretrain, measure, publish and run them.\n\n"
    "`cognica-poe COMMAND --help` explains a command, `cognica-poe run RECIPE --help` lists every field of a recipe, "
    "`cognica-poe --version` names the version.",
    {
        "run": training.run,
        "train": training.train,
        "plan": training.plan,
        "params": training.params,
        "analyze": analysis.analyze,
        "calibrate": analysis.calibrate,
        "bpb": bpb,
        "eval": eval_tasks,
        "export": release.export,
        "add-exit": release.add_exit,
        "publish": release.publish,
        "follow": release.follow,
        "report": release.report,
        "import": imports.import_weights,
        "trajectory": Group("Published trajectories.", {"import": imports.import_trajectory}),
        "generate": inference.generate,
        "serve": inference.serve,
        "data": Group(
            "Text: collect it, pack it into rows, find what a step read.",
            {
                "mix": Group(
                    "Mixes of Hub datasets: what they are, and files that name every revision.",
                    {"show": mixes.show_mix, "pin": mixes.pin_mix},
                ),
                "build": data.build_data,
                "pack": data.pack_rows,
                "task": data.run_task,
                "which-docs": data.which_docs,
            },
        ),
        "tokenizer": Group("The tokenizer of a run.", {"train": tokenizer.train_tokenizer, "report": tokenizer.report}),
        "bench": Group(
            "Time and memory of training and decoding on this machine.",
            {"train": bench.bench_train, "decode": bench.bench_decode, "memory": bench.bench_memory},
        ),
    },
)


def walk(node: Command | Group = TREE, words: Words = ()) -> Iterator[tuple[Words, Command | Group]]:
    """Every node of the tree with the words that lead to it, groups before their commands."""
    yield words, node
    if isinstance(node, Group):
        for word, child in node.commands.items():
            yield from walk(child, (*words, word))


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The call that ``words`` ask for. Prints help and leaves with SystemExit(0) where that is what they ask for.

    Raises UserError for words that no command takes.
    """
    path, node = _follow(words)
    parser = _parser(TREE, words, (), path)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            call = tyro.cli(parser, prog="cognica-poe", args=words, description=TREE.about, registry=named_types())
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_mistake(path, node, words[len(path) :], errors.getvalue())) from None
    require_options(" ".join(path), call)
    return call


def _follow(words: Sequence[str]) -> tuple[Words, Command | Group]:
    """The node that the first words name, as far as they name one, and those words."""
    node: Command | Group = TREE
    for depth, word in enumerate(words):
        if not isinstance(node, Group) or word not in node.commands:
            return tuple(words[:depth]), node
        node = node.commands[word]
    return tuple(words), node


def _parser(group: Group, words: Sequence[str], path: Words, wanted: Words) -> Any:
    """What tyro parses a group as: one sub-command per child. The one that is ``wanted`` shows its whole help."""
    children = []
    for word, child in group.commands.items():
        here, parser = (*path, word), None
        about = child.about if isinstance(child, Group) else inspect.getdoc(child) or ""
        if here == wanted and not isinstance(child, Group):
            parser, about = _with_recipe(child, words[len(here) :])
        elif isinstance(child, Group):
            parser = _parser(child, words, here, wanted)
        else:
            parser, about = _later(child), about.partition("\n")[0]
        command = tyro.conf.subcommand(word, description=about, constructor=parser)
        children.append(Annotated[Any, command])
    if len(children) == 1:  # tyro takes one sub-command for none
        children.append(Annotated[None, tyro.conf.Suppress])
    return Union[tuple(children)]  # noqa: UP007


def _later(command: Command) -> Command:
    """``command`` to parsers; when called, only the call: what a command prints or raises is not the parser's."""

    described = with_ranges_in_help(command)

    @functools.wraps(described)
    def call(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return call


def _takes_recipe(command: Command) -> bool:
    return "settings" in inspect.signature(command).parameters


def _with_recipe(command: Command, rest: Sequence[str]) -> tuple[Command, str]:
    """``command`` and its help; where it takes a recipe, with the values of the one that ``rest`` begins with."""
    about = (inspect.getdoc(command) or "").partition("\nArgs:")[0].strip()
    if not _takes_recipe(command):
        return _later(command), about
    if not rest or rest[0].startswith("-"):
        shapes = "".join(f"\n    {name:<9} {_shape(recipe)}" for name, recipe in RECIPES.items())
        return _nameless, f"{about}\n\n`{command.__name__} RECIPE --help` lists them with their values.\n{shapes}"
    recipe = find_recipe(rest[0])
    given: dict[str, Any] = {"settings": recipe}
    if "out" in inspect.signature(command).parameters:
        given["out"] = Path("runs") / safe_name(recipe.name, "recipe name")
    return functools.partial(_later(command), **given), about


def _nameless(recipe: RecipeName) -> None:
    """A command about a recipe before its recipe is known.

    Args:
        recipe: Name of a recipe, or path of a recipe.json. It comes before all options.
    """


def _shape(recipe: Recipe) -> str:
    model, training = recipe.model, recipe.training
    kind = "one head" if model.poe_mode == "none" else f"stages of {', '.join(map(str, model.poe_stage_layers))} layers"
    return f"{model.num_hidden_layers} layers x {model.hidden_size}, {kind}, {training.steps:,} steps"


def _mistake(path: Words, node: Command | Group, rest: Sequence[str], box: str) -> str:
    """One line about words that were refused; ``box`` is what the parser says of them."""
    name = " ".join(path)
    if isinstance(node, Group):
        known = f"commands are {', '.join(' '.join((*path, word)) for word in node.commands)}"
        if not rest:
            return f"{name}: name a command; {known}"
        if rest[0].startswith("-"):
            return f"unknown option {rest[0]}: a command comes first; {known}"
        near = difflib.get_close_matches(rest[0], node.commands, n=1)
        hint = f"did you mean {' '.join((*path, near[0]))!r}? " if near else ""
        return f"unknown command {' '.join((*path, rest[0]))!r}: {hint}{known}"
    if _takes_recipe(node) and (not rest or rest[0].startswith("-")):
        return f"{name}: name a recipe first, such as `cognica-poe {name} tiny`; recipes are {', '.join(RECIPES)}"
    recipe = f" {rest[0]}" if _takes_recipe(node) else ""
    reason = _reason(box, f"cognica-poe {name} --help")
    return f"{name}: {reason}; `cognica-poe {name}{recipe} --help` lists what it takes"


def _reason(box: str, help_of: str) -> str:
    """The reason in the parser's box of many lines; of the options that it finds similar those of ``help_of`` count."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()
    text = "\n".join(line[2:].rstrip(" │") for line in lines[1:])  # below the title, without the box's sides
    parts = (" ".join(part.split()) for part in re.split(r"^ *[─-]{3,}$", text, flags=re.M))
    head = next(filter(None, parts), "these words are not understood")
    if head.startswith("Unrecognized"):
        word = head.partition(": ")[2].partition(" ")[0].rstrip(",")
        if not word.startswith("-"):
            return f"{word!r} is one word too many"
        similar = re.findall(
            r"^    (--[^\s,]+)(?:(?!^    \S).)*?^        in (cognica-poe .*? --help)", text, re.M | re.S
        )
        near = next((option for option, where in similar if where == help_of), None)
        return f"unknown option {word}" + (f" (did you mean {near}?)" if near else "")
    if head.startswith("Missing from "):
        return f"missing {', '.join(re.findall(r'^    (?! )(.+)$', text.split('For full helptext')[0], re.M))}"
    return head.removeprefix("Error parsing ").rstrip(".")


def dispatch(words: Sequence[str]) -> None:
    """Call the command that ``words`` name."""
    quiet_transformers()
    with refusals(words):
        parse(words or ["--help"])()


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of ``cognica-poe``, with the words of the command line unless others are given."""
    given = sys.argv[1:] if words is None else list(words)
    if given == ["--version"]:
        print(f"cognica-poe {__version__}")
        return
    if words is None:
        interrupts.watch()
    try:
        code = _call(given)
    except KeyboardInterrupt:
        code = _interrupted(interrupts.arrived() or signal.SIGINT)
    if words is None:
        interrupts.hear_no_more()
    if code:
        sys.exit(code)


def _call(words: Sequence[str]) -> int:
    """Exit code of a command; what went wrong is said in one line."""
    try:
        dispatch(words)
    except UserError as error:
        log(f"cognica-poe: {one_line(error)}")
        return 2
    except TrainingStopped as stopped:
        return _interrupted(stopped.number, str(stopped))
    except BrokenPipeError:
        os._exit(0)
    except Exception:
        if number := interrupts.arrived():  # other ranks were faster: what failed is what held them together
            return _interrupted(number)
        raise
    return 0


def _interrupted(number: int, line: str | None = None) -> int:
    """Clean up after a signal; the exit code that says which."""
    drop_owned()
    if interrupts.speaks():
        log(f"cognica-poe: {line or interrupts.Interrupted(number)}")
    return 128 + number


if __name__ == "__main__":
    main()
