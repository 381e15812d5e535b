"""What ops refuse, and what they do on a GPU, where segments cannot be asked."""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fused_objectives.backend import INTERPRETED
from fused_objectives.checks import FLOATING, INTEGER, check, check_count
from fused_objectives.detection import detection_loss
from fused_objectives.editing import delete_tokens, insert_tokens
from fused_objectives.embedding_norms import embedding_norms, tied_cross_term
from fused_objectives.generator_sampling import linear_cross_entropy_and_sample
from fused_objectives.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_gradients
from fused_objectives.linear_norms import linear_norms, linear_norms_and_gradient
from fused_objectives.masking import mask_tokens
from fused_objectives.replacing import replace_tokens
from fused_objectives.segments import per_token, spans, sum_per_sample
from fused_objectives.sketched_norms import sketched_norms
from fused_objectives.swapping import swap_tokens
from fused_objectives.vector_gradients import bias_gradients, layer_norm_gradients
from fused_objectives.weighted_gradient import weighted_gradient

N, S, V, WIDTH = 16, 4, 11, 8
SEGMENTS = torch.tensor([-1, 2, 2, 2, 0, 0, -1, -1, 3, 3, 3, 3, -1, 1, 1, 1])
ON_THE_CPU = pytest.mark.parametrize("impl", ["torch", "triton"] if INTERPRETED else ["torch"])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


ROWS = {"tokens": integers(2, 8), "segments": SEGMENTS.view(2, 8), "positions": torch.arange(16).view(2, 8) % 8}
KEY = {"seed": 1, "stream": "checks"}
DRAWS = {"sample_ids": torch.arange(S), "visits": torch.arange(S), **KEY}
LAYER = {"inputs": random(N, WIDTH), "gradients": random(N, 6), "segments": SEGMENTS, "samples": S}
HEAD = {"hidden": random(N, WIDTH), "weight": random(V, WIDTH), "targets": integers(N), "segments": SEGMENTS}
HEAD |= {"samples": S, "bias": random(V), "sample_weights": random(S), "token_weights": random(N)}
EMBEDDING = {"gradients": random(N, WIDTH), "tokens": integers(N), "segments": SEGMENTS, "samples": S}
IS_ORDINARY, ORDINARY_IDS = torch.ones(V, dtype=torch.bool), torch.arange(V)

OPS: dict[Callable, dict] = {
    partial(linear_cross_entropy, squared_norms=True): HEAD,
    linear_cross_entropy_gradients: HEAD,
    linear_cross_entropy_and_sample: HEAD | {"positions": torch.arange(N)} | DRAWS,
    detection_loss: {
        "hidden": random(N, WIDTH),
        "weight": random(WIDTH),
        "labels": integers(N) % 2,
        "segments": SEGMENTS,
        "samples": S,
        "bias": random(1),
        "sample_weights": random(S),
        "token_weights": random(N),
    },
    partial(linear_norms, method="gram", bias=True): LAYER,
    partial(linear_norms, method="instantiate", bias=True): LAYER,
    linear_norms_and_gradient: LAYER | {"weights": random(S)},
    partial(sketched_norms, **KEY): LAYER,
    weighted_gradient: {name: LAYER[name] for name in ("inputs", "gradients", "segments")} | {"weights": random(S)},
    bias_gradients: {name: LAYER[name] for name in ("gradients", "segments", "samples")},
    partial(layer_norm_gradients, eps=1e-5): LAYER | {"inputs": random(N, 6)},
    embedding_norms: EMBEDDING,
    tied_cross_term: EMBEDDING
    | {"hidden": random(5, WIDTH), "weight": random(V, WIDTH), "targets": integers(5), "log_normalizers": random(5)}
    | {"target_segments": torch.tensor([3, 0, 0, -1, 1]), "bias": random(V), "token_weights": random(5)},
    sum_per_sample: {"values": random(N), "segments": SEGMENTS, "samples": S},
    partial(mask_tokens, mask_id=1, rate=0.5, mask_share=0.8, random_share=0.1): ROWS
    | DRAWS
    | {"is_ordinary": IS_ORDINARY, "ordinary_ids": ORDINARY_IDS, "eligible": ROWS["tokens"] > 1}
    | {"units": ROWS["positions"]},
    partial(swap_tokens, rate=0.8): ROWS | DRAWS | {"is_ordinary": IS_ORDINARY, "eligible": ROWS["tokens"] > 1},
    partial(insert_tokens, rate=0.5, insert_id=None, pad_id=0, capacity=9): ROWS
    | DRAWS
    | {"ordinary_ids": ORDINARY_IDS},
    partial(delete_tokens, rate=0.5, pad_id=0): ROWS | DRAWS | {"is_ordinary": IS_ORDINARY},
    replace_tokens: {name: ROWS[name] for name in ("tokens", "segments")}
    | {"slots": torch.arange(-6, 10).view(2, 8).clamp(min=-1), "sampled": integers(10)},
}
BOUND = ("segments", "targets", "labels", "gradients", "bias", "sample_weights", "token_weights", "positions", "visits")
"""Tensors whose length another one's sets."""
NAMES = [getattr(op, "func", op).__name__ for op in OPS]
EVERY_OP = pytest.mark.parametrize(("op", "arguments"), OPS.items(), ids=NAMES)
OF_SAMPLES = [(op, arguments) for op, arguments in OPS.items() if op is not replace_tokens]  # which needs no samples
EVERY_OP_OF_SAMPLES = pytest.mark.parametrize(("op", "arguments"), OF_SAMPLES, ids=NAMES[:-1])


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def results_of(op: Callable, arguments: dict, **options) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(op(**arguments, **options)) if isinstance(leaf, torch.Tensor)]


def with_segments(arguments: dict, segments: torch.Tensor) -> dict:
    return arguments | {"segments": segments.view_as(arguments["segments"])}


@ON_THE_CPU
@EVERY_OP_OF_SAMPLES
def test_a_sample_in_several_runs_is_refused(op, arguments, impl):
    results_of(op, arguments, impl=impl)
    cases = {0: torch.arange(N) % 4, 2: torch.tensor([2, 2, -1, 2] + 12 * [3]), 3: torch.tensor([3, 1, 3] + 13 * [-1])}
    for sample, segments in cases.items():
        with pytest.raises(ValueError, match=f"^segments: the tokens of sample {sample} are not one contiguous run$"):
            op(**with_segments(arguments, segments), impl=impl)


@ON_THE_CPU
@EVERY_OP_OF_SAMPLES
def test_a_sample_that_does_not_exist_is_refused(op, arguments, impl):
    for wrong in (-2, S, 2**40):
        segments = SEGMENTS.clone()
        segments[[0, 6]] = wrong
        with pytest.raises(ValueError, match=f"^segments: {wrong} is not within -1 and 3$"):
            op(**with_segments(arguments, segments), impl=impl)


@ON_THE_CPU
def test_targets_of_a_sample_are_one_run_too(impl):
    arguments = OPS[tied_cross_term] | {"target_segments": torch.tensor([3, 0, 1, -1, 0])}
    with pytest.raises(ValueError, match=r"^target_segments: the tokens of sample 0 are not one contiguous run$"):
        tied_cross_term(**arguments, impl=impl)


@ON_THE_CPU
def test_a_sample_that_is_edited_lies_in_one_row(impl):
    for op, arguments in OPS.items():
        if getattr(op, "func", op) in (insert_tokens, delete_tokens):
            with pytest.raises(ValueError, match=r"^segments: the tokens of sample 1 are not one contiguous run$"):
                op(**with_segments(arguments, torch.tensor(7 * [0] + 2 * [1] + 7 * [2])), impl=impl)
        elif getattr(op, "func", op) is swap_tokens:
            op(**with_segments(arguments, torch.tensor(7 * [0] + 2 * [1] + 7 * [2])), impl=impl)


def moved(value, place):
    """A tensor on a place's device; others as they are."""
    return value.to(place.device) if isinstance(value, torch.Tensor) else value


@EVERY_OP_OF_SAMPLES
@pytest.mark.parametrize("wrong", [-2, S, 2**40])
def test_kernels_take_an_id_out_of_range_for_padding(place, op, arguments, wrong, monkeypatch):
    """They are reached on a GPU, where nobody asks."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fused_objectives.") and hasattr(module, "checked"):
            monkeypatch.setattr(module, "checked", lambda segments, *_, **__: segments)
    arguments = {name: moved(value, place) for name, value in arguments.items()}
    segments, padded = SEGMENTS.clone(), SEGMENTS.clone()
    segments[[0, 6, 4, 5, 15]], padded[[0, 6, 4, 5, 15]] = wrong, -1
    found, expected = (
        results_of(op, with_segments(arguments, ids.to(place.device)), impl="triton") for ids in (segments, padded)
    )
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_spans_and_values_of_ids_out_of_range(place):
    segments = torch.tensor([0, 0, 7, 1, -3, 2, 2**40], device=place.device)
    for impl in ("torch", "triton"):
        assert [bounds.tolist() for bounds in spans(segments, 3, impl)] == [[0, 3, 5], [2, 4, 6]]
    values = torch.tensor([10.0, 20.0, 30.0], device=place.device)
    assert per_token(values, segments).tolist() == [10, 10, 0, 20, 0, 30, 0]


@EVERY_OP
def test_shapes_that_do_not_fit_are_refused_by_name(op, arguments):
    for name, tensor in tensors_of(arguments).items():
        for value in (tensor[None], torch.cat([tensor, tensor])) if name in BOUND else (tensor[None],):
            with pytest.raises(ValueError, match=r"^\w+: \[[\d, ]*\] is not \[[\w, ]*\], with "):
                op(**arguments | {name: value})
    for name, letters in (("bias", "V"), ("sample_weights", "S"), ("token_weights", "N")):
        if arguments is HEAD:
            with pytest.raises(ValueError, match=rf"^{name}: \[1\] is not \[{letters}\], with S = 4, N = 16, d = 8"):
                op(**arguments | {name: torch.ones(1)})


@EVERY_OP
def test_dtypes_that_do_not_fit_are_refused_by_name(op, arguments):
    for name, tensor in tensors_of(arguments).items():
        wrong = tensor.long() if tensor.is_floating_point() else tensor.float()
        with pytest.raises(ValueError, match=rf"^{name}: torch\.\w+ is not torch\.|^gradients: "):
            op(**arguments | {name: wrong})


@EVERY_OP
def test_tensors_on_several_devices_are_refused(op, arguments):
    for name, tensor in list(tensors_of(arguments).items())[1:]:
        with pytest.raises(ValueError, match=r"^\w+: it is on \w+, \w+ on \w+$"):
            op(**arguments | {name: tensor.to("meta")})


@EVERY_OP
def test_an_unknown_implementation_is_refused_even_for_nothing(op, arguments):
    with pytest.raises(ValueError, match=r"^impl: 'fast' is none of"):
        op(**arguments, impl="fast")
    nothing = {name: tensor[:0] for name, tensor in tensors_of(arguments).items() if name != "ordinary_ids"}
    nothing |= {"samples": 0} if "samples" in arguments else {}
    with pytest.raises(ValueError, match=r"^impl: 'fast' is none of"):
        op(**arguments | nothing, impl="fast")


@pytest.mark.parametrize("name", ["capacity", "longest", "chunk_rows"])
@pytest.mark.parametrize("number", [-1, 2.0, "3"])
def test_limits_are_integers_from_0(name, number):
    with pytest.raises(ValueError, match=f"^{name}: {number} is not an integer from 0$"):
        linear_cross_entropy(**HEAD, **{name: number})
    with pytest.raises(ValueError, match=f"^samples: {number} is not"):
        linear_cross_entropy(**HEAD | {"samples": number})
    with pytest.raises(ValueError, match=f"^longest: {number} is not"):
        linear_norms(**LAYER, longest=number)


def test_a_check_says_what_it_knows():
    tensors = {"hidden": (random(3, 5), "Nd", FLOATING), "targets": (integers(4), "N", INTEGER)}
    with pytest.raises(ValueError, match=r"^targets: \[4\] is not \[N\], with S = 2, N = 3, d = 5$"):
        check(tensors, "auto", samples=2)
    check(tensors | {"targets": (None, "N", INTEGER)}, "auto")
    check_count("capacity", None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
@ON_THE_CPU
@pytest.mark.parametrize(
    ("op", "arguments"), [(op, x) for op, x in OPS.items() if "samples" in x], ids=lambda x: getattr(x, "__name__", "")
)
def test_integers_of_any_width_give_the_same(op, arguments, impl, dtype):
    narrow = {
        name: tensor if tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors_of(arguments).items()
    }
    for mine, theirs in zip(
        results_of(op, arguments | narrow, impl=impl), results_of(op, arguments, impl=impl), strict=True
    ):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


NORMS = [(op, x) for op, x in OPS.items() if x.keys() & {"gradients", "values"}]


@ON_THE_CPU
@pytest.mark.parametrize(("op", "arguments"), NORMS, ids=lambda x: getattr(getattr(x, "func", x), "__name__", ""))
def test_norms_and_weighted_gradients_carry_no_gradient_and_ignore_autocast(op, arguments, impl):
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in tensors_of(arguments).items()
        if tensor.is_floating_point()
    }
    expected = results_of(op, arguments, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = results_of(op, arguments | leaves, impl=impl)
    for mine, theirs in zip(found, expected, strict=True):
        assert not mine.requires_grad and mine.grad_fn is None
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
