"""Text infilling: every span is one mask token in the source, and the target is the sample itself."""

import numpy as np
import pytest
import torch

from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import CLS, MASK, PAIRED_VOCABULARY, SEP, VOCABULARY, padded, random_samples
from tests.objectives.builders import ids_of, numbered, rows_of_samples
from tests.objectives.test_span_corruption import runs_of, vocabulary_with


def objective(vocabulary=PAIRED_VOCABULARY, **keys):
    return build_objectives(parse_objectives({"denoise": keys}, "test"), vocabulary, seed=1)["denoise"]


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0])
def test_every_run_of_chosen_tokens_becomes_one_mask_and_the_target_is_the_sample(rate):
    rows = [*rows_of_samples(9), random_samples([50, 61]), []]
    batch = numbered(rows, ids_of(rows), row_length=113)
    made = objective(masking={"rate": rate})
    chosen = made.chooser.choose(batch, 0.0).chosen
    view = made.corrupt(batch, 0.0)
    hidden = 0
    for number, sample in enumerate(sample for row in rows for sample in row):
        source = sample.tolist()
        for start, end in reversed(runs_of(chosen[batch.segment_ids == number].tolist())):
            source[start:end] = [MASK]
            hidden += 1
        assert view.tokens[number][view.real[number]].tolist() == source
        has_text = not np.isin(sample, VOCABULARY.special_ids).all()
        target = sample.tolist() if has_text else []
        assert view.labels[number, : len(target)].tolist() == target
        assert (view.labels[number, len(target) :] == IGNORED).all()
        assert view.counts["denoise"][number] == len(target)
    assert hidden > 5 and not view.tallies


def test_as_much_is_hidden_as_in_the_paper_in_spans_of_three_tokens():
    text = [np.random.default_rng(row).choice(VOCABULARY.ordinary_ids, 500) for row in range(300)]
    batch = padded(text)
    chosen = objective().chooser.choose(batch, 0.0).chosen.numpy()
    runs = sum(len(runs_of(row)) for row in chosen.tolist())
    assert chosen.mean() == pytest.approx(0.3, abs=4 * chosen.mean(1).std() / np.sqrt(300))
    assert chosen.sum() / runs == pytest.approx(3.0, rel=0.02)


def test_a_sample_wholly_hidden_is_one_mask_between_its_special_tokens():
    batch = padded(random_samples([20, 2]))
    view = objective(masking={"rate": 1.0}).corrupt(batch, 0.0)
    assert view.tokens[0][view.real[0]].tolist() == [CLS, MASK, SEP]
    assert view.tokens[1][view.real[1]].tolist() == [CLS, SEP]
    assert view.counts["denoise"].tolist() == [20, 0]


def test_hiding_more_of_a_sample_leaves_its_target_as_it_is():
    rows = rows_of_samples(6)
    batch = numbered(rows, ids_of(rows))
    little, much = (objective(masking={"rate": rate}).corrupt(batch, 0.0) for rate in (0.05, 0.9))
    assert torch.equal(little.labels, much.labels)
    assert little.real.sum() > 2 * much.real.sum()


def test_a_tokenizer_without_a_mask_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"^objectives\.denoise: .*no mask token; .*span_corruption") as error:
        objective(vocabulary_with(mask_id=None))
    assert "\n" not in str(error.value)


def test_sentinels_are_not_needed():
    assert objective(vocabulary_with(sentinel_ids=np.array([], np.int64))).corrupt(padded([]), 0.0) is not None
