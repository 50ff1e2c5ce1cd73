"""Arguments from options dataclasses.

Not by tyro 1.0, whose errors are boxes of five lines and more, nor by jsonargparse 4.53, whose
errors repeat the whole usage, whose options have underscores, and which reads texts as YAML.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from token_sparse_attention.errors import did_you_mean
from token_sparse_attention.options import HIDDEN, Option

_METAVARS = {bool: None, int: "N", float: "X", str: "TEXT", Path: "FILE"}
_NUMBERS = {
    int: ("a whole number", "whole numbers like 4096,8192"),
    float: ("a number", "numbers like 0.1,0.5"),
}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)  # `Argument.read` says what is expected
    return value


class Argument(NamedTuple):
    """A field of an options dataclass, or a dataclass whose fields are arguments instead."""

    field: dataclasses.Field[Any]
    kind: Any  # type of the value, or of each of many
    many: bool
    later: bool  # the command gets a partial dataclass, and adds what is hidden
    option: Option

    @property
    def name(self) -> str:
        """The option with its dashes, or the name of a positional argument."""
        return self.option.name or f"--{self.field.name.replace('_', '-')}"

    def read(self, text: str) -> Any:
        """Return the value that a text stands for."""
        option, choices = self.option, get_args(self.kind)
        listed = self.many and not option.repeat and self.name.startswith("-")
        parts = [part.strip() for part in text.split(",") if part.strip()] if listed else [text]
        plain = _finite if self.kind is float else self.kind
        read: Callable[[str], Any] = option.read or (str if choices else plain)
        try:
            values = [read(part) for part in parts]
        except (ValueError, TypeError) as error:
            if option.read:
                raise argparse.ArgumentTypeError(str(error)) from error
            what = _NUMBERS[self.kind][listed]
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from error
        for value in values:
            if choices and value not in choices:
                hint = did_you_mean(value, choices)
                raise argparse.ArgumentTypeError(
                    f"must be one of {', '.join(choices)}; got {value!r}{hint}"
                )
            if option.minimum is not None and value < option.minimum:
                raise argparse.ArgumentTypeError(f"must be at least {option.minimum}, got {value}")
            if option.maximum is not None and value > option.maximum:
                raise argparse.ArgumentTypeError(f"must be at most {option.maximum}, got {value}")
        if listed and not values and not option.optional:
            raise argparse.ArgumentTypeError(f"must hold at least one value, got {text!r}")
        return tuple(dict.fromkeys(values)) if listed else values[0]

    def add(self, parser: argparse._ActionsContainer, meaning: str) -> None:
        """Add the argument to a parser."""
        option, default = self.option, self.field.default
        required = default is dataclasses.MISSING
        shown = option.default or _shown(default)
        meaning = re.sub("`+", "", meaning).replace("%", "%%")
        given: dict[str, Any] = {"help": f"{meaning} (default: {shown})" if shown else meaning}
        if self.name.startswith("-"):
            given["required"] = required
        elif self.many or not required:
            given["nargs"] = "+" if self.many else "?"
        if not required:
            given["default"] = None if option.repeat else default
        choices = "{" + ",".join(get_args(self.kind)) + "}" if get_args(self.kind) else ""
        if self.kind is bool:
            given["action"] = "store_true"
        else:
            given["action"] = "append" if option.repeat else "store"
            listed = "LIST" if self.many else ""
            metavar = option.metavar or choices or listed or _METAVARS[self.kind]
            given |= {"type": self.read, "metavar": metavar}
        parser.add_argument(self.name, **given)


def _shown(default: Any) -> str:
    values = default if isinstance(default, tuple) else (default,)
    said = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    nothing = default in (None, dataclasses.MISSING) or isinstance(default, bool)
    return "" if nothing else ",".join(said)


def _arguments(options: type) -> Iterator[Argument]:
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind, option, origins = hints[field.name], Option(), []
        while (origin := get_origin(kind)) not in (None, Literal):
            origins.append(origin)
            first, *rest = (part for part in get_args(kind) if part is not NoneType)
            for said in reversed(rest) if origin is Annotated else ():  # the outermost first
                option = option.over(said)
            kind = first
        if option != HIDDEN:
            later = functools.partial in origins
            yield Argument(field, kind, tuple in origins, later, option)


def add_arguments(parser: argparse._ActionsContainer, options: type) -> None:
    """Add the arguments of an options dataclass, and of those that it holds."""
    meanings: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section.split("\n\n")[0], re.M)
        meanings.update({name: " ".join(text.split()).rstrip(".") for name, text in entries})
    for argument in _arguments(options):
        if dataclasses.is_dataclass(argument.kind):
            title = (argument.kind.__doc__ or "").partition("\n")[0].replace("`", "").rstrip(".")
            group = parser.add_argument_group(title)
            add_arguments(group, argument.kind)  # type: ignore[arg-type]
        else:
            argument.add(parser, meanings.get(argument.field.name, ""))


def build(options: type, values: Mapping[str, Any], *, later: bool = False) -> Any:
    """Return an options dataclass with the values that were read; a partial one if `later`."""
    given: dict[str, Any] = {}
    for argument in _arguments(options):
        if dataclasses.is_dataclass(argument.kind):
            value = build(argument.kind, values, later=argument.later)  # type: ignore[arg-type]
        else:
            value = values[argument.name.lstrip("-").replace("-", "_")]
        if argument.many and value is None:  # append knows no empty tuple
            continue
        given[argument.field.name] = tuple(value) if isinstance(value, list) else value
    return functools.partial(options, **given) if later else options(**given)
