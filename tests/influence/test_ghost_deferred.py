"""The weighted gradient without a second backward, against every sample alone in fp64 and against plain autograd."""

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.influence import ledger
from pretrain.influence.ghost import GhostNorms
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives import scores
from pretrain.training.engine import Engine, init_distributed
from pretrain.training.optimizer import ParameterGroup
from tests.influence.ghosts import (
    PACKED,
    SETUPS,
    assert_close,
    batch_of,
    case,
    loss_of,
    norms_of,
    record,
    scales_of,
    view_of,
    weighted,
    worst_gradient,
)
from tests.training.test_engine import small_config
from tests.training.toy import ADAMW

WEIGHTS = torch.tensor([0.0, 1.7, 0.2, 1.0, 3.1, 0.6, 1.2, 0.4])


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in PACKED), *((name, False) for name in SETUPS)])
def test_every_parameter_accumulates_the_weighted_gradient_once_and_not_before(name, packed):
    own = case(name)
    model, batch = copy.deepcopy(own.model), own.packed if packed else own.padded
    ghost, fired = GhostNorms(model, "first_block", "gram"), Counter()
    assert ghost.why_not_deferred is None
    for parameter_name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=parameter_name: fired.update([name]))
    norms = record(model, batch, ghost, deferred=True)
    assert not fired and all(parameter.grad is None for parameter in model.parameters())
    ghost.injected(WEIGHTS).backward()
    exact = weighted(own.exact, WEIGHTS)
    assert worst_gradient(model, exact) < 1e-5
    assert {name for name, each in exact.items() if each.any()} <= fired.keys() and set(fired.values()) == {1}
    named = {id(each): name for name, each in model.named_parameters()}
    assert_close(norms, norms_of(own.exact, {named[id(each)] for each in ghost.parameters}))


@pytest.mark.parametrize("name", ["bert untied", "modernbert", "electra", "t5"])
def test_weights_of_one_give_the_plain_gradient(name):
    """Bit by bit where nothing is added up but rows: elsewhere, as in a tied table, in another order."""
    own = case(name)
    plain, model = copy.deepcopy(own.model), copy.deepcopy(own.model)
    loss_of(plain, own.padded).backward()
    ghost = GhostNorms(model, "layer_norms", "layer_norm")
    record(model, own.padded, ghost, deferred=True)
    ghost.injected(torch.ones(8)).backward()
    exact = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert exact.keys() == found.keys()
    scale = max(float(each.norm()) for each in exact.values())
    for parameter, gradient in exact.items():
        error = float((found[parameter] - gradient).norm())
        assert error <= 1e-6 * max(float(gradient.norm()), 1e-2 * scale), parameter
    matrices = [name for name, each in exact.items() if "backbone.encoder.layer" in name and each.ndim == 2]
    assert all(torch.equal(found[name], exact[name]) for name in matrices)


@pytest.mark.parametrize("name", ["bert", "electra", "gpt2"])
def test_whether_the_gradients_by_the_logits_are_kept_changes_only_roundings(name, monkeypatch):
    own, computed = case(name), []
    anew = scores.linear_cross_entropy_gradients
    monkeypatch.setattr(scores, "linear_cross_entropy_gradients", lambda *a, **k: computed.append(1) or anew(*a, **k))
    for room in (0, math.inf):
        monkeypatch.setattr(ledger, "_ROOM", room)
        model = copy.deepcopy(own.model)
        ghost = GhostNorms(model, "all", "gram")
        del computed[:]
        assert_close(record(model, own.packed, ghost, deferred=True), norms_of(own.exact))
        ghost.injected(WEIGHTS).backward()
        assert bool(computed) == (room == 0)
        assert worst_gradient(model, weighted(own.exact, WEIGHTS)) < 1e-5


def test_what_is_injected_has_the_value_zero_and_scales_with_the_gradient_that_comes():
    own = case("bert")
    model = copy.deepcopy(own.model)
    ghost = GhostNorms(model, "first_block", "gram")
    record(model, own.packed, ghost, deferred=True)
    total = ghost.injected(WEIGHTS)
    assert total == 0 and total.shape == ()
    (-3.0 * total).backward()
    assert worst_gradient(model, weighted(own.exact, -3.0 * WEIGHTS)) < 1e-5


def test_other_losses_join_what_is_injected_in_one_backward():
    own = case("bert")
    both, apart = copy.deepcopy(own.model), copy.deepcopy(own.model)
    fired = Counter()
    for name, parameter in both.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    for model, joins in ((both, True), (apart, False)):
        ghost = GhostNorms(model, "first_block", "gram")
        record(model, own.packed, ghost, deferred=True)
        total, other = ghost.injected(WEIGHTS), loss_of(model, own.padded)
        for each in [total + other] if joins else [total, other]:
            each.backward()
    assert set(fired.values()) == {1}
    pairs = zip(both.parameters(), apart.parameters(), strict=True)
    assert all(torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7) for one, other in pairs)


def test_in_bf16_the_gradient_is_as_close_as_that_of_two_passes():
    setup = SETUPS["modernbert"]
    model = setup.model().bfloat16()
    exact, two_passes = copy.deepcopy(model).double(), copy.deepcopy(model)
    batch = batch_of(setup)
    for each in (exact, two_passes):
        loss_of(each, batch, WEIGHTS).backward()
    ghost = GhostNorms(model, "first_block", "gram")
    record(model, batch, ghost, deferred=True)
    ghost.injected(WEIGHTS).backward()
    wanted = {name: each.grad for name, each in exact.named_parameters()}
    assert worst_gradient(model, wanted) < 2 * worst_gradient(two_passes, wanted)


def step_on(name: str, stage: int, deferred: bool) -> dict[str, Any]:
    """Take a step of two micro-batches; return its gradient, the norms and the gradient's norm."""
    init_distributed(60)
    model = SETUPS[name].model()
    ghost, micro_step = GhostNorms(model, "all", "gram"), deferred_micro_steps if deferred else two_passes
    engine = engine_of(model, stage)
    batch = batch_of(SETUPS[name])
    micro = [replace(batch, sample_ids=batch.sample_ids + 8 * (2 * engine.rank + each)) for each in range(2)]
    engine.begin_step()
    norms = micro_step(engine, ghost, micro, WEIGHTS.roll(engine.rank))
    gradient = torch.cat([each.view(-1) for parts in engine.gradient().parts.values() for each in parts])
    outcome = engine.step(0.01, set(model.components()))
    engine.close()
    return {"gradient": gradient, "norms": norms, "whole": torch.tensor([outcome.grad_norm])}


def engine_of(model: MultiObjectiveModel, stage: int) -> Engine:
    config = small_config(f"zero{stage}")
    if stage in (1, 2):
        config["zero_optimization"]["reduce_bucket_size"] = 10_000
    groups = [ParameterGroup(name, parameters, 1.0) for name, parameters in model.components().items()]
    return Engine(model, groups, config, ADAMW)


def deferred_micro_steps(engine: Engine, ghost: GhostNorms, micro: list[Batch], weights: torch.Tensor) -> torch.Tensor:
    norms = []
    for batch in micro:
        with ghost.recording(batch, deferred=True):
            loss, _ = engine.run_apart(view_of(engine.module, batch), scales_of(engine.module))
            torch.autograd.backward(loss)
        norms.append(ghost.squared_norms())
        engine.backward(ghost.injected(weights))
    return torch.cat(norms)


def two_passes(engine: Engine, ghost: GhostNorms, micro: list[Batch], weights: torch.Tensor) -> torch.Tensor:
    norms = []
    for batch in micro:
        with ghost.recording(batch, deferred=False):
            loss, _ = engine(view_of(engine.module, batch), scales_of(engine.module))
            engine.backward(loss)
        norms.append(ghost.squared_norms() / engine.world_size**2)
    engine.begin_step()
    for batch in micro:
        views = view_of(engine.module, batch)
        loss, _ = engine(views, scales_of(engine.module), dict.fromkeys(views, weights))
        engine.backward(loss)
    return torch.cat(norms)


@pytest.mark.parametrize(("name", "stage"), [("bert", 0), ("electra", 1), ("modernbert", 2)])
def test_under_the_engine_on_two_ranks_a_deferred_step_is_one_of_two_passes(ranks, name, stage):
    lives = [ranks(step_on, name, stage, deferred) for deferred in (True, False)]
    for deferred, two_passes in zip(*lives, strict=True):
        for what, expected in two_passes.items():
            error = float((deferred[what] - expected).norm() / expected.norm())
            assert error < 1e-5, (what, error)


def norms_at_stage_3(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    init_distributed(60)
    model = SETUPS[name].model()
    ghost, batch = GhostNorms(model, "all", "gram"), batch_of(SETUPS[name])
    plain = record(model, batch, GhostNorms(model, "all", "gram"))
    model.zero_grad()
    engine = engine_of(model, 3)
    engine.begin_step()
    with ghost.recording(batch, deferred=False):
        loss, _ = engine(view_of(engine.module, batch), scales_of(engine.module))
        engine.backward(loss)
    norms = ghost.squared_norms() / engine.world_size**2
    engine.close()
    return plain, norms


def test_at_stage_3_norms_are_the_same_though_weights_come_and_go(ranks):
    for plain, partitioned in ranks(norms_at_stage_3, "bert"):
        torch.testing.assert_close(partitioned, plain, rtol=1e-5, atol=0)
