import pytest
import torch
from torch import nn

from fused_objectives import vector_gradients as module
from fused_objectives.vector_gradients import bias_gradients, layer_norm_gradients
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import SAMPLES, gradients_one_by_one, packed_segments, random_matrix

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])
WIDTHS = pytest.mark.parametrize("width", [1, 20, 64, 1100])
EPS = 1e-3


class Bias(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, inputs):
        return inputs + self.bias


def plain_and_exact(module, inputs, gradients, segments):
    """Return each sample's gradients of the module's vectors, ``[k, S, p]``, in their own dtype and in fp64."""
    module, found = module.to(gradients.device), []
    for dtype in (gradients.dtype, torch.float64):
        samples = gradients_one_by_one(module.to(dtype), inputs.to(dtype), gradients.to(dtype), segments)
        found.append(torch.stack([torch.stack(each) for each in zip(*samples, strict=True)]))
    return found


@IMPLS
@WIDTHS
def test_a_biass_gradients_are_those_of_autograd_on_each_sample_alone(place, impl, width):
    segments, gradients = packed_segments(place.device), random_matrix(place, width)
    plain, exact = plain_and_exact(Bias(width), gradients, gradients, segments)
    gradients[segments < 0] = torch.nan
    ours = bias_gradients(gradients, segments, SAMPLES, impl=impl)
    assert ours.dtype == torch.float32 and not ours[1].any()
    assert_as_accurate(ours[None], plain, exact)


@IMPLS
@WIDTHS
@pytest.mark.parametrize("kind", ["layer norm", "without shift", "rms norm"])
def test_a_normalisations_gradients_are_those_of_autograd_on_each_sample_alone(place, impl, width, kind):
    segments, gradients = packed_segments(place.device), random_matrix(place, width)
    inputs = random_matrix(place, width, seed=1) * 2 + 3
    rms, shift = kind == "rms norm", kind == "layer norm"
    norm = nn.RMSNorm(width, eps=EPS) if rms else nn.LayerNorm(width, eps=EPS, bias=shift)
    plain, exact = plain_and_exact(norm, inputs, gradients, segments)
    inputs[segments < 0], gradients[segments < 0] = torch.nan, torch.inf
    ours = layer_norm_gradients(gradients, inputs, segments, SAMPLES, eps=EPS, rms=rms, shift=shift, impl=impl)
    assert ours.dtype == torch.float32 and not ours[:, 1].any()
    assert_as_accurate(ours, plain, exact)


@IMPLS
def test_operands_may_be_views_of_any_stride_and_of_two_dtypes(place, impl):
    segments, gradients, inputs = packed_segments(place.device), random_matrix(place, 40), random_matrix(place, 40, 1)
    arguments = {"eps": EPS, "impl": impl}
    expected = layer_norm_gradients(gradients, inputs, segments, SAMPLES, **arguments)
    turned, wide = gradients.T.contiguous().T, torch.cat([inputs, inputs], 1)[:, 40:]
    for others in ((turned, wide), (gradients.float(), inputs)):  # threads share their sums out otherwise
        torch.testing.assert_close(layer_norm_gradients(*others, segments, SAMPLES, **arguments), expected)
    ones = torch.ones((), device=place.device, dtype=place.dtype).expand(len(segments), 40)
    assert bias_gradients(ones, segments, SAMPLES, impl=impl).tolist() == [[n] * 40 for n in (5, 0, 1, 70, 33)]


@IMPLS
def test_nothing_has_no_gradients(place, impl):
    for rows, samples, width in ((0, 0, 8), (0, 2, 8), (4, 0, 8), (4, 2, 8), (4, 2, 0)):
        matrix = torch.empty(rows, width, device=place.device, dtype=place.dtype)
        segments = torch.full((rows,), -1, device=place.device)
        ours = bias_gradients(matrix, segments, samples, impl=impl)
        assert torch.equal(ours, torch.zeros(samples, width, device=place.device))
        ours = layer_norm_gradients(matrix, matrix, segments, samples, eps=EPS, impl=impl)
        assert torch.equal(ours, torch.zeros(2, samples, width, device=place.device))


@IMPLS
def test_they_stand_in_a_compiled_graph(place, impl):
    segments, gradients, inputs = packed_segments(place.device), random_matrix(place, 32), random_matrix(place, 32, 1)
    torch.library.opcheck(module._bias_gradients, (gradients, segments, SAMPLES, impl))
    torch.library.opcheck(module._layer_norm_gradients, (gradients, inputs, segments, SAMPLES, EPS, False, True, impl))

    def found(gradients, inputs):
        bias = bias_gradients(gradients, segments, SAMPLES, impl=impl)
        return bias + layer_norm_gradients(gradients, inputs, segments, SAMPLES, eps=EPS, impl=impl)

    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gradients, inputs), found(gradients, inputs))
