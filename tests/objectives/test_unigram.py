from dataclasses import replace

import numpy as np
import torch
from scipy import stats

from pretrain.objectives.unigram import draw_unigram
from tests.builders import VOCABULARY, lay_out, padded, random_samples
from tests.objectives.oracles import COUNTED, unigram


def test_draws_are_those_of_a_loop_over_the_cumulative_shares():
    batch = padded(random_samples([40, 7, 1]), ids=[3, 2**33 + 1, 9], visits=[0, 5, 1])
    drawn = draw_unigram(batch, COUNTED, 1, "some stream")
    for row, column in batch.real.nonzero().tolist():
        identity = int(batch.sample_ids[row]), int(batch.visits[row])
        assert drawn[row, column] == unigram("some stream", column, *identity)


def test_frequent_tokens_are_drawn_in_proportion_and_others_never():
    batch = padded(random_samples([100] * 400))
    drawn = draw_unigram(batch, COUNTED, 1, "s")
    found = np.bincount(drawn.reshape(-1), minlength=VOCABULARY.size)
    shares = COUNTED.tables(torch.device("cpu")).frequencies.numpy()
    assert not found[shares == 0].any() and (shares == 0).sum() > 4
    assert stats.chisquare(found[shares > 0], 40_000 * shares[shares > 0]).pvalue > 1e-4


def test_without_counts_all_text_is_alike():
    batch = padded(random_samples([100] * 200))
    for vocabulary in (VOCABULARY, replace(VOCABULARY, counts=np.zeros(VOCABULARY.size, np.int64))):
        drawn = draw_unigram(batch, vocabulary, 1, "s")
        assert set(drawn.unique().tolist()) == set(VOCABULARY.ordinary_ids.tolist())


def test_the_last_bound_covers_every_word():
    for counts in (np.full(VOCABULARY.size, 1), np.arange(VOCABULARY.size) % 7 == 3, np.arange(VOCABULARY.size) ** 5):
        cumulative = replace(VOCABULARY, counts=counts).tables(torch.device("cpu")).cumulative
        assert cumulative[-1] == 2**32 and (cumulative.diff() >= 0).all()


def test_rows_without_samples_can_be_drawn_for():
    assert draw_unigram(lay_out([[], []], row_length=5), COUNTED, 1, "s").shape == (2, 5)
