"""Squared norms read off a backward, against every sample alone in fp64."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch.func import functional_call, grad, vmap

from pretrain.influence.ghost import GhostNorms
from pretrain.model.attention import Layout
from pretrain.model.rows import rows_of
from tests.builders import lay_out, padded, random_samples
from tests.influence.ghosts import (
    PACKED,
    SETUPS,
    Setup,
    assert_close,
    batch_of,
    case,
    gradients_alone,
    loss_of,
    norms_of,
    record,
    view_of,
    weighted,
    worst_gradient,
)
from tests.objectives.builders import model_with

EITHER = pytest.mark.parametrize("deferred", [False, True])


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in PACKED), *((name, False) for name in SETUPS)])
def test_norms_are_those_of_each_sample_alone(name, packed):
    own = case(name)
    ghost, exact = GhostNorms(own.model, "all", "gram"), norms_of(own.exact)
    found = record(own.model, own.packed if packed else own.padded, ghost)
    assert_close(found, exact)
    assert (exact > 0).sum() >= 3
    if name != "roberta sop" and "electra" not in name:  # there is a sample without a target
        assert (found == 0).any()


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_norms_are_the_same_with_checkpointed_activations(name):
    model = SETUPS[name].model(activation_checkpointing=True).train()
    batch = case(name).padded
    ghost = GhostNorms(model, "all", "gram")
    assert_close(record(model, batch, ghost), norms_of(case(name).exact))
    assert "activation_checkpointing" in ghost.why_not_deferred


def test_the_gradients_of_an_undeferred_recording_are_those_without_one():
    own = case("bert")
    model, plain = copy.deepcopy(own.model), copy.deepcopy(own.model)
    record(model, own.packed, GhostNorms(model, "all", "gram"))
    loss_of(plain, own.packed).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in pairs)
    assert not any("forward" in vars(module) for module in model.modules())  # no layer stays tapped


@EITHER
def test_a_factor_and_the_samples_weights_enter_a_norm_squared(deferred):
    own = case("bert")
    weights = torch.linspace(0.0, 3.0, len(own.exact))
    found = record(
        own.model, own.packed, GhostNorms(own.model, "all", "gram"), deferred=deferred, weights=weights, scale=50.0
    )
    assert_close(found, norms_of(own.exact) * (50.0 * weights.double()) ** 2)
    own.model.zero_grad()


def test_an_rtd_samples_gradient_reaches_generator_head_and_backbone_alike():
    own = case("electra, nothing shared")
    reached = {name.split(".layer")[0] for name, each in own.exact[5].items() if each.any()}
    assert any(name.startswith("heads.generator") for name in reached)
    assert any(name.startswith("heads.detection") for name in reached)
    assert any(name.startswith("encoder.backbone") for name in reached)
    generator = GhostNorms(own.model, "heads.generator", "gram")
    names = {name for name in own.exact[0] if name.startswith("heads.generator")}
    assert_close(record(own.model, own.packed, generator), norms_of(own.exact, names))


@EITHER
def test_another_text_in_the_row_leaves_a_samples_score_as_it_was(deferred):
    model, batch = case("bert").model, case("bert").packed
    ghost = GhostNorms(model, "all", "gram")
    before = record(model, batch, ghost, deferred=deferred)
    other = copy.deepcopy(batch)
    where = other.segment_ids == 4
    other.tokens[where] = (other.tokens[where] + 17) % 200 + 5
    after = record(model, other, ghost, deferred=deferred)
    rest = torch.arange(len(before)) != 4
    torch.testing.assert_close(after[rest], before[rest], rtol=1e-6, atol=0)
    assert abs(after[4] - before[4]) > 1e-3 * before[4]
    model.zero_grad()


@EITHER
@pytest.mark.parametrize("name", ["bert", "electra", "t5"])
def test_a_micro_batch_without_samples_has_no_norms_and_gradients_of_zero(name, deferred):
    model = copy.deepcopy(case(name).model)
    batch = lay_out([[]], row_length=6)
    ghost = GhostNorms(model, "all", "gram")
    assert record(model, batch, ghost, deferred=deferred).shape == (0,)
    if deferred:
        ghost.injected(torch.zeros(0)).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_in_bf16_norms_are_within_three_hundredths():
    setup = SETUPS["bert"]
    model = setup.model().bfloat16()
    batch = batch_of(setup)
    exact = norms_of(gradients_alone(model, batch))  # of the rounded weights
    found = record(model, batch, GhostNorms(model, "all", "gram"))
    assert_close(found, exact, 3e-2)


def test_norms_under_autocast_are_within_three_hundredths():
    own = case("modernbert")
    ghost = GhostNorms(own.model, "all", "gram")
    with ghost.recording(own.packed, deferred=False), torch.autocast("cpu", torch.bfloat16):
        loss_of(own.model, own.packed).backward()
    assert_close(ghost.squared_norms(), norms_of(own.exact), 3e-2)
    own.model.zero_grad()


def test_a_sketch_is_unbiased_and_orders_samples_as_their_norms_do():
    model = SETUPS["bert"].model()
    batch = padded(random_samples([11, 5, 17, 9, 23, 13, 7, 19, 15, 21], seed=3))
    exact = record(model, batch, GhostNorms(model, "first_block", "gram"))
    ghost = GhostNorms(model, "first_block", "sketch", sketch_size=8)
    draws = torch.stack([record(model, batch, ghost, step=step) for step in range(30)])
    assert torch.equal(draws[7], record(model, batch, ghost, step=7)) and not torch.equal(draws[7], draws[8])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert (error[exact > 0] < 4).all(), error
    assert min(spearmanr(draw, exact).statistic for draw in draws[:20]) > 0.75


def test_norms_are_those_of_torch_func_on_the_trunk_of_t5():
    encoder = SETUPS["t5 untied"].model().encoder
    encoder.pretrained.set_attn_implementation("eager")
    random = torch.Generator().manual_seed(3)
    source, inputs = (torch.randint(5, 200, (3, length), generator=random) for length in (9, 6))
    noise = torch.randn(3, 6, 32, generator=random)
    parameters = {name: each.detach() for name, each in encoder.named_parameters()}

    def loss(parameters, source, inputs, noise):
        real = torch.ones(1, 9, dtype=torch.bool)
        return (functional_call(encoder, parameters, (source[None], real, inputs[None]))[0] * noise).sum()

    theirs = vmap(grad(loss), (None, 0, 0, 0))(parameters, source, inputs, noise)
    expected = sum(each.flatten(1).square().sum(1) for each in theirs.values())

    model = SETUPS["t5 untied"].model()
    ghost = GhostNorms(model, ["encoder.encoder", "encoder.decoder"], "gram")
    batch = padded([source.numpy()[row] for row in range(3)])
    with ghost.recording(batch, deferred=False), rows_of(torch.arange(3)[:, None]):
        (model.encoder(source, torch.ones_like(source, dtype=torch.bool), inputs) * noise).sum().backward()
    torch.testing.assert_close(ghost.squared_norms(), expected, rtol=1e-5, atol=0)


def test_norms_of_an_untied_trunk_are_opacuss():
    opacus = pytest.importorskip("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
    model = SETUPS["bert untied"].model()
    batch = padded(random_samples([13, 7, 22], seed=5))
    view = next(iter(view_of(model, batch).values()))
    noise = torch.randn(*batch.tokens.shape, 32) * batch.real[:, :, None]
    ghost = GhostNorms(model, "encoder", "gram")
    with ghost.recording(batch, deferred=False):
        (model.encoder(view.tokens, Layout(batch)) * noise).sum().backward()
    wrapped = opacus.GradSampleModuleFastGradientClipping(
        model.encoder.train(), loss_reduction="sum", max_grad_norm=1.0
    )
    (wrapped(view.tokens, Layout(batch)) * noise).sum().backward()
    theirs = sum(each._norm_sample.square() for each in model.encoder.parameters())
    torch.testing.assert_close(ghost.squared_norms(), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["task_mlm", "end_task"])
def test_a_tasks_samples_count_for_the_sample_whose_row_drew_them(name):
    """The oracle weighs all samples but one by 0: a row draws by its first sample, so none can be run alone."""
    model = model_with(name, dropout=0.0, samples_per_row=2)
    batch, exact = batch_of(Setup("bert", name)), copy.deepcopy(model).double()
    found = []
    for only in torch.eye(len(batch.sample_ids)):
        loss = loss_of(exact, batch, only)
        found.append(torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True, materialize_grads=True))
    names = [name for name, _ in exact.named_parameters()]
    expected = [dict(zip(names, each, strict=True)) for each in found]
    ghost = GhostNorms(model, "all", "gram")
    norms = record(model, batch, ghost, deferred=True)
    assert_close(norms, norms_of(expected))
    assert (norms > 0).sum() == len(batch.tokens) < len(norms)  # one owner a row
    weights = torch.linspace(0, 2, len(norms))
    ghost.injected(weights).backward()
    assert worst_gradient(model, weighted(expected, weights)) < 1e-5
