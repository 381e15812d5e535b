import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from pretrain.data.labelled import encode, pair_border
from pretrain.data.tasks import Split
from tests.builders import CLS, PAD, SEP, word_tokenizer

FIRST = ["w9 w8 w7 w6 w5", "", "w20", "w30 w31 w32"]
SECOND = ["w40 w41 w42", "w50", "", "w60 w61 w62 w63 w64 w65"]
LABELS = [2, 0, 1, 1]


def tokenizer_with(single: str, pair: str):
    tokenizer = word_tokenizer()
    special = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return tokenizer


BERT = tokenizer_with("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
ROBERTA = tokenizer_with("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]")
ONE_SIDED = tokenizer_with("[CLS] $A", "[CLS] $A [CLS] $B")
BARE = tokenizer_with("$A", "$A $B")


def samples_of(encoded) -> list[list[int]]:
    return [
        encoded.tokens[start : start + length].tolist()
        for start, length in zip(encoded.offsets, encoded.lengths, strict=True)
    ]


@pytest.mark.parametrize("tokenizer", [BERT, ROBERTA])
@pytest.mark.parametrize("pairs", [None, SECOND])
def test_samples_are_what_the_tokenizer_makes_of_them(tokenizer, pairs):
    encoded = encode(Split(FIRST, pairs, LABELS), tokenizer, 64, PAD, regression=False)
    expected = tokenizer(FIRST, pairs)["input_ids"]
    assert samples_of(encoded) == expected
    assert (encoded.longest, encoded.cut, len(encoded)) == (max(map(len, expected)), 0, 4)
    assert encoded.labels.tolist() == LABELS and encoded.labels.dtype == torch.int64


@pytest.mark.parametrize("limit", [8, 9, 10])
@pytest.mark.parametrize("tokenizer", [BERT, ROBERTA])
@pytest.mark.parametrize("pairs", [None, SECOND])
def test_long_samples_are_cut_as_transformers_cuts_them_and_counted(tokenizer, pairs, limit):
    first = [*FIRST, "w70 w71 w72 w73 w74 w75 w76 w77 w78 w79 w80"]
    pairs = None if pairs is None else [*pairs, "w90 w91 w92 w93 w94 w95 w96 w97 w98 w99 w100"]
    first, pairs = [*first, "w5 w6 w7 w8 w9 w10"], None if pairs is None else [*pairs, "w90 w91 w92 w93 w94"]
    encoded = encode(Split(first, pairs, [*LABELS, 0, 2]), tokenizer, limit, PAD, regression=False)
    theirs = tokenizer(first, pairs, truncation=True, max_length=limit)["input_ids"]
    assert samples_of(encoded) == theirs
    assert encoded.cut == sum(len(sample) > limit for sample in tokenizer(first, pairs)["input_ids"]) >= 1


def test_a_tokenizer_that_frames_nothing_gets_the_frame_that_a_store_has():
    encoded = encode(Split(FIRST, SECOND, LABELS), BARE, 64, PAD, regression=False)
    assert samples_of(encoded)[0] == [CLS, 9, 8, 7, 6, 5, SEP, 40, 41, 42, SEP]
    assert pair_border(BARE) == [SEP]
    assert pair_border(ROBERTA) == [SEP, SEP]
    assert pair_border(ONE_SIDED) == [CLS]


def test_an_empty_text_without_special_tokens_is_one_place_of_padding():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.cls_token = tokenizer.sep_token = None
    encoded = encode(Split(["w7 w8", ""], None, [0.5, 1.5]), tokenizer, 64, PAD, regression=True)
    assert samples_of(encoded) == [[7, 8], [PAD]]
    assert encoded.labels.dtype == torch.float32


def test_laid_out_samples_stand_at_the_start_of_a_row_each():
    encoded = encode(Split(FIRST, None, LABELS), BERT, 64, PAD, regression=False)
    expected = samples_of(encoded)
    batch = encoded.lay_out(torch.tensor([3, 0, 3]), torch.tensor([7, 8, 9]), 9, PAD)
    for row, index in enumerate([3, 0, 3]):
        length = len(expected[index])
        assert batch.tokens[row].tolist() == expected[index] + [PAD] * (9 - length)
        assert batch.segment_ids[row].tolist() == [row] * length + [-1] * (9 - length)
        assert batch.position_ids[row].tolist() == [*range(length)] + [0] * (9 - length)
        assert batch.lengths[row] == length
    assert (batch.sample_ids.tolist(), batch.visits.tolist()) == ([3, 0, 3], [0, 0, 0])
    assert batch.sample_rows.tolist() == [7, 8, 9]
    assert batch.tokens.dtype == torch.int64
    assert encoded.lay_out(torch.tensor([], dtype=torch.int64), torch.tensor([]), 9, PAD).tokens.shape == (0, 9)


def test_the_fingerprint_tells_other_texts_and_other_labels():
    def of(texts, labels):
        return encode(Split(texts, None, labels), BERT, 64, PAD, regression=False).fingerprint

    same = [of(FIRST, LABELS), of(list(FIRST), list(LABELS))]
    assert same[0] == same[1]
    others = {of(["w9 w8", *FIRST[1:]], LABELS), of(FIRST, [2, 0, 1, 0]), of(FIRST[::-1], LABELS)}
    assert len(others | {same[0]}) == 4
    assert np.unique([len(x) for x in others]).tolist() == [64]
