import pytest
import torch
from torch import nn

from fused_objectives import sketched_norms as module
from fused_objectives.sketched_norms import sketched_norms
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import SAMPLES, packed_segments, plain_and_exact_norms, random_matrix

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])


@IMPLS
@pytest.mark.parametrize("size", [1, 16, 33, 128])
def test_an_estimate_is_the_norm_of_each_samples_projected_gradient(place, impl, size):
    inputs, gradients = random_matrix(place, 40), random_matrix(place, 24, seed=1)
    segments = packed_segments(place.device)
    signs = module._signs_torch(64, size, 3, "sketch", inputs)
    projected = inputs.double() @ signs[:40].double(), gradients.double() @ signs[40:].double()
    _, exact = plain_and_exact_norms(nn.Linear(size, size, bias=False), *projected, segments)
    projected = inputs @ signs[:40], gradients @ signs[40:]
    plain, _ = plain_and_exact_norms(nn.Linear(size, size, bias=False), *projected, segments)
    ours = sketched_norms(inputs, gradients, segments, SAMPLES, seed=3, stream="sketch", size=size, impl=impl)
    assert ours.dtype == torch.float32 and ours[1] == 0
    assert_as_accurate(ours, plain / size**2, exact / size**2)


def test_kernel_and_twin_draw_the_same_signs(place):
    like = torch.empty(0, device=place.device, dtype=place.dtype)
    for rows, size in ((1, 1), (65, 32), (130, 50), (7, 128)):
        for seed in (0, 2**32 - 1, 2**40 + 5, -1):
            arguments = rows, size, seed, "signs", like
            ours = module._signs_triton(*arguments)
            assert torch.equal(ours, module._signs_torch(*arguments)) and (ours.abs() == 1).all()


def test_signs_are_even_and_independent_between_rows_columns_streams_and_seeds():
    like = torch.empty(0)
    signs = module._signs_torch(4096, 128, 1, "a", like)
    for other in (signs.roll(1, 0), signs.roll(1, 1), *(module._signs_torch(4096, 128, *key, like) for key in KEYS)):
        assert abs((signs * other).sum()) < 5 * 4096**0.5 * 128**0.5
    assert (signs.sum(0).abs() < 5 * 64).all() and (signs.sum(1).abs() < 5 * 128**0.5 + 8).all()


KEYS = ((2, "a"), (1, "b"))


def test_the_mean_over_seeds_is_the_exact_norm_within_its_standard_error():
    """Samples of low and of high rank."""
    inputs, gradients = torch.randn(2, 60, 20, generator=torch.Generator().manual_seed(0))
    segments = torch.arange(3).repeat_interleave(torch.tensor([1, 9, 50]))
    exact = [(gradients[segments == s].T @ inputs[segments == s]).square().sum() for s in range(3)]
    estimates = torch.stack(
        [sketched_norms(inputs, gradients, segments, 3, seed=seed, stream="s", size=4) for seed in range(600)]
    ).double()
    error = estimates.std(0) / 600**0.5
    deviation = (estimates.mean(0) - torch.stack(exact).double()).abs() / error
    assert (deviation < 4).all(), deviation
    spread = estimates.std(0) / torch.stack(exact)
    assert (spread < 1.3 * (4 / 4) ** 0.5).all() and spread[2] < spread[0], spread


def test_a_larger_sketch_is_a_surer_one():
    inputs, gradients = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(30, dtype=torch.int64)

    def spread(size):
        seeds = range(100)
        draws = [sketched_norms(inputs, gradients, segments, 1, seed=s, stream="s", size=size) for s in seeds]
        return float(torch.cat(draws).std())

    assert spread(32) < spread(8) / 1.5 < spread(2) / 2


@pytest.mark.parametrize("size", [0, -1, 129])
def test_a_size_that_one_call_of_philox_cannot_serve_is_refused(size):
    with pytest.raises(ValueError, match=r"1 \.\. 128"):
        sketched_norms(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1).long(), 1, seed=0, stream="s", size=size)


@IMPLS
def test_nothing_has_no_norms(place, impl):
    for rows, samples in ((0, 0), (0, 2), (4, 0), (4, 2)):
        matrix, segments = random_matrix(place, 8, rows=rows), torch.full((rows,), -1, device=place.device)
        ours = sketched_norms(matrix, matrix, segments, samples, seed=0, stream="s", impl=impl)
        assert ours.tolist() == [0] * samples


@IMPLS
def test_it_stands_in_a_compiled_graph(place, impl):
    inputs, gradients = random_matrix(place, 32), random_matrix(place, 48, seed=1)
    segments = packed_segments(place.device)
    torch.library.opcheck(module._sketched_norms, (inputs, gradients, segments, SAMPLES, 5, "s", 16, impl))

    def norms(inputs, gradients):
        return sketched_norms(inputs, gradients, segments, SAMPLES, seed=5, stream="s", impl=impl)

    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs, gradients), norms(inputs, gradients))
