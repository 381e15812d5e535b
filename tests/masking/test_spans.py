"""The best spans of a text."""

import numpy as np
import pytest
import torch

from pretrain.data.annotations import NO_UNIT
from pretrain.masking.learning.spans import Borders, Spans, borders, span_scores, top_spans, units_of
from pretrain.masking.policies import words
from pretrain.model.vocabulary import Vocabulary
from tests.builders import CLS, PAD, SEP, VOCABULARY, padded, random_samples

CONTINUING = Vocabulary(
    size=VOCABULARY.size, pad_id=PAD, mask_id=4, special_ids=VOCABULARY.special_ids, continuing_ids=np.arange(90, 170)
)
CPU = torch.device("cpu")


def samples(lengths, seed=0):
    """Random samples; the longer ones have special tokens in the middle."""
    made = random_samples(lengths, seed)
    for sample in made:
        if len(sample) > 8:
            sample[3::7] = SEP
    return made


def brute_force(tokens, start, end, k, max_span):
    """All spans of whole words of one sample, then the best one that overlaps none taken, ``k`` times."""
    ordinary = [token not in CONTINUING.special_ids for token in tokens]
    inner = [
        i > 0 and ordinary[i] and ordinary[i - 1] and tokens[i] in CONTINUING.continuing_ids for i in range(len(tokens))
    ]
    spans = []
    for i in range(len(tokens)):
        for j in range(i, min(i + max_span, len(tokens))):
            begins = ordinary[i] and not inner[i]
            ends = j + 1 == len(tokens) or not inner[j + 1]
            if begins and ends and all(ordinary[i : j + 1]):
                spans.append((-(start[i] + end[j]), i, j))
    chosen = []
    for score, i, j in sorted(spans):
        if len(chosen) < k and all(j < a or i > b for _, a, b in chosen):
            chosen.append((score, i, j))
    return [(i, j) for _, i, j in chosen]


@pytest.mark.parametrize(("k", "max_span"), [(1, 1), (3, 4), (10, 10), (50, 3), (4, 40)])
@pytest.mark.parametrize("ties", [False, True])
def test_top_spans_are_those_of_a_search_over_all_spans(k, max_span, ties):
    made = samples([2, 33, 1, 17, 8, 40, 3, 29], seed=k)
    batch = padded(made)
    generator = torch.Generator().manual_seed(max_span)
    start, end = torch.randn(2, *batch.tokens.shape, generator=generator)
    if ties:
        start, end = start.round(), end.round()
    found = borders(batch.tokens, batch.real, CONTINUING.tables(CPU))
    spans = top_spans(span_scores(start, end, found, max_span), k)
    several = 0
    for row, sample in enumerate(made):
        expected = brute_force(sample.tolist(), start[row].tolist(), end[row].tolist(), k, max_span)
        none = [-1] * (k - len(expected))
        assert spans.first[row].tolist() == [i for i, _ in expected] + none
        assert spans.last[row].tolist() == [j for _, j in expected] + none
        scores = [start[row, i].item() + end[row, j].item() for i, j in expected]
        assert spans.scores[row, : len(expected)].tolist() == pytest.approx(scores, abs=1e-6)
        assert (spans.scores[row, len(expected) :] == -float("inf")).all()
        several += len(expected) > 1
    assert several or k == 1


def test_spans_begin_and_end_where_the_words_of_whole_word_masking_do():
    batch = padded(samples([31, 1, 2, 24, 9]))
    found = borders(batch.tokens, batch.real, CONTINUING.tables(CPU))
    numbers = words(batch, CONTINUING)
    assert torch.equal(found.text, numbers >= 0)
    for row, its in enumerate(numbers.tolist()):
        for place, number in enumerate(its):
            before, after = [*its, -1][place - 1] if place else -1, [*its, -1][place + 1]
            assert bool(found.begins[row, place]) == (number >= 0 and number != before)
            assert bool(found.ends[row, place]) == (number >= 0 and number != after)


def test_what_scores_best_alone_is_taken_first_and_bars_what_overlaps():
    text = torch.ones(1, 5, dtype=torch.bool)
    start, end = torch.tensor([[0.0, 5, 0, 4, 0]]), torch.tensor([[0.0, 0, 5, 0, 3]])
    spans = top_spans(span_scores(start, end, Borders(text, text, text), 3), 9)
    assert list(zip(*(its[0].tolist() for its in spans[:2]), strict=True))[:3] == [(1, 2), (3, 4), (0, 0)]
    assert spans.scores[0, :4].tolist() == [10, 7, 0, -float("inf")]


def test_scores_are_left_as_they_are():
    text = torch.ones(1, 5, dtype=torch.bool)
    scores = span_scores(torch.zeros(1, 5), torch.zeros(1, 5), Borders(text, text, text), 3)
    before = scores.clone()
    top_spans(scores, 3)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_no_tokens_have_no_spans(shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    spans = top_spans(span_scores(nothing.float(), nothing.float(), Borders(nothing, nothing, nothing), 4), 3)
    assert spans.first.shape == (shape[0], 3) and (spans.first == -1).all() and (spans.last == -1).all()
    assert units_of(spans, shape[1]).shape == shape


def test_units_are_numbered_in_the_order_of_the_text():
    first, last = torch.tensor([[6, 0, 3, -1], [-1, -1, -1, -1]]), torch.tensor([[6, 1, 5, -1], [-1, -1, -1, -1]])
    units = units_of(Spans(first, last, torch.zeros(2, 4)), 8)
    assert units.tolist() == [[0, 0, NO_UNIT, 1, 1, 1, 2, NO_UNIT], [NO_UNIT] * 8]
    assert units_of(Spans(torch.tensor([[7, 2]]), torch.tensor([[7, 6]]), torch.zeros(1, 2)), 8).tolist() == [
        [NO_UNIT, NO_UNIT, 0, 0, 0, 0, 0, 1]
    ]


def test_a_sample_of_special_tokens_alone_has_no_span():
    batch = padded([np.array([CLS, SEP]), np.array([CLS])])
    found = borders(batch.tokens, batch.real, CONTINUING.tables(CPU))
    spans = top_spans(span_scores(torch.zeros(2, 2), torch.zeros(2, 2), found, 2), 2)
    assert (spans.first == -1).all() and (units_of(spans, 2) == NO_UNIT).all()
