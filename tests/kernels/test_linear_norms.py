import pytest
import torch
from torch import nn

from fused_objectives import linear_norms as module
from fused_objectives.linear_norms import linear_norms, linear_norms_and_gradient
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import (
    SAMPLES,
    gradients_one_by_one,
    packed_segments,
    plain_and_exact_norms,
    random_matrix,
)

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])


def layer(place, d, p):
    segments = packed_segments(place.device)
    return random_matrix(place, d), random_matrix(place, p, seed=1), segments


@IMPLS
@pytest.mark.parametrize(("d", "p"), [(24, 10), (64, 48), (130, 200), (16, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["gram", "instantiate", "auto"])
def test_norms_are_those_of_autograd_on_each_sample_alone(place, impl, d, p, bias, method):
    inputs, gradients, segments = layer(place, d, p)
    plain, exact = plain_and_exact_norms(nn.Linear(d, p, bias), inputs, gradients, segments)
    inputs[segments < 0], gradients[segments < 0] = torch.nan, torch.inf
    ours = linear_norms(inputs, gradients, segments, SAMPLES, bias=bias, method=method, impl=impl)
    assert ours.dtype == torch.float32 and ours[1] == 0 and (ours >= 0).all()
    assert_as_accurate(ours, plain, exact)


@pytest.mark.parametrize(("longest", "method"), [(None, "instantiate"), (70, "instantiate"), (63, "gram"), (1, "gram")])
def test_the_method_changes_where_the_longest_sample_crosses_over(monkeypatch, longest, method):
    """d = p = 64 puts the twin's crossover at 64; the longest sample has 70."""
    grams = []
    monkeypatch.setattr(module, "_gram_torch", lambda *a: grams.append(1) or torch.zeros(SAMPLES))
    segments = packed_segments()
    linear_norms(*torch.randn(2, len(segments), 64), segments, SAMPLES, longest=longest)
    assert bool(grams) == (method == "gram")


@IMPLS
@pytest.mark.parametrize(("d", "p"), [(24, 10), (130, 200)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_and_weighted_gradient_come_at_once(place, impl, d, p, weighted):
    inputs, gradients, segments = layer(place, d, p)
    linear = nn.Linear(d, p, bias=False).to(place.device)
    plain, exact = plain_and_exact_norms(linear, inputs, gradients, segments)
    weights = torch.tensor([0.5, 3.0, -2.0, 0.0, 1.25], device=place.device) if weighted else None
    factors = weights if weighted else torch.ones(SAMPLES, device=place.device)

    def sum_one_by_one(dtype):
        samples = gradients_one_by_one(linear.to(dtype), inputs.to(dtype), gradients.to(dtype), segments)
        return sum(w * gradient.to(dtype) for w, [gradient] in zip(factors.to(dtype), samples, strict=True))

    exact_sum, plain_sum = sum_one_by_one(torch.float64), sum_one_by_one(place.dtype)
    inputs[segments < 0], gradients[segments < 0] = torch.nan, torch.inf
    norms, ours = linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, weights=weights, impl=impl)
    assert_as_accurate(norms, plain, exact)
    assert ours.dtype == place.dtype and ours.is_contiguous()
    assert_as_accurate(ours, plain_sum, exact_sum)
    wide = linear_norms_and_gradient(
        inputs, gradients, segments, SAMPLES, weights=weights, dtype=torch.float32, impl=impl
    )[1]
    assert torch.equal(wide.to(place.dtype), ours)


@IMPLS
def test_a_sample_of_weight_zero_adds_nothing_even_if_it_broke(place, impl):
    inputs, gradients, segments = layer(place, 16, 32)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=place.device)
    _, expected = linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, weights=weights, impl=impl)
    gradients[segments == 3] = torch.inf
    norms, ours = linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, weights=weights, impl=impl)
    assert torch.equal(ours, expected)
    assert not norms[3].isfinite() and norms[[0, 1, 2, 4]].isfinite().all()


@IMPLS
@pytest.mark.parametrize("programs", [1, 3, 512])
def test_dealing_samples_out_to_groups_changes_nothing_but_rounding(place, impl, programs, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    inputs, gradients, segments = layer(place, 80, 70)
    norms, gradient = linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, impl=impl)
    again = linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, impl=impl)
    assert torch.equal(norms, again[0]) and torch.equal(gradient, again[1])
    real = segments >= 0
    exact = gradients[real].double().T @ inputs[real].double()
    assert_as_accurate(gradient, gradients[real].T @ inputs[real], exact)


@IMPLS
def test_operands_may_be_views_of_any_stride(place, impl):
    inputs, gradients, segments = layer(place, 48, 32)
    turned = inputs.T.contiguous().T, torch.cat([gradients, gradients], 1)[:, 32:]
    for method in ("gram", "instantiate"):
        norms = [linear_norms(*x, segments, SAMPLES, method=method, impl=impl) for x in (turned, (inputs, gradients))]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    one = torch.ones((), device=place.device, dtype=place.dtype).expand(len(segments), 32)
    norms = linear_norms(one, one, segments, SAMPLES, method="instantiate", impl=impl)
    assert norms.tolist() == [(32 * length) ** 2 for length in (5, 0, 1, 70, 33)]


@IMPLS
def test_nothing_has_no_norms(place, impl):
    empty = torch.empty(0, 16, device=place.device, dtype=place.dtype)
    some = torch.empty(4, 16, device=place.device, dtype=place.dtype)
    for matrix, samples in ((empty, 0), (empty, 2), (some, 0), (some, 2)):
        segments = torch.full((len(matrix),), -1, device=place.device)
        for method in ("gram", "instantiate", "auto"):
            norms = linear_norms(matrix, matrix, segments, samples, bias=True, method=method, impl=impl)
            assert norms.tolist() == [0] * samples
        norms, gradient = linear_norms_and_gradient(matrix, matrix, segments, samples, impl=impl)
        assert norms.tolist() == [0] * samples and gradient.shape == (16, 16) and not gradient.any()


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="gram, instantiate"):
        linear_norms(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1).long(), 1, method="grams")


@IMPLS
def test_they_stand_in_a_compiled_graph(place, impl):
    inputs, gradients, segments = layer(place, 16, 32)
    weights = torch.arange(5.0, device=place.device)
    for method in ("gram", "instantiate"):
        arguments = (inputs, gradients, segments, SAMPLES, True, None, method, impl)
        torch.library.opcheck(module._linear_norms, arguments)
    arguments = (inputs, gradients, segments, SAMPLES, weights, torch.float32, impl)
    torch.library.opcheck(module._linear_norms_and_gradient, arguments)

    def step(inputs, gradients):
        norms = linear_norms(inputs, gradients, segments, SAMPLES, impl=impl)
        return linear_norms_and_gradient(inputs, gradients, segments, SAMPLES, weights=norms, impl=impl)

    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs, gradients)
    assert all(map(torch.equal, ours, step(inputs, gradients)))
