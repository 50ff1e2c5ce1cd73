"""Prompts are real text of the length asked for, and ask for what is there."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from integrations.models import WORDS, make_tokenizer
from token_sparse_attention import bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.fidelity.prompts import SHAPES, PromptMaker, ask_for_line
from token_sparse_attention.records import read_text

LENGTH = 512
CODE, PROSE = (read_text(path) for path in bundled.SAMPLE)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.MODEL)


@pytest.fixture(scope="module")
def maker(tokenizer):
    return PromptMaker(tokenizer, {"code": CODE[:40_000], "prose": PROSE[:40_000]})


@pytest.fixture(scope="module")
def prompts(maker):
    return maker.make(LENGTH, 4, tuple(SHAPES))


def of_shape(prompts, shape):
    """The prompts of a shape, with the shape's part of what follows each."""
    return [(p, part) for p in prompts for part in p.parts if part.shape == shape]


def test_prompts_have_the_length_and_pieces_alternate_between_texts(prompts):
    assert {len(prompt.ids) for prompt in prompts} == {LENGTH}
    assert [(p.index, p.source) for p in prompts[::4]] == [
        *((0, "code"), (1, "prose"), (2, "code"), (3, "prose"))
    ]
    for shape in SHAPES:
        assert [prompt.index for prompt, _ in of_shape(prompts, shape)] == [0, 1, 2, 3]


def test_the_text_goes_on(tokenizer, prompts):
    for prompt, part in of_shape(prompts, "continue"):
        text = CODE if prompt.source == "code" else PROSE
        assert tokenizer.decode(prompt.ids + prompt.follow) in text
        assert (part.begin, part.end) == (0, 256) == (0, len(prompt.follow))


def test_the_question_stands_last_or_first_and_its_answer_in_the_text(tokenizer, prompts):
    last, first = of_shape(prompts, "recall"), of_shape(prompts, "recall-first")
    for (asked_last, part), (asked_first, other) in zip(last, first):
        text, swapped = tokenizer.decode(asked_last.ids), tokenizer.decode(asked_first.ids)
        answer = tokenizer.decode(asked_last.follow[part.begin : part.end])
        assert asked_first.follow == asked_last.follow
        assert part[1:] == other[1:] == (0, len(asked_last.follow))
        assert answer in text.partition("\n\nQuestion: ")[0]
        question = text.partition("\n\nQuestion: ")[2].removesuffix("\nAnswer:\n")
        assert swapped.startswith(f"Question about the text below: {question}\n\n")
        assert swapped.endswith("\n\nAnswer to the question:\n")
        assert answer in swapped
        assert question not in swapped.partition("\n\n")[2]


def test_a_second_key_is_asked_for_on_the_cache(tokenizer, prompts):
    firsts, seconds = of_shape(prompts, "lookup"), of_shape(prompts, "second-turn")
    for (prompt, first), (same, second) in zip(firsts, seconds):
        assert prompt is same
        text, follow = tokenizer.decode(prompt.ids), prompt.follow
        one = tokenizer.decode(follow[first.begin : first.end]).strip()
        two = tokenizer.decode(follow[second.begin : second.end]).strip()
        between = tokenizer.decode(follow[first.end : second.begin])
        assert one != two
        assert first.begin == 0
        assert second.end == len(follow)
        for key, asked in ((one, text), (two, between)):
            name = asked.rsplit("The registration key of ", 1)[1].removesuffix(" is")
            assert text.count(f"The registration key of {name} is {key}.") == 1
            assert f"Question: What is the registration key of {name}?" in asked


def test_a_seed_gives_the_same_prompts_and_another_asks_for_others(tokenizer, maker, prompts):
    texts = {"code": CODE[:40_000], "prose": PROSE[:40_000]}
    assert maker.make(LENGTH, 4, tuple(SHAPES)) == prompts
    others = PromptMaker(tokenizer, texts, seed=1).make(LENGTH, 4, tuple(SHAPES))
    assert of_shape(others, "continue") == of_shape(prompts, "continue")
    assert of_shape(others, "lookup") != of_shape(prompts, "lookup")


def test_only_the_shapes_that_are_asked_for_are_made(maker):
    (prompt,) = maker.make(LENGTH, 1, ["second-turn"])
    assert [part.shape for part in prompt.parts] == ["second-turn"]
    (prompt,) = maker.make(LENGTH, 1, ["lookup"])
    assert prompt.parts[0].end == len(prompt.follow)


def test_short_texts_are_joined_and_too_little_is_refused(tokenizer):
    parts = {f"part {number}": PROSE[number * 1500 :][:1500] for number in range(8)}
    maker = PromptMaker(tokenizer, parts)
    assert {p.source for p in maker.make(LENGTH, 1, ["continue"])} == {"part 0 ..."}
    with pytest.raises(UsageError, match="--text must hold at least 9,351 tokens"):
        maker.make(8500, 1, ["continue"])


def test_text_in_which_nothing_stands_once_is_refused(tokenizer):
    maker = PromptMaker(tokenizer, {"same": "The same line again and again.\n" * 900})
    for shape in ("recall", "recall-first"):
        with pytest.raises(UsageError, match="leave out recall and recall-first of --shapes"):
            maker.make(LENGTH, 1, [shape])


@pytest.mark.parametrize("begin", [False, True])
def test_a_token_that_begins_texts_begins_prompts(begin):
    tokenizer = make_tokenizer(begin=begin)
    tokenizer.bos_token = "<s>"
    (prompt,) = PromptMaker(tokenizer, {"words": " ".join(WORDS * 9)}).make(300, 1, ["continue"])
    assert (prompt.ids[0] == tokenizer.bos_token_id) == begin
    assert len(prompt.ids) == 300
    assert prompt.follow[0] == prompt.ids[-1] + 1, "the next word"


def test_a_line_is_asked_for_only_if_it_has_one_answer():
    draw = random.Random(0)
    code = (
        "x = 1\ndef first_one(alpha, beta):\n    pass\n\ndef other_one(gamma, delta):\n    pass\n"
    )
    assert ask_for_line(code, code + " other_one(1)", draw) == (
        "Which line of the text defines `first_one`?", "def first_one(alpha, beta):"
    )  # fmt: skip
    lines = ["the begin", "a line that is there twice, really", "after the first of the two",
             "a line that is there once, really", "what follows it", "the end"]  # fmt: skip
    span = "\n\n".join(lines)
    question, answer = ask_for_line(span, f"{span}\n{lines[1]}\n{lines[2]}", draw)
    assert (question.splitlines()[1], answer) == (lines[3], lines[4])
