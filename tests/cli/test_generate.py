"""What options dataclasses say is what arguments are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pytest

from token_sparse_attention.cli.command import Parser
from token_sparse_attention.cli.generate import add_arguments, build
from token_sparse_attention.options import HIDDEN, Count, CountFrom0, Option, Tokens


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape.

    Attributes:
        num_heads: query heads,
            of all layers.
        dropped: share of ``tokens`` dropped, 50% for example
        base: told by the command.
    """

    num_heads: Annotated[Count, Option("--heads", metavar="H")] = 32
    dropped: float | None = None
    base: Annotated[object, HIDDEN] = field(default_factory=object)

    def __post_init__(self) -> None:
        if self.num_heads > 64:
            raise ValueError("too many heads")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything.

    Attributes:
        files: what to read
        kind: of thing
        sizes: some sizes
        spare: sizes, or none
        notes: some notes
        out: where to write
        last: how many last ones
        loud: whether to shout
    """

    files: Annotated[tuple[Path, ...], Option("files", "FILE")]
    kind: Literal["one", "other"]
    sizes: tuple[Count, ...] = (1, 2)
    spare: Annotated[tuple[Tokens, ...], Option(optional=True)] = (1,)
    notes: Annotated[tuple[str, ...], Option(repeat=True)] = ()
    out: Annotated[Path | None, Option(default="nowhere")] = None
    last: CountFrom0 = 3
    loud: bool = False
    shape: partial[Shape]


def parser() -> Parser:
    made = Parser(prog="it", example="it x")
    add_arguments(made, Options)
    return made


def read(*words: str) -> Options:
    return build(Options, vars(parser().parse_args(words)))


def test_defaults_are_the_dataclass_own():
    options = read("a", "--kind", "one")
    assert options == Options(files=(Path("a"),), kind="one", shape=options.shape)
    assert options.shape().num_heads == 32
    assert read("a", "--kind", "one", "--spare", "").spare == ()


def test_values_are_read_by_their_types():
    options = read(
        "a", "b", "--kind", "other", "--sizes", "4, 5", "--notes", "x,y", "--notes", "z",
        "--out", "there", "--last", "0", "--loud", "--heads", "64", "--dropped", "0.5",
    )  # fmt: skip
    assert options.files == (Path("a"), Path("b"))
    assert (options.kind, options.sizes, options.notes) == ("other", (4, 5), ("x,y", "z"))
    assert (options.out, options.last, options.loud) == (Path("there"), 0, True)
    base = object()
    assert options.shape(base=base) == Shape(num_heads=64, dropped=0.5, base=base)


def test_the_command_makes_what_only_it_can_complete():
    with pytest.raises(ValueError, match="too many heads"):
        read("a", "--kind", "one", "--heads", "65").shape()


def test_help_is_the_docstrings():
    text = " ".join(parser().format_help().split())
    for part in (
        "--heads H query heads, of all layers (default: 32)",
        "--dropped X share of tokens dropped, 50% for example",
        "--kind {one,other} of thing",
        "--sizes LIST some sizes (default: 1,2)",
        "--out FILE where to write (default: nowhere)",
        "The shape: --heads",
    ):
        assert part in text
    assert "base" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "a --kind on",
            "argument --kind: must be one of one, other; got 'on'; did you mean 'one'",
        ),
        ("a --kind one --sizes 1,0", "argument --sizes: must be at least 1, got 0"),
        ("a --kind one --sizes ,", "argument --sizes: must hold at least one value, got ','"),
        ("a --kind one --spare 99999999", "argument --spare: must be at most 16777216, got 999"),
        ("a --kind one --last -1", "argument --last: must be at least 0, got -1"),
        ("a --kind one --dropped half", "argument --dropped: must be a number, got 'half'"),
        ("a --kind one --heads 1.5", "argument --heads: must be a whole number, got '1.5'"),
        ("--kind one", "the following arguments are required: FILE"),
    ],
)
def test_errors_name_the_argument_and_the_value(capsys, words, message):
    with pytest.raises(SystemExit):
        read(*words.split())
    assert message in capsys.readouterr().err
