"""What the settings of every pattern share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PatternConfig:
    """Settings of a block-sparse pattern: a frozen dataclass whose fields all have defaults."""
