"""The planned activations are those a training step takes: within 15 % of all tensors there are at its peak."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.planning.activations import AsOnGpu, measure, rows_together
from pretrain.planning.live import LiveTensors
from pretrain.recipe import recipe_from
from pretrain.training.build import Parts, build
from tests.training.runs import recipe, write_corpus

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "store")


def parts_of(store, **changes) -> Parts:
    changes = {"objectives": {"mlm": {}, "rtd": {}}, "sampler": {"name": "fixed"}, "model__dropout": 0.0} | changes
    return build(recipe_from(recipe(store, store / "run", **changes), "test"), dtype=torch.float32)


def peak_of_a_step(parts: Parts, dtype: torch.dtype) -> int:
    """Return the most bytes that forward and backward of a real micro-batch take beside weights and gradients."""
    model = parts.model.to(dtype).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = parts.loader(rank=0, world_size=1).next().micro_batches[0]
    views = {name: objective.corrupt(batch, progress=0.0) for name, objective in model.objectives.items()}
    scales = {term: 1.0 for objective in model.objectives.values() for term in objective.terms}
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]
    with LiveTensors(besides=held) as live:
        with AsOnGpu(dtype):
            loss, _ = model(views, scales)
        loss.backward()
        return live.most()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [7, 19])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one a row"])
def test_a_step_takes_what_is_planned(store, dtype, rows, packing):
    batch = {"training__micro_batch_rows": rows, "training__batch_rows": rows, "data__packing": packing}
    [planned] = measure(parts_of(store, **batch), dtype).values()
    assert planned.at(rows) == pytest.approx(peak_of_a_step(parts_of(store, **batch), dtype), rel=0.15)


def test_a_step_that_computes_layers_anew_takes_what_is_planned(store):
    settings = {"training__micro_batch_rows": 19, "training__batch_rows": 19}
    settings |= {"model__activation_checkpointing": True, "model__overrides__num_hidden_layers": 6}
    [planned] = measure(parts_of(store, **settings), torch.float32).values()
    measured = peak_of_a_step(parts_of(store, **settings), torch.float32)
    assert planned.at(19) == pytest.approx(measured, rel=0.15)


def test_drawn_objectives_are_planned_one_by_one_and_mixed_ones_together(store):
    mixed = measure(parts_of(store), torch.float32)
    drawn = measure(parts_of(store, sampler={"name": "uniform"}), torch.float32)
    assert list(mixed) == ["mlm + rtd"] and list(drawn) == ["mlm", "rtd"]
    assert max(line.at(3) for line in drawn.values()) < mixed["mlm + rtd"].at(3)


def test_sixteen_bits_keep_about_half_and_recomputation_less(store):
    fp32, bf16 = (measure(parts_of(store), dtype)["mlm + rtd"].forward.per_row for dtype in (torch.float32, BF16))
    assert 0.4 * fp32 < bf16 < 0.7 * fp32
    recomputed = measure(parts_of(store, model__activation_checkpointing=True), torch.float32)["mlm + rtd"]
    assert recomputed.forward.per_row < 0.8 * fp32


def test_objectives_that_need_rows_together_are_measured_on_them(store):
    parts = parts_of(store, objectives={"cse": {"group_rows": 4}}, model__dropout=0.1, training__micro_batch_rows=4)
    assert rows_together(parts) == 4
    assert measure(parts, torch.float32)["cse"].forward.per_row > 0


def test_storages_count_once_while_they_are_there_and_those_left_out_never():
    layer = torch.nn.Linear(6, 6, bias=False)
    x = torch.randn(5, 6)
    with torch.no_grad(), LiveTensors(besides=[layer.weight]) as live:
        kept = layer(x), x[:3].T
        assert (live.now(), live.most()) == (4 * 60, 4 * 60)
        del kept
        assert (live.now(), live.most()) == (4 * 30, 0)


def test_dropout_keeps_a_byte_an_element_and_attention_no_scores():
    x = torch.randn(1, 2, 33, 8, requires_grad=True)
    with LiveTensors(besides=[x]) as live, AsOnGpu(torch.float32):
        dropped = F.dropout(x, 0.5)
        assert live.now() == 5 * x.numel() and 0 < int((dropped == 0).sum()) < x.numel()
    with LiveTensors(besides=[x]) as live, AsOnGpu(torch.float32):
        kept = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert live.now() < 4 * 33 * 33 * 2 + kept.nbytes
