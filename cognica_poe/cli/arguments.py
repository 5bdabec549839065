"""How arguments are named in help texts: RUN, CHECKPOINT and N instead of the names of Python's types."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union, get_args

import tyro
from tyro.conf import Positional

from cognica_poe.recipe.fields import Recipe

RunFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
RunFolders: TypeAlias = Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
DataFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]]
ReleaseFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
Checkpoint: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
Prompt: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="PROMPT")]]
MixName: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="MIX")]]
RecipeName: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]]
RecipeFields: TypeAlias = Annotated[Recipe, tyro.conf.arg(name="")]
"""Every field of the recipe as an option of its own."""
Flag: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch; only the side that is not the default is an option."""

METAVARS = {int: "N", float: "X", str: "TEXT"}


def named_types() -> tyro.constructors.ConstructorRegistry:
    """The rules by which the tree is parsed: numbers and texts have short names, what may be omitted its own name."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_number_or_text)
    registry.primitive_rule(_optional)
    return registry


def _number_or_text(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    kind: Any = info.type
    if kind not in METAVARS:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=METAVARS[kind],
        instance_from_str=lambda words: _number(kind, words[0]),
        is_instance=lambda value: type(value) is kind or (kind is float and type(value) is int),
        str_from_instance=lambda value: [str(value)],
    )


def _number(kind: type, word: str) -> Any:
    """``kind(word)``, with a message for people who do not know Python."""
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is no {'whole number' if kind is int else 'number'}") from None


def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """``T | None`` reads like ``T``; the word None stands for the value None."""
    members = get_args(info.type) if info.type_origin in (Union, types.UnionType) else ()
    others = [member for member in members if member is not type(None)]
    if len(members) != 2 or len(others) != 1:
        return None
    part = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        tyro.constructors.PrimitiveTypeInfo.make(others[0], info.markers)
    )
    if not isinstance(part, tyro.constructors.PrimitiveConstructorSpec) or part.nargs != 1:
        return None
    return dataclasses.replace(
        part,
        choices=part.choices and (*part.choices, "None"),
        instance_from_str=lambda words: None if words == ["None"] else part.instance_from_str(words),
        is_instance=lambda value: value is None or part.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else part.str_from_instance(value),
    )
