import pytest
import torch
import torch.nn.functional as F

from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.objectives.base import LabelledView
from pretrain.objectives.losses import vocabulary_loss
from tests.builders import lay_out, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "distilbert"])
def test_the_loss_is_that_of_transformers_masked_language_model(family):
    model = model_with("mlm", family, masking={"rate": 0.4})
    objective = model.objectives["mlm"]
    batch = padded(random_samples([9, 31, 17, 24]), row_length=31)
    view = objective.corrupt(batch, 0.0)
    ours = objective.loss(model, view)["mlm"].sums
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


class WatchedHead(torch.nn.Linear):
    """A head of one layer that remembers what it was called with."""

    def forward(self, hidden, score):
        self.seen = hidden
        return score(hidden, self.weight, self.bias)


def loss_of(labels, hidden, head, capacity=None, weights=None):
    batch = lay_out([random_samples([3, 5]), random_samples([4], seed=1)], row_length=9)
    view = LabelledView(batch, batch.tokens, {}, {}, labels, capacity)
    return vocabulary_loss(head, hidden, view, weights, "torch")


@pytest.fixture
def labels():
    labels = torch.full((2, 9), IGNORED)
    for row, column, token in ((0, 1, 4), (0, 4, 0), (0, 6, 10), (1, 2, 3)):
        labels[row, column] = token
    return labels


def test_losses_equal_a_loop_and_only_targets_meet_the_head(labels):
    hidden = torch.randn(2, 9, 6)
    head = WatchedHead(6, 11)
    weights = torch.tensor([0.5, 0.0, 3.0])
    total, sums = loss_of(labels, hidden, head, weights=weights)
    expected, owners = torch.zeros(3), {(0, 1): 0, (0, 4): 1, (0, 6): 1, (1, 2): 2}
    for (row, column), owner in owners.items():
        logits = F.linear(hidden[row, column], head.weight, head.bias)
        expected[owner] += F.cross_entropy(logits, labels[row, column]).detach()
    assert torch.allclose(sums, expected, rtol=1e-6)
    assert total.item() == pytest.approx(float((weights * expected).sum()), rel=1e-6)
    assert torch.equal(head.seen, hidden[labels != IGNORED])


def test_room_for_more_targets_changes_neither_loss_nor_gradient(labels):
    hidden, head = torch.randn(2, 9, 6, requires_grad=True), WatchedHead(6, 11)
    results = []
    for capacity in (None, 4, 7, 18):
        total, sums = loss_of(labels, hidden, head, capacity)
        results.append((total, sums, *torch.autograd.grad(total, [hidden, *head.parameters()])))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_targets_without_room_make_the_loss_and_every_samples_sum_nan(labels):
    total, sums = loss_of(labels, torch.randn(2, 9, 6), WatchedHead(6, 11), capacity=3)
    assert total.isnan() and sums.isnan().all()


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
