"""Where a layer's error counts: places by hand, attention against probabilities by hand."""

from __future__ import annotations

import gzip
import json
from functools import partial

import pytest
import torch
from benchmarks.frontier import position_tables
from benchmarks.frontier.observed import attending
from benchmarks.frontier.positions import attention, choose_variants, find_places, look

from integrations.models import LAYERS, make_ids, make_model
from token_sparse_attention import KVSamplingConfig
from token_sparse_attention.integrations.transformers import apply

TEXT = "One special magic uuid for a-b is: c-d. One special magic uuid for e-f is: g-h. Which?"
OFFSETS = torch.tensor([(place, place + 1) for place in range(len(TEXT))])  # tokens are letters


def marked(text, tokens):
    return "".join(letter for letter, token in zip(text, tokens.tolist()) if token)


def test_the_places_are_the_answers_sentences_and_their_parts():
    places = find_places(TEXT, OFFSETS, "niah_multikey_3", ["g-h"])
    found = {name: marked(TEXT, tokens) for name, tokens in places.items()}
    sentence = "special magic uuid for e-f is: g-h."
    assert found == {"sentence": sentence, "name": "e-f", "answer": "g-h"}


def test_chains_have_several_sentences():
    text = "VAR AB = 12 noise. VAR CD = VAR AB noise. VAR EF = 34 noise."
    offsets = torch.tensor([(place, place + 1) for place in range(len(text))])
    places = find_places(text, offsets, "ruler_vt", ["AB", "CD"])
    assert marked(text, places["sentence"]) == "VAR AB = 12VAR CD = VAR AB"
    assert marked(text, places["answer"]) == "ABCD"


def test_answers_without_a_sentence_and_other_tasks_are_refused():
    with pytest.raises(ValueError, match="must stand in sentences"):
        find_places(TEXT, OFFSETS, "niah_multikey_3", ["x-y"])
    with pytest.raises(ValueError, match="one of niah_multikey_3, ruler_vt; got 'ruler_fwe'"):
        find_places(TEXT, OFFSETS, "ruler_fwe", ["g-h"])


def test_variants_take_the_places_and_single_heads():
    places = find_places(TEXT, OFFSETS, "niah_multikey_3", ["g-h"])
    variants = choose_variants(places, 4, every_head=True)
    assert all(sparse.shape == (4, len(TEXT)) for sparse in variants.values())
    assert variants["everywhere"].all()
    assert torch.equal(variants["elsewhere"], ~variants["sentence"])
    heads = [variants[f"head {head}"].any(1).tolist() for head in range(4)]
    assert torch.equal(torch.tensor(heads), torch.eye(4, dtype=torch.bool))
    assert "head 0" not in choose_variants(places, 4, every_head=False)


def test_one_layer_is_sparse_where_it_is_told_to_be():
    model, ids = make_model("Llama"), make_ids(200)
    few = KVSamplingConfig(
        num_probes=4, sliding_window=16, sink_size=0, num_samples=8,
        dense_queries=0, crossover="off", sparse_layers=(1,),
    )  # fmt: skip
    dense = model(ids).logits
    with apply(model, few):
        layer_sparse = model(ids).logits
    assert not torch.allclose(dense, layer_sparse, atol=1e-4)
    heads = model.config.num_attention_heads

    def logits(sparse):
        function = partial(attention, layer=1, sparse=sparse, config=few)
        with attending(function, model):
            return model(ids).logits

    everything = torch.ones(heads, ids.shape[1], dtype=torch.bool)
    torch.testing.assert_close(logits(~everything), dense)
    torch.testing.assert_close(logits(everything), layer_sparse)
    late = everything.clone()
    late[:, :150] = False  # what comes before does not change
    assert torch.allclose(logits(late)[:, :150], dense[:, :150], atol=1e-5)
    assert not torch.allclose(logits(late)[:, 150:], dense[:, 150:], atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_heads_look_at_the_same_token_and_behind_it():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(h, 10, 8, generator=generator) for h in (4, 2))
    ids = torch.tensor([1, 2, 3, 1, 4, 5, 6, 1, 2, 7])
    sentence = torch.tensor([False] * 7 + [True] * 2 + [False])
    found = look(query, key, ids, {"sentence": sentence}, 0.5, window=4)
    assert LAYERS > 1
    for head in range(4):
        expected = dict.fromkeys(found, 0.0)
        for place in (7, 8):
            p = (0.5 * key[head // 2, : place + 1] @ query[head, place]).softmax(0)
            same = [n for n in range(7) if ids[n] == ids[place]]
            near = range(place - 3, 7)
            kinds = {
                "own": range(7, place + 1), "near": near, "far": range(near[0]), "same": same,
                "after": [n + 1 for n in same if n + 1 < 7],
            }  # fmt: skip
            for kind, places in kinds.items():
                expected[kind] += float(p[list(places)].sum()) / 2
        assert {kind: shares[head] for kind, shares in found.items()} == pytest.approx(expected)


def test_tables_are_means_with_standard_errors(tmp_path):
    looks = [{kind: [0.5, 0.25] for kind in ("own", "near", "far", "same", "after")}] * 2
    header = {"model": "m", "samples_sha256": "s", "config": {}, "provenance": {}}
    for number in range(2):
        nats = {"everywhere": 2.0 + number, "elsewhere": 1.5, "head 0": 1.0}
        nats |= {"sentence": 1.0, "name": 1.0, "answer": 0.0}
        layers = {"1": {**nats, "head 1": 4.0}}
        row = {"task": "t", "length": 9, "index": number, "dense": 1.0, "layers": layers}
        with gzip.open(tmp_path / f"{number}.jsonl.gz", "wt") as file:
            file.write(json.dumps(header) + "\n" + json.dumps({**row, "looks": looks}) + "\n")
    rows = position_tables.load_rows(tmp_path)
    table = position_tables.by_place(rows, {"t": "name", "absent": "none"})
    assert table.splitlines()[2:] == [
        "| name | 1 | +1.50 ± 0.50 (2) | +0.00 ± 0.00 (2) | +0.00 ± 0.00 (2) | -1.00 ± 0.00 (2) "
        "| +0.50 ± 0.00 (2) |"
    ]
    heads = position_tables.by_head(rows, "t", "1").splitlines()[2:]
    assert heads[1] == "| 1 | +3.00 ± 0.00 (2) | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |"
    layers = position_tables.by_layer(rows, {"t": "name"}).splitlines()[2:]
    assert layers == ["| 0 | 0.50 | 0.50 |", "| 1 | 0.50 | 0.50 |"]
    (tmp_path / "again.jsonl.gz").write_bytes((tmp_path / "0.jsonl.gz").read_bytes())
    with pytest.raises(ValueError, match="must not have a sample twice"):
        position_tables.load_rows(tmp_path)
    with gzip.open(tmp_path / "again.jsonl.gz", "wt") as file:
        file.write(json.dumps({**header, "model": "other"}) + "\n")
    with pytest.raises(ValueError, match="same model, samples and settings"):
        position_tables.load_rows(tmp_path)
