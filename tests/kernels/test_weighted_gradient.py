import pytest
import torch
from torch import nn

from fused_objectives import weighted_gradient as module
from fused_objectives.segments import per_token
from fused_objectives.weighted_gradient import weighted_gradient
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import gradients_one_by_one, packed_segments, random_matrix

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])
WEIGHTS = torch.tensor([0.3, 3.0, -2.0, 0.0, 1.7])


@IMPLS
@pytest.mark.parametrize(("d", "p"), [(24, 10), (10, 24), (1100, 1100)])
def test_it_is_the_weighted_sum_of_each_samples_own_gradient(place, impl, d, p):
    inputs, gradients, segments = random_matrix(place, d), random_matrix(place, p, 1), packed_segments(place.device)
    weights = WEIGHTS.to(place.device)
    linear = nn.Linear(d, p, bias=False).to(place.device).double()
    samples = gradients_one_by_one(linear, inputs.double(), gradients.double(), segments)
    exact = sum(w * gradient for w, [gradient] in zip(weights.double(), samples, strict=True))
    scaled = (gradients * per_token(weights, segments)[:, None]).to(place.dtype)
    narrower = inputs if d < p else gradients
    narrower[segments < 0], narrower[segments == 3] = torch.nan, torch.inf  # padding, and what weighs 0
    ours = weighted_gradient(inputs, gradients, segments, weights, impl=impl)
    assert ours.dtype == place.dtype
    assert_as_accurate(ours, scaled.T @ torch.where(inputs.isfinite(), inputs, 0), exact)
    wide = weighted_gradient(inputs, gradients, segments, weights, dtype=torch.float32, impl=impl)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(place.dtype), ours)


@IMPLS
def test_operands_may_be_views_of_any_stride(place, impl):
    segments, weights = packed_segments(place.device), WEIGHTS.to(place.device)
    inputs, gradients = random_matrix(place, 48), random_matrix(place, 32, seed=1)
    scaled = gradients * per_token(weights, segments)[:, None]
    turned, wide = gradients.T.contiguous().T, torch.cat([inputs, inputs], 1)[:, 48:]
    ours = weighted_gradient(wide, turned, segments, weights, impl=impl)
    assert_as_accurate(ours, scaled.to(place.dtype).T @ inputs, scaled.double().T @ inputs.double())
    row = gradients[:1].expand(len(segments), 32)
    expected = weighted_gradient(inputs, row.contiguous(), segments, weights, impl=impl)
    assert torch.equal(weighted_gradient(inputs, row, segments, weights, impl=impl), expected)


@IMPLS
def test_nothing_adds_up_to_zeros(place, impl):
    for rows, samples in ((0, 0), (0, 2), (4, 0), (4, 2)):
        inputs, gradients = random_matrix(place, 8, rows=rows), random_matrix(place, 16, rows=rows)
        segments, weights = torch.full((rows,), -1, device=place.device), torch.ones(samples, device=place.device)
        ours = weighted_gradient(inputs, gradients, segments, weights, impl=impl)
        assert ours.shape == (16, 8) and not ours.any()


@IMPLS
def test_it_stands_in_a_compiled_graph(place, impl):
    segments, weights = packed_segments(place.device), WEIGHTS.to(place.device)
    inputs, gradients = random_matrix(place, 16), random_matrix(place, 32, seed=1)
    arguments = (inputs, gradients, segments, weights, torch.float32, impl)
    torch.library.opcheck(module._weighted_gradient, arguments)

    def step(inputs, gradients, weights):
        return weighted_gradient(inputs, gradients, segments, weights, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs, gradients, weights), step(inputs, gradients, weights))
