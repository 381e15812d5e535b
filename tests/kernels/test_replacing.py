from functools import partial

import numpy as np
import pytest
import torch

from fused_objectives import replacing
from fused_objectives.replacing import replace_tokens
from fused_objectives.targets import IGNORED, compact
from tests.kernels.corruption import (
    VOCABULARY,
    odd_rows,
    poisoned_memory,  # noqa: F401  (a fixture)
    same,
)

REPLACE_TRITON = replacing.replace_triton


def example(device: str, capacity: int = 150) -> tuple[torch.Tensor, ...]:
    """Tokens, segments, slots and samples: a third of the places are targets, too many for the capacity, some of them
    padding; some samples are the original token, some −1."""
    rows, rng = odd_rows(), np.random.default_rng(5)
    targets = compact((torch.from_numpy(rng.random(rows.tokens.shape)) < 0.3).flatten(), capacity)
    sampled = torch.from_numpy(rng.integers(0, VOCABULARY, capacity))
    sampled[::4] = rows.tokens.flatten()[targets.places[::4]]
    sampled[::7] = -1
    tensors = rows.tokens, rows.segments, targets.slots.view_as(rows.tokens), sampled
    return tuple(tensor.to(device) for tensor in tensors)


def oracle(tokens, segments, slots, sampled):
    """The same by a loop over places."""
    replaced, labels = tokens.clone(), torch.zeros_like(tokens)
    for place in np.ndindex(*tokens.shape):
        slot = int(slots[place])
        if segments[place] < 0:
            labels[place] = IGNORED
        elif slot >= 0 and sampled[slot] >= 0:
            replaced[place] = sampled[slot]
            labels[place] = int(tokens[place] != sampled[slot])
    return replaced, labels


def test_kernel_and_twin_equal_a_loop_over_places(place, monkeypatch):
    expected = oracle(*example("cpu"))
    assert (expected[1] == 1).sum() > 20
    inputs = example(place.device)
    same(replace_tokens(*inputs, impl="torch"), expected)
    for block in (16, 256, 1024):
        monkeypatch.setattr(replacing, "replace_triton", partial(REPLACE_TRITON, block=block))
        same(replace_tokens(*inputs, impl="triton"), expected)
    same(inputs, example("cpu"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_sample_that_hits_the_original_is_labelled_original(place, impl):
    tokens, segments, _, _ = example(place.device)
    slots = torch.arange(tokens.numel(), device=place.device).view_as(tokens)
    replaced, labels = replace_tokens(tokens, segments, slots, tokens.flatten(), impl=impl)
    assert torch.equal(replaced, tokens)
    assert torch.equal(labels, torch.where(segments < 0, IGNORED, 0))
    replaced, labels = replace_tokens(tokens, segments, slots, tokens.flatten() + 1, impl=impl)
    assert torch.equal(replaced, torch.where(segments < 0, tokens, tokens + 1))
    assert torch.equal(labels, torch.where(segments < 0, IGNORED, 1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_flat_and_strided_inputs_are_alike(place, impl):
    inputs = example(place.device)
    expected = replace_tokens(*inputs, impl="torch")
    flat = replace_tokens(*(tensor.flatten() for tensor in inputs), impl=impl)
    same((tensor.view_as(inputs[0]) for tensor in flat), expected)
    strided = [torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in inputs]
    same(replace_tokens(*strided, impl=impl), expected)
    transposed = [tensor.t().contiguous().t() for tensor in inputs]
    same(replace_tokens(*transposed, impl=impl), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_is_replaced_where_nothing_is_sampled(place, impl):
    tokens, segments, slots, sampled = example(place.device)
    for slot, samples in ((torch.full_like(slots, -1), sampled), (torch.full_like(slots, -1), sampled[:0])):
        replaced, labels = replace_tokens(tokens, segments, slot, samples, impl=impl)
        assert torch.equal(replaced, tokens)
        assert torch.equal(labels, torch.where(segments < 0, IGNORED, 0))
    for shape in ((0,), (0, 7), (3, 0)):
        nothing = tokens.new_empty(shape)
        result = replace_tokens(nothing, nothing, nothing, sampled[:0], impl=impl)
        assert result.tokens.shape == result.labels.shape == shape


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_op_passes_opcheck_and_compiles_whole(place, impl):
    inputs = example(place.device)
    torch.library.opcheck(torch.ops.fused_objectives.replace_tokens, (*inputs, impl))
    compiled = torch.compile(lambda *inputs: replace_tokens(*inputs, impl=impl), fullgraph=True, backend="aot_eager")
    same(compiled(*inputs), replace_tokens(*inputs, impl="torch"))
