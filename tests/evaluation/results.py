"""Results made up for the tests."""

from __future__ import annotations

import dataclasses

from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.evaluation.record import EvalHeader, EvalResults, SampleResult

HEADER = EvalHeader(
    provenance={"device": "a device", "versions": {"torch": "2"}, "commit": "abc"},
    arguments={"model": "bundled", "seed": 0},
    model={"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    configurations={"dense": None, "sparse": TokenSelectionConfig().to_dict()},
    tasks={"recall": 1.0, "count": 1.0},
)
DENSE = SampleResult("recall", 100, 0, "dense", 1.0, "seven", 100, None, 2, 0.5)
SPARSE = dataclasses.replace(DENSE, configuration="sparse", kept=[50, None], seconds=0.25)


def results(*samples: SampleResult) -> EvalResults:
    return EvalResults(HEADER, samples)


def pair(dense: float | None, sparse: float | None, **changes) -> list[SampleResult]:
    """A dense and a sparse result of the same sample."""
    return [
        dataclasses.replace(DENSE, score=dense, **changes),
        dataclasses.replace(SPARSE, score=sparse, **changes),
    ]
