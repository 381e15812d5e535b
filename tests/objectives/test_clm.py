import pytest
import torch

from fused_objectives.targets import IGNORED
from tests.builders import lay_out, random_samples
from tests.objectives.builders import model_with


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers_decoder_on_each_sample_alone(family):
    model = model_with("clm", family)
    samples = random_samples([9, 31, 1, 2, 24])
    view = model.objectives["clm"].corrupt(lay_out([samples[:2], samples[2:]], row_length=50), 0.0)
    sums = model.objectives["clm"].loss(model, view)["clm"].sums
    assert view.counts["clm"].tolist() == [8, 30, 0, 1, 23]
    assert sums[2] == 0.0
    theirs = model.encoder.pretrained
    theirs.set_attn_implementation("eager")
    for number in (0, 1, 3, 4):
        tokens = torch.from_numpy(samples[number])[None]
        loss = theirs(input_ids=tokens, labels=tokens).loss
        assert (sums[number] / view.counts["clm"][number]).item() == pytest.approx(loss.item(), rel=1e-4)


def test_every_token_but_a_samples_first_is_a_target_at_the_place_before_it():
    samples = random_samples([3, 1, 4])
    batch = lay_out([samples[:2], samples[2:]], row_length=6)
    view = model_with("clm", "llama").objectives["clm"].corrupt(batch, 0.0)
    a, b = samples[0], samples[2]
    none = IGNORED
    assert view.labels.tolist() == [
        [a[1], a[2], none, none, none, none],
        [b[1], b[2], b[3], none, none, none],
    ]
    assert torch.equal(view.tokens, batch.tokens)
    assert view.counts["clm"].tolist() == [2, 0, 3]


@torch.no_grad()
def test_on_an_encoder_no_target_sees_itself():
    """Changing the last token of a sample changes the loss of that token alone."""
    model = model_with("clm", "bert")
    objective = model.objectives["clm"]
    sample = random_samples([12])[0]
    changed = sample.copy()
    changed[-1] = 50
    whole, apart = [], []
    for tokens in (sample, changed):
        view = objective.corrupt(lay_out([[tokens]]), 0.0)
        whole.append(objective.loss(model, view)["clm"].sums.item())
        view.labels[0, -2] = IGNORED
        apart.append(objective.loss(model, view)["clm"].sums.item())
    assert whole[0] != whole[1]
    assert apart[0] == pytest.approx(apart[1], rel=1e-6)
    shorter = objective.loss(model, objective.corrupt(lay_out([[sample[:-1]]]), 0.0))["clm"].sums.item()
    assert shorter == pytest.approx(apart[0], rel=1e-5)
