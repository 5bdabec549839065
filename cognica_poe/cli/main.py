"""Command line: parse, call, print. Exit code 0 on success, 2 for a user's mistake with one line of what to do."""

from __future__ import annotations

import inspect
import os
import sys

import tyro

from cognica_poe.cli.commands import COMMANDS, RECIPE_COMMANDS
from cognica_poe.cli.progress import log, quiet_transformers
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.recipe.named import find_recipe

USAGE = """usage: cognica-poe COMMAND ...

Product-of-Experts language models: pretrain, measure, publish and run them.
`cognica-poe COMMAND --help` explains a command; `cognica-poe run RECIPE --help` lists every field of a recipe.

"""


def usage() -> str:
    """Help text of the program: every command with the first line of its docstring."""
    functions = {name: command.function for name, command in RECIPE_COMMANDS.items()} | COMMANDS
    commands = {name: function.__doc__ or "" for name, function in functions.items()}
    return USAGE + "".join(f"  {name:<18}{text.strip().splitlines()[0]}\n" for name, text in commands.items())


def dispatch(argv: list[str]) -> None:
    """Call the command that ``argv`` names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    quiet_transformers()
    if argv[0] in RECIPE_COMMANDS:
        return _recipe_command(argv[0], argv[1:])
    words = 2 if argv[0] in ("data", "tokenizer", "bench") else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: commands are {', '.join([*RECIPE_COMMANDS, *COMMANDS])}")
    tyro.cli(COMMANDS[name], prog=f"cognica-poe {name}", args=argv[words:])


def _recipe_command(name: str, rest: list[str]) -> None:
    command = RECIPE_COMMANDS[name]
    description = inspect.getdoc(command.function)
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] in ("-h", "--help"):
            print(f"usage: cognica-poe {name} RECIPE {command.options} [--json] [--training.steps N ...]\n")
            print(f"{description}\n`cognica-poe {name} RECIPE --help` lists every field.")
            return
        raise UserError(f"{name}: name a recipe first, such as `cognica-poe {name} {command.example}`")
    default = command.default(find_recipe(rest[0]))
    prog = f"cognica-poe {name} {rest[0]}"
    command.function(tyro.cli(type(default), default=default, prog=prog, description=description, args=rest[1:]))


def main() -> None:
    """Entry point of ``cognica-poe``."""
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        log(f"cognica-poe: {error}")
        sys.exit(2)
    except TrainingStopped as stopped:
        log(f"cognica-poe: {stopped}")
        sys.exit(143)
    except KeyboardInterrupt:
        log("cognica-poe: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
