"""Choose each layer's setting from measured divergences: pure functions over numbers.

One option per layer is to be chosen so that little divergence buys much work. Divergences of
layers made sparse alone are added up, which is an approximation: layers that are sparse
together disturb each other. Whoever chooses must therefore measure the combination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from token_sparse_attention.calibration.record import LayerSetting


class UnreachableError(ValueError):
    """No combination of the measured settings does what was asked for."""


@dataclass(frozen=True)
class Option:
    """One layer under one setting.

    Attributes:
        setting: what it changes of the base settings; None for a dense layer.
        divergence: KL of the next-token logits with this layer alone sparse, in nats.
        work: what it leaves of attention's operations, mean over heads and prompts; 1 is dense.
    """

    setting: LayerSetting | None
    divergence: float
    work: float


DENSE = Option(None, 0.0, 1.0)
Combination = tuple[Option, ...]  # one option per layer, in order


def efficient_options(options: Iterable[Option]) -> list[Option]:
    """Return `DENSE`, and the options that pay for some price of work, by falling work.

    These are the corners of the lower convex hull of divergence over saved work. Options that
    save no work are never among them.

    Example:
        >>> slow = Option(LayerSetting("drop_mass", 0.1), 0.02, 0.8)
        >>> fast = Option(LayerSetting("drop_mass", 0.2), 0.02, 0.5)
        >>> efficient_options([slow, fast]) == [DENSE, fast]
        True
    """
    corners = [DENSE]
    for option in sorted(options, key=lambda o: (-o.work, o.divergence)):
        if option.work >= 1:
            continue
        while len(corners) > 1 and _price(corners[-1], option) <= _price(corners[-2], corners[-1]):
            corners.pop()
        if option.work < corners[-1].work:
            corners.append(option)
    return corners


def _price(before: Option, after: Option) -> float:
    """Divergence per saved work; infinite where no work is saved."""
    saved = before.work - after.work
    return (after.divergence - before.divergence) / saved if saved > 0 else math.inf


def combinations(layers: Sequence[Iterable[Option]]) -> list[Combination]:
    """Return combinations from all dense to the least work, one layer's step at a time.

    Steps are taken in the order of their price, divergence per saved work: the combinations
    that a falling Lagrange multiplier passes through. Along the list no layer's work grows.

    Args:
        layers: each layer's options; `DENSE` need not be among them.
    """
    steps = []
    for layer, options in enumerate(layers):
        corners = efficient_options(options)
        highest = -math.inf  # so that rounding cannot reorder a layer's own steps
        for before, after in pairwise(corners):
            highest = max(highest, _price(before, after))
            steps.append((highest, layer, after))
    chosen = [DENSE] * len(layers)
    path: list[Combination] = [tuple(chosen)]
    for _, layer, option in sorted(steps, key=lambda step: step[0]):
        chosen[layer] = option
        path.append(tuple(chosen))
    return path


def summed_divergence(combination: Combination) -> float:
    """Return the sum of the layers' divergences: the estimate for the combination."""
    return math.fsum(option.divergence for option in combination)


def mean_work(combination: Combination) -> float:
    """Return the mean of the layers' work, 1 for all dense."""
    return math.fsum(option.work for option in combination) / len(combination)


def within_budget(path: Sequence[Combination], budget: float) -> int:
    """Return the last index of `path` whose summed divergence is at most `budget`."""
    return max(i for i, c in enumerate(path) if i == 0 or summed_divergence(c) <= budget)


def reaching_speedup(path: Sequence[Combination], speedup: float) -> int:
    """Return the first index of `path` whose work is at most ``1 / speedup``.

    Raises:
        UnreachableError: if none is.
    """
    for index, combination in enumerate(path):
        if mean_work(combination) * speedup <= 1:
            return index
    least = mean_work(path[-1])
    raise UnreachableError(
        f"target speed-up {speedup:g} is out of reach: with every layer at its cheapest "
        f"measured setting the attention work is {least:.3f} of dense, {1 / least:.2f}x"
    )


def back_off(start: int, fits: Callable[[int], bool]) -> int:
    """Return an index up to `start` that fits, near the last that does, by bisection.

    Index 0, all dense, always fits. Where fitting does not end at one index, the result fits
    all the same but need not be the last.

    Args:
        start: where to begin.
        fits: measures whether an index fits; asked once per index at most.
    """
    if start == 0 or fits(start):
        return start
    low, high = 0, start
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
