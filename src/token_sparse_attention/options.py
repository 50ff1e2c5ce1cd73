"""How the fields of an options dataclass read on the command line.

The commands make their arguments from such dataclasses: a field's type says how its value is
read, the ``Attributes`` of the docstring what it means. An `Option` in an ``Annotated`` type
says what these do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Option:
    """What the type of a field does not say of its argument.

    Attributes:
        name: the argument's, if not the field's: ``"--heads"``; one without dashes is positional.
        metavar: stands for the value in the help.
        default: what the help says of the default, if not the value.
        minimum: the smallest number.
        maximum: the largest number.
        read: reads the value from text; raises ValueError or TypeError.
        repeat: whether a tuple's values are given one by one, not between commas.
        optional: whether a tuple may be empty.
    """

    name: str | None = None
    metavar: str | None = None
    default: str | None = None
    minimum: int | None = None
    maximum: int | None = None
    read: Callable[[str], Any] | None = None
    repeat: bool = False
    optional: bool = False

    def over(self, other: Option) -> Option:
        """Return `other` with what this option says in place of what that one does."""
        said = {name: value for name, value in vars(self).items() if value not in (None, False)}
        return dataclasses.replace(other, **said)


HIDDEN = Option("")  # of a field that is no argument
Count = Annotated[int, Option(minimum=1)]
Tokens = Annotated[int, Option(minimum=1, maximum=2**24)]  # of prompts and replies
CountFrom0 = Annotated[int, Option(minimum=0)]
Device = Annotated[str, Option(metavar="DEVICE")]
