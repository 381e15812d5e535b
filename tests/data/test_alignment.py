"""Tokens and the text they stand for, with the tokenizers' own offsets as oracle."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.data.alignment import Detokenizer, TokenText, numbered_spans, sample_units
from pretrain.data.annotations import NO_UNIT
from pretrain.data.tokenization import train_tokenizer

TEXTS = [
    "The ship left London on 12 March 2021, at 5:30 p.m., with 1,000 barrels (3.14 t each) of oil.",
    "She said, \"Go home!\" and didn't look back; the captain's naïve gull – well-known – flew 漢字 🙂🙂 away.",
    "  Two  spaces,\ttab\nand lines.\n\nNew paragraph: e.g. U.S. trade in 1990–1995, $5 or 30%.",
    "é́ combining, ﬁ ligature, ½ fraction, Ω ohm, 🏴‍☠️ flag; 12/03/2021 2021-03-12T10:00.",
]

MARKS = "the marks ▁ and ## and Ġ are letters as well: ▁a ##b Ġc"


def trained(model, trainer_class, pre_tokenizer, decoder, normalizer=None, **keys):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainer_class(show_progress=False, **keys))
    return tokenizer


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(
        models.BPE(), trainers.BpeTrainer, pre, decoders.ByteLevel(), vocab_size=330, initial_alphabet=alphabet
    )


def sentencepiece_unigram():
    pre, decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never")
    return trained(models.Unigram(), trainers.UnigramTrainer, pre, decoder, vocab_size=200, unk_token="<unk>",
                   special_tokens=["<unk>"])  # fmt: skip


def sentencepiece_bytes():
    """BPE in the manner of Llama: letters of the alphabet, all others as bytes."""
    letters = [*sorted(set("".join(TEXTS)) - set(" 漢字🙂Ω½\n\té🏴‍☠️")), "▁"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece_unigram, sentencepiece_bytes])
def test_tokens_that_hold_all_text_give_it_back_with_the_tokenizers_own_offsets(make):
    tokenizer = make()
    text_of = Detokenizer(tokenizer, ())
    for text in [*TEXTS, "", "a"]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        found = text_of(np.array(encoding.ids, np.uint16))
        if make is byte_level or make is sentencepiece_bytes:
            assert found.text == text
        else:
            assert found.text == text or "\N{REPLACEMENT CHARACTER}" in found.text or "\n" in text
        if found.text == text:
            for (start, end), first, last in zip(encoding.offsets, found.starts, found.ends, strict=True):
                assert text[first:last].strip() == text[start:end].strip()
            assert all(a <= b for a, b in zip(found.starts, found.starts[1:], strict=False))


def test_a_sample_that_begins_within_a_character_keeps_its_places():
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id(letter) for letter in "Ł"] + tokenizer.encode("a 🙂").ids
    ids = np.array([*ids, ids[0]])  # U+0141 stands for the byte 0xA1, which begins no character
    found = Detokenizer(tokenizer, ())(ids)
    assert found.text == "\N{REPLACEMENT CHARACTER}a 🙂\N{REPLACEMENT CHARACTER}"
    assert found.text[found.starts[1] : found.ends[1]] == "a" and found.ends[-1] == len(found.text)


@pytest.mark.parametrize("lowercase", [False, True])
def test_wordpiece_text_is_tokenised_to_the_same_tokens_again(lowercase):
    read = lambda: iter([*TEXTS, *[MARKS] * 9])  # noqa: E731
    backend = train_tokenizer(read, "wordpiece", 250, lowercase, max_length=64).backend_tokenizer
    text_of = Detokenizer(backend, {0, 2, 3, 4})
    generator = random.Random(0)
    texts = [*TEXTS, MARKS] + [" ".join(generator.choices(" ".join(TEXTS[:3]).split(), k=30)) for _ in range(40)]
    for text in texts:
        encoding = backend.encode(text, add_special_tokens=False)
        found = text_of(np.array(encoding.ids))
        for token, start, end in zip(encoding.tokens, found.starts, found.ends, strict=True):
            assert found.text[start:end] == (
                "\N{REPLACEMENT CHARACTER}" if token == "[UNK]" else token.removeprefix("##")
            )
        if "[UNK]" not in encoding.tokens:
            again = backend.encode(found.text, add_special_tokens=False)
            assert again.ids == encoding.ids
            assert again.offsets == list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "The ship left London on 12 March 2021, at 5:30 p.m., with 1,000 barrels (3.14 t each) of oil.",
        "She didn't look: \"Go home!\" he said. The captain's well-known gull flew away.",
        "In 1999, 300 people paid $5 or 30% of it. On 2021-03-12 and 12/03/2021 U.S. trade fell.",
        "In 1990–1995 he, O'Brien, wrote 'so' to the captains' ships.",
    ],
)
def test_english_gets_its_spaces_back(text):
    backend = train_tokenizer(lambda: iter([text] * 9), "wordpiece", 300, False, max_length=64).backend_tokenizer
    found = Detokenizer(backend, ())(np.array(backend.encode(text, add_special_tokens=False).ids))
    assert found.text == text


def test_special_tokens_are_no_text_and_an_unknown_one_is_a_single_character():
    backend = train_tokenizer(lambda: iter(TEXTS), "wordpiece", 250, False, max_length=64).backend_tokenizer
    cls, sep, unknown = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[UNK]"))
    inner = backend.encode("the ship", add_special_tokens=False).ids
    found = Detokenizer(backend, {cls, sep})(np.array([cls, *inner, unknown, sep]))
    assert found.text == "the ship \N{REPLACEMENT CHARACTER}"
    assert found.starts[0] == found.ends[0] and found.starts[-1] == found.ends[-1]


def test_words_alone_are_parted_by_spaces():
    backend = Tokenizer(models.WordLevel({"the": 0, "gull": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Detokenizer(backend, ())(np.array([0, 1, 1, 0])).text == "the gull gull the"
    assert Detokenizer(backend, ())(np.empty(0, np.int64)).text == ""


def test_a_suffix_that_ends_words_parts_them():
    backend = Tokenizer(models.BPE({"th": 0, "e</w>": 1, "gull</w>": 2}, [], end_of_word_suffix="</w>"))
    found = Detokenizer(backend, ())(np.array([0, 1, 2, 2]))
    assert found.text == "the gull gull" and found.starts.tolist() == [0, 2, 4, 9]


def by_loop(found, marks):
    numbers = []
    for start, end in zip(found.starts.tolist(), found.ends.tolist(), strict=True):
        over = [number for number, (a, b, _) in enumerate(marks) if a < end and start < b]
        numbers.append(over[0] if over else -1)
    return numbers


def test_tokens_are_in_the_first_mark_they_overlap():
    generator = np.random.default_rng(0)
    for _ in range(200):
        borders = np.sort(generator.choice(60, 2 * int(generator.integers(0, 9)), replace=False))
        marks = [(int(a), int(b), 0) for a, b in borders.reshape(-1, 2)]
        cuts = np.sort(generator.choice(61, 20))  # some tokens are empty
        found = TokenText("x" * 60, cuts[:-1], cuts[1:])
        assert numbered_spans(found, marks).tolist() == by_loop(found, marks)


def test_a_mark_over_the_border_of_samples_is_a_unit_in_either():
    marks = [(0, 2, 4), (3, 9, 7), (10, 11, 2)]
    found = TokenText("x" * 11, np.arange(11), np.arange(1, 12))
    numbers = numbered_spans(found, marks)
    none = NO_UNIT
    assert sample_units("spans", numbers[:6], marks).tolist() == [0, 0, none, 1, 1, 1]
    assert sample_units("spans", numbers[6:], marks).tolist() == [0, 0, 0, none, 1]
    assert sample_units("classes", numbers[6:], marks).tolist() == [7, 7, 7, none, 2]
    assert sample_units("spans", numbers[:0], marks).tolist() == []
