import pytest
import torch

from fused_objectives import gram
from fused_objectives.gram import aligned, gram_row_sums
from fused_objectives.segments import per_token, spans
from tests.kernels.accuracy import assert_as_accurate

# Padding before, between and behind; an empty sample, one of one token, ones of more than a tile and of more than two.
LENGTHS = [3, 0, 150, 1, 70]
SEGMENTS = torch.cat(
    [torch.full((5,), -1), torch.arange(5).repeat_interleave(torch.tensor(LENGTHS)), torch.tensor([-1])]
)
SEGMENTS = torch.cat([SEGMENTS[:8], torch.full((9,), -1), SEGMENTS[8:]])


def ranges(segments, samples=5):
    return [per_token(bounds, segments) for bounds in spans(segments, samples)]


def operands(place, rows, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator).to(place.device, place.dtype) for width in widths]


def dense(left_inputs, left_gradients, right_inputs, right_gradients, first, last, coefficients=1.0, bias=False):
    """The formula on whole matrices, in the dtype of the operands."""
    products = left_gradients @ right_gradients.T
    if left_inputs is not None:
        products = products * (left_inputs @ right_inputs.T + int(bias))
    j = torch.arange(len(right_gradients), device=first.device)
    counts = (first[:, None] <= j) & (j < last[:, None])
    return (torch.where(counts, products, 0) * coefficients).sum(1)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("d", "p"), [(5, 3), (48, 64), (130, 17), (16, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_each_rows_sum_is_the_formulas(place, impl, d, p, bias):
    left, right = operands(place, 77, (d, p)), operands(place, 201, (d, p), seed=1)
    bounds = torch.randint(0, 202, (2, 77), generator=torch.Generator().manual_seed(2)).to(place.device)
    bounds[:, :3] = torch.tensor([[9, 5, 0], [9, 4, 201]])  # two that meet none, one that meets all
    arguments = (*left, *right, *bounds)
    ours = gram_row_sums(*arguments, bias=bias, impl=impl)
    assert ours.dtype == torch.float32 and (ours[:2] == 0).all()
    exact = dense(*(x.double() for x in (*left, *right)), *bounds, bias=bias)
    assert_as_accurate(ours, dense(*arguments, bias=bias), exact)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_symmetric_half_counts_twice_but_for_the_diagonal(place, impl):
    inputs, gradients = operands(place, len(SEGMENTS), (20, 24))
    first, last = ranges(SEGMENTS.to(place.device))
    ours = gram_row_sums(inputs, gradients, inputs, gradients, first, last, symmetric=True, impl=impl)
    i = torch.arange(len(SEGMENTS), device=place.device)
    twice = 2 * (i < i[:, None]).to(torch.int64) + (i == i[:, None])
    same = (inputs, gradients) * 2
    exact = dense(*(x.double() for x in same), first, last, twice)
    assert_as_accurate(ours, dense(*same, first, last, twice), exact)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_pairs_of_equal_ids_count_and_without_inputs_the_factor_is_one(place, impl):
    (gradients,) = operands(place, len(SEGMENTS), (24,))
    first, last = ranges(SEGMENTS.to(place.device))
    ids = torch.randint(0, 5, (len(SEGMENTS),), generator=torch.Generator().manual_seed(3)).to(place.device)
    sides = (None, gradients) * 2
    ours = gram_row_sums(*sides, first, last, left_ids=ids, right_ids=ids, impl=impl)
    same = (ids[:, None] == ids).long()
    exact = dense(None, gradients.double(), None, gradients.double(), first, last, same)
    assert_as_accurate(ours, dense(*sides, first, last, same), exact)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_padding_may_hold_anything(place, impl):
    inputs, gradients = operands(place, len(SEGMENTS), (20, 24))
    first, last = ranges(SEGMENTS.to(place.device))
    arguments = {"symmetric": True, "bias": True, "impl": impl}
    clean = gram_row_sums(inputs, gradients, inputs, gradients, first, last, **arguments)
    inputs[SEGMENTS < 0], gradients[SEGMENTS < 0] = torch.nan, torch.inf
    assert torch.equal(gram_row_sums(inputs, gradients, inputs, gradients, first, last, **arguments), clean)
    assert (clean[SEGMENTS < 0] == 0).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_operands_may_be_views_of_any_stride(place, impl):
    inputs, gradients = operands(place, len(SEGMENTS), (32, 48))
    first, last = ranges(SEGMENTS.to(place.device))
    expected = gram_row_sums(inputs, gradients, inputs, gradients, first, last, impl=impl)
    wide = torch.full((len(inputs), 100), torch.nan, device=place.device, dtype=place.dtype)
    wide[:, 3:35] = inputs
    turned = gradients.T.contiguous().T
    strided = torch.stack([first, last], 1)
    ours = gram_row_sums(wide[:, 3:35], turned, wide[:, 3:35], turned, *strided.unbind(1), impl=impl)
    assert torch.equal(ours, expected)
    row = inputs[:1].expand(len(inputs), 32)
    ours = gram_row_sums(row, gradients, row, gradients, first, last, impl=impl)
    copy = row.contiguous()
    assert torch.equal(ours, gram_row_sums(copy, gradients, copy, gradients, first, last, impl=impl))


def test_what_is_aligned_is_not_copied():
    matrix = torch.randn(5, 48)
    assert aligned(matrix) is matrix
    view = matrix[:, 16:32]
    assert aligned(view) is view
    for other in (matrix[:, :20], matrix.T, torch.randn(5, 40)[:, :32]):
        copy = aligned(other)
        assert copy.shape[1] % 16 == 0 and copy.is_contiguous()
        assert torch.equal(copy[:, : other.shape[1]], other) and not copy[:, other.shape[1] :].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_nothing_sums_to_nothing(place, impl):
    empty, some = (torch.empty(rows, 4, device=place.device) for rows in (0, 6))
    bounds = torch.empty(2, 0, dtype=torch.int64, device=place.device)
    assert gram_row_sums(empty, empty, some, some, *bounds, impl=impl).shape == (0,)
    bounds = torch.zeros(2, 6, dtype=torch.int64, device=place.device)
    assert gram_row_sums(some, some, empty, empty, *bounds, impl=impl).tolist() == [0] * 6


def test_sides_that_do_not_match_are_refused():
    x, bounds = torch.zeros(3, 4), torch.zeros(2, 3, dtype=torch.int64)
    for inputs in ((x, None), (None, x)):
        with pytest.raises(ValueError, match="both sides"):
            gram_row_sums(inputs[0], x, inputs[1], x, *bounds)
    with pytest.raises(ValueError, match="both sides"):
        gram_row_sums(x, x, x, x, *bounds, left_ids=bounds[0])
    with pytest.raises(ValueError, match="no inputs"):
        gram_row_sums(None, x, None, x, *bounds, bias=True)
    with pytest.raises(ValueError, match="float64"):
        gram_row_sums(x, x, x, x.double(), *bounds)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_it_stands_in_a_compiled_graph(place, impl):
    inputs, gradients = operands(place, 20, (16, 32))
    bounds = torch.tensor([[0] * 20, [20] * 20], device=place.device)
    arguments = (inputs, gradients, inputs, gradients, *bounds, True, False, None, None, impl)
    torch.library.opcheck(gram._gram_row_sums, arguments)

    def norms(inputs, gradients):
        return gram_row_sums(inputs, gradients, inputs, gradients, *bounds, symmetric=True, impl=impl).sum()

    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs, gradients), norms(inputs, gradients))
