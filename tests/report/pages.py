"""Inputs made up for the tests, with texts that would do harm if they were not escaped."""

from __future__ import annotations

import base64
import dataclasses
from html.parser import HTMLParser

from evaluation.results import DENSE, HEADER, SPARSE
from studies.synthetic import op_result
from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.evaluation.record import EvalResults
from token_sparse_attention.report.kept_text import KeptLayer, KeptText
from token_sparse_attention.report.load import Inputs

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert('&')\">"
TOKENS = (
    "One",
    " <b>two</b>",
    " three",
    HOSTILE,
    "\u2028four",
    " five\n",
    " six",
    "",
    " nine",
    ".",
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


def bitmap(kept: set[int], count: int = len(TOKENS)) -> str:
    number = sum(1 << i for i in kept)
    return base64.b64encode(number.to_bytes(-(-count // 8), "little")).decode()


HEADS = ({0, 1, 2, 9}, {2, 3, 8, 9})
KEPT = KeptText(
    provenance=HEADER.provenance,
    arguments={"model": HOSTILE, "question": HOSTILE, "config_source": "default"},
    tokens=TOKENS,
    reply=HOSTILE,
    layers=(
        KeptLayer((), "too short & dense"),
        KeptLayer(tuple(map(bitmap, HEADS)), None),
        KeptLayer((bitmap({9}), bitmap(set(range(10)))), None, beyond_window=True),
    ),
)


def evaluation(name: str = HOSTILE) -> EvalResults:
    """Two lengths; at the longer one the sparse configuration, called `name`, loses."""
    configurations = {"dense": None, name: TokenSelectionConfig().to_dict()}
    samples = []
    for length, scores in ((100, (1, 1)), (2048, (0, 1))):
        for index, score in enumerate(scores):
            where = {"length": length, "prompt_tokens": length, "index": index}
            kept = [[length // 2] * 3 + [length // 4], None]
            sparse = {"configuration": name, "kept": kept, "score": float(score)}
            samples += [
                dataclasses.replace(DENSE, **where),
                dataclasses.replace(SPARSE, **where, **sparse),
            ]
    return EvalResults(dataclasses.replace(HEADER, configurations=configurations), tuple(samples))


def all_inputs() -> Inputs:
    return Inputs(
        evaluations=(("an & evaluation", evaluation()),),
        captures=(("kept", KEPT),),
        runs=(Run("<i>op</i>", op_result()),),
    )


def inputs_of(text: str) -> Inputs:
    """Inputs with `text` wherever a result file may hold any."""
    provenance = {"device": text, "versions": {text: text}, "commit": text}
    results = evaluation(name=text)
    header = dataclasses.replace(
        results.header,
        provenance=provenance,
        arguments={"model": text},
        tasks={text: 1.0},
    )
    samples = (dataclasses.replace(s, task=text, reply=text) for s in results.samples)
    kept = KeptText(
        provenance=provenance,
        arguments={"model": text, "question": text, "config_source": text},
        tokens=(text,) * 10,
        reply=text,
        layers=(KeptLayer((), text), *KEPT.layers[1:]),
    )
    result = op_result()
    records = (dataclasses.replace(r, dtype=text, note=text) for r in result.records)
    run = dataclasses.replace(
        result, provenance=provenance, arguments={"command": text}, records=tuple(records)
    )
    return Inputs(
        evaluations=((text, EvalResults(header, tuple(samples))),),
        captures=((text, kept),),
        runs=(Run(text, run),),
    )


class Page(HTMLParser):
    """A parsed page: its elements in order, each with attributes and the text inside it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {[name for name, *_ in self._open]}"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        name, *_ = self._open.pop()
        assert name == tag, f"<{name}> is closed by </{tag}>"

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """Return attributes and text of every such element."""
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]


def texts(page: Page, tag: str) -> list[str]:
    return [text for _, text in page.find(tag)]
