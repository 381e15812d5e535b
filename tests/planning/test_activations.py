"""The planned activations are those a training step keeps: within 15 % of torch's saved tensors."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.planning.activations import AsOnGpu, SavedTensors, measure, rows_together
from pretrain.recipe import recipe_from
from pretrain.training.build import Parts, build
from pretrain.training.engine import Engine, init_distributed
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup
from tests.planning.measured import configuration
from tests.training.runs import recipe, write_corpus

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "store")


def parts_of(store, **changes) -> Parts:
    changes = {"objectives": {"mlm": {}, "rtd": {}}, "sampler": {"name": "fixed"}, "model__dropout": 0.0} | changes
    return build(recipe_from(recipe(store, store / "run", **changes), "test"), dtype=torch.float32)


def test_a_training_step_keeps_what_is_planned(store):
    parts = parts_of(store, training__micro_batch_rows=5, training__batch_rows=5)
    [line] = measure(parts, torch.float32).values()
    init_distributed(60)
    groups = [ParameterGroup(name, params) for name, params in parts.components.items()]
    batch_sizes = {"train_micro_batch_size_per_gpu": 5, "train_batch_size": 5, "gradient_accumulation_steps": 1}
    settings = OptimizerSettings("adamw", 0.0, (0.9, 0.98), 1e-6)
    engine = Engine(parts.model, groups, configuration("zero2") | batch_sizes, settings)
    batch = parts.loader(rank=0, world_size=1).next().micro_batches[0]
    views = {name: objective.corrupt(batch, progress=0.0) for name, objective in parts.model.objectives.items()}
    scales = {term: 1.0 for objective in parts.model.objectives.values() for term in objective.terms}
    engine.begin_step()
    with SavedTensors(parts.model) as saved:
        loss, _ = engine(views, scales)
    engine.backward(loss)
    engine.close()
    assert line.at(5) == pytest.approx(saved.bytes, rel=0.15)


def test_drawn_objectives_are_planned_one_by_one_and_mixed_ones_together(store):
    mixed = measure(parts_of(store), torch.float32)
    drawn = measure(parts_of(store, sampler={"name": "uniform"}), torch.float32)
    assert list(mixed) == ["mlm + rtd"] and list(drawn) == ["mlm", "rtd"]
    assert max(line.at(3) for line in drawn.values()) < mixed["mlm + rtd"].at(3)


def test_sixteen_bits_keep_about_half_and_recomputation_less(store):
    fp32, bf16 = (measure(parts_of(store), dtype)["mlm + rtd"].per_row for dtype in (torch.float32, BF16))
    assert 0.4 * fp32 < bf16 < 0.7 * fp32
    recomputed = measure(parts_of(store, model__activation_checkpointing=True), torch.float32)["mlm + rtd"]
    assert recomputed.per_row < 0.8 * fp32


def test_objectives_that_need_rows_together_are_measured_on_them(store):
    parts = parts_of(store, objectives={"cse": {"group_rows": 4}}, model__dropout=0.1, training__micro_batch_rows=4)
    assert rows_together(parts) == 4
    assert measure(parts, torch.float32)["cse"].per_row > 0


def test_storages_count_once_and_weights_and_views_of_them_not():
    layer = torch.nn.Linear(6, 6, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    with SavedTensors(layer) as saved:
        kept = layer(x), layer(x[:3])
    assert saved.bytes == 4 * 30 and len(kept) == 2
    with SavedTensors(layer) as saved:
        pass
    assert saved.bytes == 0


def test_dropout_keeps_a_byte_an_element_and_attention_no_scores():
    x = torch.randn(1, 2, 33, 8, requires_grad=True)
    with SavedTensors(torch.nn.Identity()) as saved, AsOnGpu(torch.float32):
        dropped = F.dropout(x, 0.5)
    assert saved.bytes == x.numel() and 0 < int((dropped == 0).sum()) < x.numel()
    with SavedTensors(torch.nn.Identity()) as saved, AsOnGpu(torch.float32):
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert saved.bytes < 4 * 33 * 33 * 2
