"""Documents of real code and prose, and what is asked about them."""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from token_sparse_attention.errors import UsageError

LENGTH = 31744
CONTINUED = 256
_KEYS = 12
_OPEN, _CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_NAMES = (
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "islet",
    "jetty",
    "knoll",
    "lagoon",
    "maple",
    "nectar",
    "otter",
    "prairie",
    "quartz",
    "ridge",
    "spruce",
    "tundra",
    "umber",
    "valley",
    "willow",
    "yarrow",
)


def prepare(
    tokenizer: Any, prose: Sequence[Path], count: int, length: int, seed: int
) -> list[dict[str, Any]]:
    """Return the prompts of `count` documents, five in eight of them code.

    Args:
        tokenizer: a fast one, whose chat template is ChatML.
        prose: files of text, read in this order.
        count: documents.
        length: tokens of a prompt.
        seed: of what is drawn.
    """
    of = random.Random(seed)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    of.shuffle(sources)
    code, text = _chunks(sources, length * 5, of), _chunks(prose, length * 5, of)
    made: list[dict[str, Any]] = []
    while len(made) < count:
        is_code = len(made) % 8 % 2 == 0 or len(made) % 8 == 7
        one = _document(tokenizer, next(code if is_code else text), is_code, length, of)
        if one:
            made.append(one)
    return made


def _chunks(files: Iterable[Path], characters: int, of: random.Random) -> Any:
    """Yield runs of whole files with at least so many characters."""
    held: list[str] = []
    for file in files:
        content = file.read_text(encoding="utf-8", errors="replace")
        held.append(content[: characters // 2])
        if sum(map(len, held)) > characters:
            of.shuffle(held)
            yield "\n\n".join(held)
            held = []
    raise UsageError("the files hold too little text for so many documents")


def _document(
    tokenizer: Any, text: str, is_code: bool, length: int, of: random.Random
) -> dict[str, Any] | None:
    lines = text.splitlines()[: length // 4]
    names = of.sample(_NAMES, _KEYS)
    values = {n: str(uuid.UUID(int=of.getrandbits(128), version=4)) for n in names}
    near = sum(len(line) + 1 for line in lines)
    budget, used, end = length * 2.7, 0, len(lines)
    for i, line in enumerate(lines):
        used += len(line) + 1
        if used > min(budget, near):
            end = i
            break
    for i, name in enumerate(names):
        at = int((i + of.random()) / _KEYS * end)
        lines.insert(
            at, f"{'# ' if is_code else ''}The registration key of {name} is {values[name]}."
        )
    body = "\n".join(lines)

    def ids(piece: str) -> list[int]:
        found: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"]
        return found

    coded = tokenizer(_OPEN + body, add_special_tokens=False, return_offsets_mapping=True)
    tokens = coded["input_ids"]
    if len(tokens) < length + CONTINUED:
        return None
    # What is asked lies between a twentieth and nine tenths of the prompt.
    low, high = (coded["offset_mapping"][int(length * f)][0] - len(_OPEN) for f in (0.05, 0.9))
    found = _signature(body[low:high], of) if is_code else _sentence(body[low:high], of)
    asked = [n for n in names if low < body.find(values[n]) < high]
    if found is None or len(asked) < 2:
        return None
    question, answer = found
    first, second = of.sample(asked, 2)
    ask = "What is the registration key of {}? Answer with the key alone."
    opened = ids(f"{_OPEN}First the question, then the text. {question}\n\n")
    return {
        "code": is_code,
        "document": tokens[: length + CONTINUED],
        "opened": opened + tokens[len(ids(_OPEN)) : length],
        "question": ids(f"\n\n{question}{_CLOSE}"),
        "close": ids(_CLOSE),
        "answer": ids(answer),
        "lookup": ids(f"\n\n{ask.format(first)}{_CLOSE}"),
        "key": ids(values[first] + "<|im_end|>"),
        "again": ids(f"\n{_OPEN}{ask.format(second)}{_CLOSE}"),
        "second": ids(values[second] + "<|im_end|>"),
        "text": {"question": question, "answer": answer},
    }


def _signature(text: str, of: random.Random) -> tuple[str, str] | None:
    """Return a question about a function that is defined once, and its signature."""
    found = re.findall(r"^ *(def (\w{5,})\((?:[^()\n]{15,80})\):)", text, re.MULTILINE)
    found = [(line, name) for line, name in found if text.count(f"def {name}(") == 1]
    if not found:
        return None
    line, name = of.choice(found)
    return f"Write the exact `def` line of the function `{name}` from the text.", line


def _sentence(text: str, of: random.Random) -> tuple[str, str] | None:
    """Return a request to go on with a line of the text, and the rest of it."""
    lines = text.splitlines()
    long = [i for i, line in enumerate(lines) if 60 < len(line) < 90 and lines[i + 1 : i + 2]]
    long = [i for i in long if len(lines[i + 1]) > 40 and text.count(lines[i]) == 1]
    if not long:
        return None
    at = of.choice(long)
    return f"Which line follows this one in the text?\n{lines[at].strip()}", lines[at + 1].strip()


def save(prompts: Sequence[dict[str, Any]], path: Path) -> None:
    """Write prompts."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(list(prompts), file)


def load(path: Path) -> list[dict[str, Any]]:
    """Read what `save` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        prompts: list[dict[str, Any]] = json.load(file)
    return prompts
