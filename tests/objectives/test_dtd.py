import numpy as np
import pytest
import torch

from fused_objectives.targets import IGNORED
from tests.builders import CLS, PAD, SEP, VOCABULARY, lay_out, padded, random_samples
from tests.objectives.builders import annotated, ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import detection_sums, labels_of, samples_of, word


def with_gaps(tokens: list[int], sample_id: int, visit: int, rate: float) -> tuple[list[int], list[int]]:
    """Leave out tokens of text at the rate; the one behind a gap has label 1."""
    kept, labels, gap = [], [], False
    for position, token in enumerate(tokens):
        if token not in VOCABULARY.special_ids and word("dtd", position, sample_id, visit) < int(rate * 2**32):
            gap = True
            continue
        kept.append(token)
        labels.append(int(gap))
        gap = False
    return kept, labels


@pytest.mark.parametrize("rate", [0.15, 0.7])
def test_tokens_labels_and_losses_are_those_of_a_loop_over_the_samples(rate):
    model = model_with("dtd", rate=rate)
    rows = rows_of_samples(9)
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=70)
    view = model.objectives["dtd"].corrupt(batch, 0.0)
    originals = [sample.tolist() for row in rows for sample in row]
    identities = zip(originals, batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)
    expected = [with_gaps(tokens, number, visit, rate) for tokens, number, visit in identities]
    samples, labels = zip(*expected, strict=True)
    assert samples_of(view.batch) == list(samples)
    assert labels_of(view.batch, view.labels) == list(labels)
    assert view.tokens.shape == batch.tokens.shape
    assert (view.tokens[~view.batch.real] == PAD).all() and (view.labels[~view.batch.real] == IGNORED).all()
    assert view.tallies["dtd/positives"] == sum(map(sum, labels)) > 5
    assert view.counts["dtd"].tolist() == view.batch.lengths.tolist() == [len(tokens) for tokens in samples]
    sums = model.objectives["dtd"].loss(model, view)["dtd"].sums
    assert sums.tolist() == pytest.approx(detection_sums(model, "dtd_detection", samples, labels), rel=1e-4)


def test_the_edited_batch_knows_its_samples_and_has_no_units():
    batch = annotated(lay_out([random_samples([9, 5]), random_samples([12])], first_row=8))
    edited = model_with("dtd").objectives["dtd"].corrupt(batch, 0.0).batch
    for name in ("sample_ids", "visits", "sample_rows"):
        assert torch.equal(getattr(edited, name), getattr(batch, name))
    assert edited.units == {}


def test_a_gap_at_the_end_of_the_text_is_told_by_the_separator():
    view = model_with("dtd", rate=1.0).objectives["dtd"].corrupt(padded(random_samples([2, 7])), 0.0)
    assert samples_of(view.batch) == [[CLS, SEP], [CLS, SEP]]
    assert labels_of(view.batch, view.labels) == [[0, 0], [0, 1]]


def test_samples_that_lose_all_their_tokens_have_no_loss_and_disturb_no_other():
    """Without special tokens nothing is sure to stay."""
    model = model_with("dtd", rate=0.5)
    samples = [np.array([5 + i]) for i in range(12)] + [np.arange(9, 40), np.arange(50, 52)]
    batch = lay_out([samples[:6], samples[6:]])
    view = model.objectives["dtd"].corrupt(batch, 0.0)
    found, labels = samples_of(view.batch), labels_of(view.batch, view.labels)
    gone = [number for number, tokens in enumerate(found) if not tokens]
    assert 2 <= len(gone) < 12
    total, sums = model.objectives["dtd"].loss(model, view)["dtd"]
    total.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    sums = sums.tolist()
    left = [number for number in range(len(found)) if number not in gone]
    expected = detection_sums(model, "dtd_detection", [found[i] for i in left], [labels[i] for i in left])
    assert [sums[i] for i in left] == pytest.approx(expected, rel=1e-4)
    assert all(sums[i] == 0 for i in gone)
    nothing = model_with("dtd", rate=1.0)
    view = nothing.objectives["dtd"].corrupt(batch, 0.0)
    total, _ = nothing.objectives["dtd"].loss(nothing, view)["dtd"]
    assert total.item() == 0.0 and view.counts["dtd"].sum() == 0
    total.backward()
