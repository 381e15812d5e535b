"""Contexts become windows of tokens."""

import random
import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pretrain.data.tokenization import train_tokenizer
from pretrain.masking.learning.answers import Context
from pretrain.masking.learning.windows import WindowMaker, answer_tokens, cuts
from tests.masking.extraction import toy_tokenizer, wordpiece

TEXTS = [
    "In 1815, Ada Lovelace's father — Lord Byron — left England; she never met him again.",
    "The naïve café-owner paid $1,234.50 (about £987) for 3.5 kg of Müller's coffee!",
    "don't stop: U.S. forces re-entered São Paulo at 5:30 p.m.,\n  he said.",
]


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    letters = sorted({*"".join(TEXTS), *"".join(TEXTS).lower(), *"aeiou"} - {" ", "\n"})
    pieces = [*letters, *(f"##{letter}" for letter in letters), "the", "##ver", "left", "##ed"]
    return {
        "cased": wordpiece(pieces),
        "lowercased": wordpiece(pieces, lowercase=True),
        "bytes": train_tokenizer(lambda: iter(TEXTS), "bpe", 300, False, 128),
    }


@pytest.mark.parametrize("kind", ["cased", "lowercased", "bytes"])
def test_answers_fall_on_the_tokens_that_the_tokenizer_itself_gives_their_characters(kind):
    """As transformers' own processing of SQuAD places them: the tokens of an answer's first and last character."""
    tokenizer, rng, placed = tokenizers()[kind], random.Random(3), 0
    for text in TEXTS:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoding["offset_mapping"]).T
        words = [match.span() for match in re.finditer(r"\w+", text)]
        for _ in range(60):
            first = rng.randrange(len(words))
            answer = words[first][0], words[min(first + rng.randrange(4), len(words) - 1)][1]
            last = encoding.char_to_token(answer[1] - 1)
            while last + 1 < len(starts) and encoding.token_to_chars(last) == encoding.token_to_chars(last + 1):
                last += 1  # bytes of one character
            assert answer_tokens(starts, ends, answer) == (encoding.char_to_token(answer[0]), last)
            placed += 1
    assert placed == 180


def test_characters_without_a_token_are_no_answer():
    assert answer_tokens(np.array([0, 4]), np.array([3, 6]), (3, 4)) is None
    assert answer_tokens(np.empty(0, int), np.empty(0, int), (0, 1)) is None


@pytest.mark.parametrize("room", [1, 2, 5, 7])
def test_windows_step_on_by_what_they_do_not_share_until_one_reaches_the_end(room):
    for overlap in range(room):
        for tokens in range(40):
            expected, begin = [], 0
            while tokens:
                expected.append((begin, min(begin + room, tokens)))
                if begin + room >= tokens:
                    break
                begin += room - overlap
            assert cuts(tokens, room, overlap) == expected


def test_each_window_holds_the_answers_that_are_whole_in_it():
    """Against a loop over the words: in this toy every word is one token."""
    tokenizer, rng = toy_tokenizer(), random.Random(5)
    make = WindowMaker(tokenizer, 12, 3)
    contexts, expected, whole, cut = [], [], 0, 0
    for _ in range(30):
        words = [f"w{rng.randrange(40)}" for _ in range(rng.randint(1, 35))]
        offsets = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words) + 1)]
        firsts = [rng.randrange(len(words)) for _ in range(3)]
        marked = sorted({(first, min(first + rng.randrange(8), len(words) - 1)) for first in firsts})
        contexts.append(Context(" ".join(words), tuple((offsets[a], offsets[b + 1] - 1) for a, b in marked)))
        met = set()
        for begin in range(0, len(words), 7):
            part = words[begin : begin + 10]
            inside = [(a - begin + 1, b - begin + 1) for a, b in marked if begin <= a and b < begin + len(part)]
            met |= {(a + begin - 1, b + begin - 1) for a, b in inside}
            if inside:
                expected.append((["[CLS]", *part, "[SEP]"], inside))
            else:
                whole += 1
            if begin + 10 >= len(words):
                break
        cut += len(set(marked) - met)
    windows, left_out = make(contexts)
    assert [(tokenizer.convert_ids_to_tokens(w.tokens), list(w.answers)) for w in windows] == expected
    assert left_out == {"windows without an answer": whole, "answers cut by every window": cut} and cut and whole
    for window in windows:
        for first, last in window.answers:
            assert window.text(first, last) == " ".join(
                tokenizer.convert_ids_to_tokens(window.tokens[first : last + 1])
            )


def test_answers_are_widened_to_whole_words():
    make = WindowMaker(toy_tokenizer(), 20, 0)
    text = "w1 w2xy w3 w4x w5"
    windows, _ = make([Context(text, ((6, 7),)), Context(text, ((5, 12),)), Context(text, ((0, 2),))])
    assert [window.answers for window in windows] == [((2, 4),), ((2, 7),), ((1, 1),)]
    assert [window.text(*window.answers[0]) for window in windows] == ["w2xy", "w2xy w3 w4x", "w1"]


def test_answers_that_cannot_be_learnt_from_are_counted():
    make = WindowMaker(toy_tokenizer(), 7, 2)
    text = "w1 w2 w3 w4 w5 w6 w7 w8"
    answers = ((0, 8), (6, 14), (0, 17), (3, 20), (2, 3))
    windows, left_out = make([Context(text, answers)], longest=4)
    assert [window.answers for window in windows] == [((1, 3), (3, 5))]
    assert left_out["answers of more than 4 tokens"] == 2
    assert left_out["answers that are no tokens of text"] == 1
    windows, left_out = make([Context(text, answers)])
    assert [window.answers for window in windows] == [((1, 3), (3, 5))]
    assert left_out["answers longer than a window"] == 2


def test_contexts_without_tokens_or_answers_give_no_window():
    make = WindowMaker(toy_tokenizer(), 9, 2)
    windows, left_out = make([Context("", ()), Context("w1 w2", ())])
    assert windows == [] and left_out == {"windows without an answer": 1, "answers cut by every window": 0}
    assert make([]) == ([], {})


def test_there_must_be_room_for_text_beside_the_overlap():
    with pytest.raises(ValueError, match="room for 7 tokens of text, overlap of 7"):
        WindowMaker(toy_tokenizer(), 9, 7)
