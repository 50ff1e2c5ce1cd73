"""Which heads make a layer sensitive, and what it costs with only those dense.

Where a layer tolerates no sparsity it is often for a head or two. So the
costliest layers are measured again with one head at a time sparse, and then with the costliest
heads dense and all others sparse. What those combinations cost are further options to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from token_sparse_attention.calibration.record import (
    HeadSensitivity,
    LayerSetting,
    Sensitivity,
)
from token_sparse_attention.calibration.sensitivity import Measure, layer_row
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.profile import LayerProfile


def costliest_layers(rows: Sequence[Sensitivity], count: int) -> list[int]:
    """Return the layers that cost most where they see most, in order, costliest first.

    Args:
        rows: of `measure_sensitivity`.
        count: how many layers at most; those that cost nothing are not among them.
    """
    best: dict[int, Sensitivity] = {}
    for row in rows:
        before = best.get(row.layer)
        if row.sparse_prompts and (before is None or row.setting.value > before.setting.value):
            best[row.layer] = row
    costs = {layer: row.divergence for layer, row in best.items() if row.divergence > 0}
    return sorted(costs, key=lambda layer: -costs[layer])[:count]


def numbers_of_dense_heads(num_heads: int) -> list[int]:
    """Return how many heads are tried dense: powers of two, up to half of them.

    Example:
        >>> numbers_of_dense_heads(32)
        [1, 2, 4, 8, 16]
    """
    return [1 << power for power in range(num_heads.bit_length()) if 2 << power <= num_heads]


def measure_heads(
    measure_profile: Measure,
    num_heads: int,
    base: SparseConfig,
    rows: Sequence[Sensitivity],
    count: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[HeadSensitivity], list[Sensitivity]]:
    """Measure the costliest layers head by head, and with their costliest heads dense.

    Heads are measured at the middle one of the settings under which their layer ran sparse.

    Args:
        measure_profile: `measure` of the model and its references.
        num_heads: query heads of a layer.
        base: what every layer starts from.
        rows: of `measure_sensitivity` with these.
        count: how many layers.
        on_progress: told what is being done.

    Returns:
        What single heads cost, costliest first, layer by layer; and what the layers cost with
        1, 2, 4, ... of these dense.
    """
    heads: list[HeadSensitivity] = []
    layers: list[Sensitivity] = []

    def row(layer: int, setting: LayerSetting) -> Sensitivity:
        on_progress(f"heads of layer {layer}, {setting}")
        reading = measure_profile(LayerProfile(base, {layer: setting.changes}))
        return layer_row(layer, setting, reading)

    for layer in costliest_layers(rows, count):
        settings = sorted(
            (one.setting for one in rows if one.layer == layer and one.sparse_prompts),
            key=lambda setting: setting.value,
        )
        middle = settings[len(settings) // 2]
        alone = []
        for head in range(num_heads):
            others = tuple(other for other in range(num_heads) if other != head)
            one = row(layer, replace(middle, dense_heads=others))
            alone.append(HeadSensitivity(layer, head, middle, one.divergence, one.standard_error))
        alone.sort(key=lambda one: -one.divergence)
        heads += alone
        for number in numbers_of_dense_heads(num_heads):
            dense = tuple(sorted(one.head for one in alone[:number]))
            layers += [row(layer, replace(one, dense_heads=dense)) for one in settings]
    return heads, layers
