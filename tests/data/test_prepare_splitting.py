"""Where texts and samples are cut."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pretrain.data.splitting import SENTENCE_END, cut_text, cut_tokens

PROSE = (
    'The ship left at dawn. "Where to?" asked the mate! Nobody knew; not even Dr. smith, e.g. the doctor…\n'
    "A longer sentence without any mark at all goes on and on and on and on until it is longer than a sample can be "
    "and then still some words more, for good measure.\n\n"
    "漢字の文です。もう一つの文です。\tAVeryLongWordWithoutAnyBorderInItAtAllThatMustBeCutSomewhereHardIndeedYes "
    "end. Short. One. Two. 🙂🙂🙂 Done?"
)


def words_tokenizer():
    """One token for each letter that is not white space, words split at white space."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted(set(PROSE) - set(" \n\t"))
    vocabulary = {"[UNK]": 0}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
        vocabulary[f"##{letter}"] = len(vocabulary)
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    return tokenizer


def bytes_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


@pytest.fixture(params=[words_tokenizer, bytes_tokenizer])
def tokenizer(request):
    return request.param()


def test_parts_of_a_text_are_bounded_and_joined_are_the_text():
    generator = random.Random(0)
    for size in (2, 3, 7, 64):
        for _ in range(50):
            text = "".join(generator.choices("ab \n🙂", k=generator.randrange(200)))
            parts = list(cut_text(text, size))
            assert "".join(parts) == text and all(len(part) <= size for part in parts)
    assert list(cut_text("", 5)) == [""]


def test_parts_end_after_a_line_or_a_word_where_there_is_one():
    assert list(cut_text("one two three four", 10)) == ["one two ", "three four"]
    assert list(cut_text("one two\nthree four", 10)) == ["one two\n", "three four"]


@pytest.mark.parametrize(("capacity", "minimum"), [(2, 1), (5, 2), (13, 6), (31, 8), (126, 8), (10_000, 8)])
def test_spans_cover_all_tokens_in_order_within_their_bounds(tokenizer, capacity, minimum):
    generator = random.Random(1)
    texts = [PROSE, PROSE * 3, "x" * 500, " ".join(PROSE) * 2]
    texts += ["".join(generator.choices(PROSE, k=generator.randrange(600))).strip() or "a" for _ in range(30)]
    for text in texts:
        encoding = tokenizer.encode(text)
        spans = cut_tokens(text, encoding, capacity, minimum)
        if len(encoding) < minimum:
            assert spans == []
            continue
        assert [i for start, end in spans for i in range(start, end)] == list(range(len(encoding)))
        assert all(minimum <= end - start <= capacity for start, end in spans)


def test_a_text_of_fewer_tokens_than_the_minimum_has_no_span_and_one_of_as_many_has_one(tokenizer):
    text = "abcde fgh".replace(" ", "")[:8]
    encoding = tokenizer.encode(text)
    count = len(encoding)
    assert cut_tokens(text, encoding, 100, count + 1) == []
    assert cut_tokens(text, encoding, 100, count) == [(0, count)]


def begins(text, encoding, spans):
    """The text of each span, without white space around it."""
    ends = [encoding.token_to_chars(start)[0] for start, _ in spans] + [len(text)]
    return [text[a:b].strip() for a, b in pairwise(ends)]


def test_samples_are_filled_with_whole_sentences_as_far_as_they_fit(tokenizer):
    text = "Aa bb. Cc dd ee. Ff gg hh ii jj kk. Ll mm nn oo pp qq rr ss. Tt uu."
    per_letter = tokenizer.encode("Aa bb. Cc dd ee. Ff gg hh ii jj kk.")
    capacity = len(per_letter)
    encoding = tokenizer.encode(text)
    cut = begins(text, encoding, cut_tokens(text, encoding, capacity, 2))
    assert cut == ["Aa bb. Cc dd ee. Ff gg hh ii jj kk.", "Ll mm nn oo pp qq rr ss. Tt uu."]
    cut = begins(text, encoding, cut_tokens(text, encoding, capacity - 1, 2))
    assert cut[:2] == ["Aa bb. Cc dd ee.", "Ff gg hh ii jj kk."]


def test_a_sentence_longer_than_a_sample_is_cut_between_words(tokenizer):
    text = "aa bb cc dd ee ff gg hh ii jj kk ll mm nn oo pp qq rr ss tt"
    encoding = tokenizer.encode(text)
    parts = begins(text, encoding, cut_tokens(text, encoding, 11, 2))
    assert len(parts) > 3 and " ".join(parts) == text


def test_a_trailing_fragment_shares_with_the_sample_before_it(tokenizer):
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(40)) + " q"
    encoding = tokenizer.encode(text)
    spans = cut_tokens(text, encoding, 20, 8)
    assert spans[-1][1] - spans[-1][0] >= 8


def test_a_character_of_several_byte_tokens_is_not_cut():
    tokenizer = bytes_tokenizer()
    text = "🌍" * 40
    encoding = tokenizer.encode(text)
    each = len(encoding) // 40
    assert each > 1
    for capacity in (5, 6, 7):
        assert all(start % each == 0 for start, _ in cut_tokens(text, encoding, capacity, 1))


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("One. Two", [4]),
        ("e.g. this", []),
        ('He said "no." Then', [13]),
        ("漢字。次", [3]),
        ("a\nb", []),
        ("a\n\nb", [3]),
        ("3.14 is Pi", []),
        ("", []),
    ],
)
def test_sentence_ends(text, ends):
    assert [match.end() for match in SENTENCE_END.finditer(text)] == ends
