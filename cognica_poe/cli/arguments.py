"""How arguments are named in help texts, RUN, CHECKPOINT and N instead of the names of Python's types; their ranges."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union, get_args, get_type_hints

import tyro
from tyro.conf import Positional

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import LONGEST_CONTEXT, Range, Recipe
from cognica_poe.recipe.rules import check, field_ranges, require_ranges

RunFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
RunFolders: TypeAlias = Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
DataFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]]
ReleaseFolder: TypeAlias = Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
Checkpoint: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
Prompt: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="PROMPT")]]
MixName: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="MIX")]]
StageName: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="STAGE")]]
TaskNumber: TypeAlias = Positional[Annotated[int, tyro.conf.arg(metavar="N"), Range(0)]]
RecipeName: TypeAlias = Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]]
RecipeFields: TypeAlias = Annotated[Recipe, tyro.conf.arg(name="")]
"""Every field of the recipe as an option of its own."""
Flag: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch; only the side that is not the default is an option."""

Count: TypeAlias = Annotated[int, Range(1, 1_000_000)]
"""How many of something."""
Counts: TypeAlias = Annotated[tuple[int, ...], Range(1, 1024)]
Length: TypeAlias = Annotated[int, Range(1, LONGEST_CONTEXT)]
"""Tokens of a text or row."""
Natural: TypeAlias = Annotated[int, Range(0)]
"""A step, a seed, an epoch."""
Naturals: TypeAlias = Annotated[tuple[int, ...], Range(0)]
Positive: TypeAlias = Annotated[int, Range(1)]
"""Bytes or tokens, without a bound but that of 64 bits."""
Share: TypeAlias = Annotated[float, Range(0, 1)]

METAVARS = {int: "N", float: "X", str: "TEXT"}


def named_types() -> tyro.constructors.ConstructorRegistry:
    """The rules by which the tree is parsed: numbers and texts have short names, what may be omitted its own name."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_number_or_text)
    registry.primitive_rule(_optional)
    registry.primitive_rule(_several)
    reading: list[Any] = []  # types whose fields the library's own rules are asked for

    @registry.struct_rule
    def with_ranges(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        """Fields of a dataclass, with the ranges that :func:`cognica_poe.recipe.fields.setting` gave them."""
        if not dataclasses.is_dataclass(info.type) or info.type in reading:
            return None
        reading.append(info.type)
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
        reading.remove(info.type)
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        ranges = field_ranges(info.type)
        fields = (dataclasses.replace(f, type=_with_hint(f.type, ranges[f.name], f.default)) for f in spec.fields)
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def with_ranges_in_help(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command``, whose help says what its numbers may be."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    parameters = inspect.signature(command).parameters
    call.__annotations__ = {
        name: _with_hint(hint, _range_of(hint), parameters[name].default) if name in parameters else hint
        for name, hint in get_type_hints(command, include_extras=True).items()
    }
    return call


def _range_of(hint: Any) -> Range | None:
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)), None)


def _with_hint(hint: Any, range_: Range | None, default: Any) -> Any:
    """``hint`` with a help text that ends in the default and the range, where there is a range and it is of numbers."""
    if range_ is None or not str(range_) or not _numbers(hint):
        return hint

    def say(shown: str) -> str:
        return f"(required; {range_})" if default is inspect.Parameter.empty else f"(default: {shown}; {range_})"

    return Annotated[hint, tyro.conf.arg(help_behavior_hint=say)]


def _numbers(hint: Any) -> bool:
    """Whether ``hint`` is a number, several, or one that may be None."""
    return hint in (int, float) or any(map(_numbers, get_args(hint)))


def require_options(name: str, call: functools.partial[None]) -> None:
    """Raise UserError for a number of a parsed call of command ``name`` that is out of its range."""
    hints = get_type_hints(inspect.unwrap(call.func), include_extras=True)
    for parameter, value in inspect.signature(call.func).bind(*call.args, **call.keywords).arguments.items():
        if isinstance(value, Recipe):
            check(value)
        elif dataclasses.is_dataclass(value):
            require_ranges(value, f"{name}: --")
        elif problem := (_range_of(hints[parameter]) or Range(None)).problem(value):
            raise UserError(f"{name}: --{parameter.replace('_', '-')} {problem}")


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
    """``T | None`` reads like ``T``, one or several; the word None stands for the value None."""
    members = get_args(info.type) if info.type_origin in (Union, types.UnionType) else ()
    others = [member for member in members if member is not type(None)]
    if len(members) != 2 or len(others) != 1:
        return None
    part = _spec(others[0], info)
    return part and dataclasses.replace(
        part,
        choices=part.choices and (*part.choices, "None"),
        instance_from_str=lambda words: None if words == ["None"] else part.instance_from_str(words),
        is_instance=lambda value: value is None or part.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else part.str_from_instance(value),
    )


def _several(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """``tuple[T, ...]``: an option that is given has at least one value."""
    members = get_args(info.type)
    if info.type_origin is not tuple or len(members) != 2 or members[1] is not Ellipsis:
        return None
    part = _single(members[0], info)

    def parse(words: list[str]) -> tuple[Any, ...]:
        assert part is not None
        if not words:
            raise ValueError("expects at least one value")
        if wrong := [word for word in words if part.choices and word not in part.choices]:
            raise ValueError(f"invalid choice {wrong[0]!r}, choose from {', '.join(part.choices or ())}")
        return tuple(part.instance_from_str([word]) for word in words)

    return part and dataclasses.replace(
        part,
        nargs="*",
        choices=None,
        metavar=f"{part.metavar} [{part.metavar} ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple) and all(map(part.is_instance, value)),
        str_from_instance=lambda value: [word for item in value for word in part.str_from_instance(item)],
    )


def _single(
    kind: Any, info: tyro.constructors.PrimitiveTypeInfo
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How one word becomes a ``kind``; None for what takes several."""
    part = _spec(kind, info)
    return part if part and part.nargs == 1 else None


def _spec(
    kind: Any, info: tyro.constructors.PrimitiveTypeInfo
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How words become a ``kind``."""
    part = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers)
    )
    return part if isinstance(part, tyro.constructors.PrimitiveConstructorSpec) else None
