import numpy as np
import torch

from fused_objectives.segments import per_token, spans, sum_per_sample

# Padding before, between and behind; sample 2 is empty, sample 4 has one token, sample 3 stands before sample 1.
SEGMENTS = torch.tensor([-1, 0, 0, 0, 3, 3, -1, -1, 1, 1, 1, 1, 1, 4, -1])


def test_a_span_is_the_run_of_its_sample_wherever_it_stands():
    starts, ends = spans(SEGMENTS, 5)
    lengths = [3, 5, 0, 2, 1]
    assert (ends - starts).tolist() == lengths
    for sample, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        assert (SEGMENTS[start:end] == sample).all() and end - start == lengths[sample]


def test_spans_of_nothing_are_empty():
    assert [bound.tolist() for bound in spans(SEGMENTS[:0], 2)] == [[0, 0], [0, 0]]
    assert [bound.shape for bound in spans(SEGMENTS[:0], 0)] == [(0,), (0,)]
    starts, ends = spans(torch.full((7,), -1), 3)
    assert torch.equal(starts, ends)


def test_the_kernel_finds_the_same_spans(place):
    rng = np.random.default_rng(0)
    lengths = [1, 0, 300, 257, 5, 0, 1023, 1]
    order = rng.permutation(len(lengths))
    segments = np.concatenate([np.repeat([-1, sample], [rng.integers(0, 3), lengths[sample]]) for sample in order])
    cases = [
        (SEGMENTS, 5),
        (torch.tensor(segments), 8),
        (torch.full((7,), -1), 3),
        (SEGMENTS[:0], 2),
        (SEGMENTS[:1], 0),
    ]
    cases.append((torch.stack([SEGMENTS, SEGMENTS + 1], 1)[:, 0], 5))
    for segments, samples in cases:
        starts, ends = spans(segments, samples)
        found = [bounds.cpu() for bounds in spans(segments.to(place.device), samples, impl="triton")]
        assert torch.equal(found[1] - found[0], ends - starts)
        assert torch.equal(found[0][ends > starts], starts[ends > starts])


def test_values_are_spread_over_their_samples_and_padding_gets_zero():
    values = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert per_token(values, SEGMENTS).tolist() == [0, 10, 10, 10, 40, 40, 0, 0, 20, 20, 20, 20, 20, 50, 0]
    assert per_token(values[:0], torch.full((3,), -1)).tolist() == [0, 0, 0]


def test_sums_equal_numpys_and_leave_padding_out(place):
    rng = np.random.default_rng(0)
    lengths = [1, 0, 300, 257, 5, 0, 1023]
    segments = np.repeat(np.arange(len(lengths)), lengths)
    segments = np.insert(segments, [0, 1, 301, len(segments)], -1)
    values = rng.normal(size=len(segments))
    expected = [values[segments == sample].sum() for sample in range(len(lengths))]
    ours = torch.tensor(values, device=place.device).to(place.dtype)
    exact = ours.double().cpu().numpy()
    expected = [exact[segments == sample].sum() for sample in range(len(lengths))]
    arguments = torch.tensor(segments, device=place.device), len(lengths)
    for impl in ("triton", "torch"):
        sums = sum_per_sample(ours, *arguments, impl=impl)
        assert sums.dtype == torch.float32
        assert np.allclose(sums.cpu(), expected, rtol=1e-5, atol=1e-5)
    strided = torch.stack([ours, torch.full_like(ours, torch.nan)], 1)[:, 0]
    assert torch.equal(sum_per_sample(strided, *arguments, impl="triton").cpu(), sum_of(ours, arguments).cpu())
    ones = torch.ones((), device=place.device, dtype=place.dtype).expand(len(segments))
    assert sum_per_sample(ones, *arguments, impl="triton").tolist() == lengths


def sum_of(values, arguments):
    return sum_per_sample(values, *arguments, impl="triton")


def test_sums_without_samples_or_tokens_are_empty_or_zero(place):
    nothing = torch.empty(0, device=place.device, dtype=torch.int64)
    assert sum_per_sample(nothing.float(), nothing, 0, impl="triton").shape == (0,)
    assert sum_per_sample(nothing.float(), nothing, 3, impl="triton").tolist() == [0, 0, 0]
