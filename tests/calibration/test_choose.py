"""Choosing settings: budgets kept, targets reached, and nothing cheaper left on the table."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from token_sparse_attention.calibration.choose import (
    DENSE,
    Option,
    UnreachableError,
    back_off,
    combinations,
    efficient_options,
    mean_work,
    reaching_speedup,
    summed_divergence,
    within_budget,
)
from token_sparse_attention.calibration.record import LayerSetting

options = st.builds(
    Option,
    st.builds(LayerSetting, st.just("drop_mass"), st.floats(0.01, 0.9)),
    st.one_of(st.just(0.0), st.floats(1e-6, 5)),
    st.one_of(st.just(1.0), st.floats(0.05, 1)),
)
layer_options = st.lists(st.lists(options, max_size=4), min_size=1, max_size=4)


@given(layer_options)
def test_a_path_goes_from_dense_to_least_work_by_one_layer_at_a_time(layers):
    path = combinations(layers)
    assert path[0] == (DENSE,) * len(layers)
    for before, after in itertools.pairwise(path):
        changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new]
        assert len(changed) == 1
        old, new = before[changed[0]], after[changed[0]]
        assert new in layers[changed[0]]
        assert new.work < old.work
        assert new.divergence >= old.divergence
    least = [min([1.0, *(o.work for o in own)]) for own in layers]
    assert [option.work for option in path[-1]] == least


@given(layer_options)
@example([[], [Option(LayerSetting("drop_mass", 0.5), 1.0, math.nextafter(1.0, 0.0))]])
def test_no_other_combination_is_better_than_one_on_the_path(layers):
    def work(combination):
        return sum(Fraction(option.work) for option in combination)  # a rounded sum would tie

    everything = list(itertools.product(*([DENSE, *own] for own in layers)))
    for chosen in combinations(layers):
        as_fast = [other for other in everything if work(other) <= work(chosen)]
        best = min(summed_divergence(other) for other in as_fast)
        assert summed_divergence(chosen) <= best + 1e-7


@given(layer_options, st.floats(0, 20), st.floats(0, 20))
def test_budgets_are_kept_and_more_of_it_never_costs_work(layers, one, other):
    path = combinations(layers)
    small, large = (path[within_budget(path, budget)] for budget in sorted((one, other)))
    assert summed_divergence(small) <= min(one, other)
    assert summed_divergence(large) <= max(one, other)
    assert mean_work(large) <= mean_work(small)


@given(layer_options)
def test_what_costs_nothing_is_taken_without_a_budget(layers):
    path = combinations(layers)
    free = path[within_budget(path, 0.0)]
    for chosen, own in zip(free, layers):
        assert chosen.work <= min([1.0, *(o.work for o in own if o.divergence == 0)])


@given(layer_options, st.floats(1, 12))
def test_targets_are_reached_at_the_first_place_or_named(layers, speedup):
    path = combinations(layers)
    if mean_work(path[-1]) * speedup > 1:
        with pytest.raises(UnreachableError, match="out of reach"):
            reaching_speedup(path, speedup)
        return
    index = reaching_speedup(path, speedup)
    assert mean_work(path[index]) * speedup <= 1
    assert index == 0 or mean_work(path[index - 1]) * speedup > 1


def test_options_that_save_nothing_or_cost_more_are_left_out():
    bad = samples(9, 0.5, 0.9)  # dearer than what lies between dense and the next
    good, cheap = samples(5, 0.2, 0.5), samples(4, 1.0, 0.4)
    assert efficient_options([cheap, samples(20, 0.0, 1.0), bad, good]) == [DENSE, good, cheap]


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_divergences_the_cheapest_is_taken(order):
    many, few, fewest = samples(64, 0.01, 0.9), samples(16, 0.01, 0.6), samples(0, 0.02, 0.1)
    harmless = [samples(64, 0.0, 0.9), samples(16, 0.0, 0.6)]
    path = combinations([[many, few][::order], harmless[::order], [many, few, fewest][::order]])
    taken = {option for combination in path for option in combination}
    assert taken == {DENSE, few, harmless[1], fewest}, "0 samples are not dense"


def samples(count, divergence, work):
    return Option(LayerSetting("num_samples", count), divergence, work)


@given(st.integers(0, 60), st.integers(0, 60))
def test_backing_off_finds_the_last_that_fits_with_few_measurements(start, last):
    asked = []

    def fits(index):
        asked.append(index)
        return index <= last

    assert back_off(start, fits) == min(start, last)
    assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(start + 1))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_backing_off_only_returns_what_was_measured_to_fit(fitting):
    index = back_off(len(fitting) - 1, lambda i: fitting[i])
    assert index == 0 or fitting[index]
