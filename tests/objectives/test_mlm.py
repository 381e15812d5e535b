import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import UserError
from pretrain.masking.policies import IGNORED
from pretrain.objectives.mlm import target_losses
from tests.builders import lay_out, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "distilbert"])
def test_the_loss_is_that_of_transformers_masked_language_model(family):
    model = model_with("mlm", family, masking={"rate": 0.4})
    objective = model.objectives["mlm"]
    batch = padded(random_samples([9, 31, 17, 24]), row_length=31)
    view = objective.corrupt(batch, 0.0)
    ours = objective.loss(model, view)["mlm"]
    counts = view.counts["mlm"]
    assert counts.sum() > 15
    theirs = model.encoder.pretrained
    theirs.set_attn_implementation("eager")
    positions = {"position_ids": batch.position_ids + model.encoder.first_position}
    loss = theirs(input_ids=view.tokens, attention_mask=batch.real.long(), labels=view.labels, **positions).loss
    assert (ours.sum() / counts.sum()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_targets_are_counted_for_the_sample_they_lie_in():
    model = model_with("mlm", masking={"rate": 0.5})
    rows = rows_of_samples(5)
    batch = numbered(rows, ids_of(rows))
    view = model.objectives["mlm"].corrupt(batch, 0.0)
    for sample, count in enumerate(view.counts["mlm"].tolist()):
        assert count == int(((view.labels != IGNORED) & (batch.segment_ids == sample)).sum())


def test_target_losses_equal_a_loop_and_call_the_head_at_targets_alone():
    batch = lay_out([random_samples([3, 5]), random_samples([4], seed=1)], row_length=9)
    hidden = torch.randn(2, 9, 6)
    labels = torch.full((2, 9), IGNORED)
    for row, column, token in ((0, 1, 4), (0, 4, 0), (0, 6, 10), (1, 2, 3)):
        labels[row, column] = token
    head, seen = torch.nn.Linear(6, 11), []

    def watched(states):
        seen.append(states)
        return head(states)

    sums = target_losses(batch, labels, hidden, watched)
    expected = torch.zeros(3)
    for row, column in (labels != IGNORED).nonzero().tolist():
        loss = F.cross_entropy(head(hidden[row, column]), labels[row, column])
        expected[batch.segment_ids[row, column]] += loss.detach()
    assert torch.allclose(sums, expected, rtol=1e-6)
    assert len(seen) == 1 and torch.equal(seen[0], hidden[labels != IGNORED])


def test_mlm_and_rtd_mask_independently():
    rows = rows_of_samples(5)
    batch = numbered(rows, ids_of(rows))
    labels = [
        model_with(name, masking={"rate": 0.5}).objectives[name].corrupt(batch, 0.0).labels for name in ("mlm", "rtd")
    ]
    assert not torch.equal(*labels)


def test_the_rate_follows_the_run():
    model = model_with("mlm", masking={"rate": {"schedule": "linear", "from": 0.6, "to": 0.1}})
    rows = rows_of_samples(40)
    batch = numbered(rows, ids_of(rows))
    start, end = (model.objectives["mlm"].corrupt(batch, progress).counts["mlm"].sum() for progress in (0.0, 1.0))
    assert start > 4 * end > 0


def test_a_decoder_is_refused():
    with pytest.raises(UserError, match=r"^objectives\.mlm: 'llama' is a decoder"):
        model_with("mlm", "llama")
