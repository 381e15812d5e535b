import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fused_objectives import linear_cross_entropy as module
from fused_objectives.linear_cross_entropy import (
    default_chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_gradients,
)
from fused_objectives.matmul import accumulate, accumulate_rows, multiply
from fused_objectives.softmax_epilogue import ALIGNMENT, Terms, softmax_epilogue
from fused_objectives.targets import IGNORED
from tests.kernels.accuracy import assert_as_accurate

PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "soft_cap": None}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 3.0}


class Batch(NamedTuple):
    """Inputs of the op."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    segments: torch.Tensor
    samples: int
    sample_weights: torch.Tensor | None
    token_weights: torch.Tensor | None

    def leaves(self) -> list[torch.Tensor]:
        return [x for x in self[:3] if x is not None]

    def fresh(self, dtype: torch.dtype | None = None) -> "Batch":
        """Detached, requiring gradients, in another dtype."""
        leaves = [x if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in self[:3]]
        return self._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2])

    def run(self, function=linear_cross_entropy, **options):
        weights = {"sample_weights": self.sample_weights, "token_weights": self.token_weights}
        return function(*self[:2], *self[3:6], bias=self.bias, **weights, **options)


def make(device="cpu", dtype=torch.float32, width=20, vocabulary=1013, bias=True, weights=True, scale=1.0, seed=0):
    """Five samples, one of them empty and one of one token, with padding and ignored tokens; some weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [13, 0, 24, 1, 7]
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    segments = torch.cat([torch.tensor([-1]), segments, torch.tensor([-1, -1])])
    tokens = len(segments)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.4] = IGNORED
    targets[38] = vocabulary - 1  # the sample of one token
    sample_weights, token_weights = (torch.rand(n, generator=generator) for n in (5, tokens))
    sample_weights[0], token_weights[20:23] = 0, 0
    floats = [
        torch.randn(shape, generator=generator) for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    ]
    hidden, weight, shift = (x.to(device, dtype) * scale for x in floats)
    moved = [x.to(device) if weights else None for x in (sample_weights, token_weights)]
    return Batch(hidden, weight, shift if bias else None, targets.to(device), segments.to(device), 5, *moved)


def losses_of(batch: Batch, label_smoothing, z_loss, soft_cap) -> torch.Tensor:
    """Plain torch on materialised logits: each token's loss, 0 where there is no target."""
    logits = F.linear(batch.hidden, batch.weight, batch.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    targets = torch.where(batch.segments < 0, IGNORED, batch.targets)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED)
    return losses + torch.where(targets == IGNORED, 0, z_loss * logits.logsumexp(1).square())


def weights_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample weight and token weight of each token."""
    spread = torch.where(batch.segments < 0, 0, batch.segments)
    ones = torch.ones(len(spread), device=spread.device)
    inner = ones if batch.token_weights is None else batch.token_weights
    return ones if batch.sample_weights is None else batch.sample_weights[spread], inner


def reference(batch: Batch, dtype=None, **terms):
    """Total, losses and gradients by autograd, in another dtype."""
    batch = batch.fresh(dtype)
    losses = losses_of(batch, **terms)
    outer, inner = weights_of(batch)
    total = (losses * inner * outer).sum()
    return total.detach(), losses.detach(), *torch.autograd.grad(total, batch.leaves())


def norms_of(batch: Batch, dtype=None, **terms) -> torch.Tensor:
    """Squared norms by one backward a sample."""
    batch = batch.fresh(dtype)
    losses = losses_of(batch, **terms) * weights_of(batch)[1]
    sums = [torch.where(batch.segments == sample, losses, 0).sum() for sample in range(batch.samples)]
    parameters = batch.leaves()[1:]
    gradients = [torch.autograd.grad(total, parameters, retain_graph=True) for total in sums]
    return torch.stack([sum(x.to(losses.dtype).square().sum() for x in of_sample) for of_sample in gradients])


def ours(batch: Batch, **options):
    """Output and gradients of the op."""
    batch = batch.fresh()
    output = batch.run(**options)
    return output, torch.autograd.grad(output.total, batch.leaves())


def assert_same(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert equality but for the order in which products were added up, by which a 16-bit logit may be rounded to its
    neighbour."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    ("shape", "terms"),
    [
        ({}, PLAIN),
        ({}, EVERYTHING),
        ({"bias": False, "weights": False}, {**PLAIN, "soft_cap": 5.0}),
        ({"bias": False, "vocabulary": 2049, "width": 33}, {**PLAIN, "label_smoothing": 1.0}),
        ({"vocabulary": 1, "width": 1}, {**PLAIN, "z_loss": 0.5}),
        ({"scale": 8.0}, PLAIN),
    ],
)
def test_losses_and_gradients_are_as_accurate_as_plain_torchs(place, impl, shape, terms):
    if "scale" in shape and place.dtype != torch.float32:
        pytest.skip("logits of hundreds, rounded to 16 bits, leave gradients to chance")
    batch = make(place.device, place.dtype, **shape)
    exact, plain = reference(batch, torch.float64, **terms), reference(batch, **terms)
    output, gradients = ours(batch, chunk_rows=7, impl=impl, **terms)
    for mine, simple, precise in zip((output.total, output.per_token, *gradients), plain, exact, strict=True):
        assert_as_accurate(mine.detach(), simple, precise, dtype=place.dtype)
    assert [x.dtype for x in gradients] == [x.dtype for x in batch.leaves()]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_sums_counts_and_log_normalizers_are_those_of_each_sample(place, impl):
    batch = make(place.device, place.dtype)
    output = batch.run(chunk_rows=6, impl=impl)
    is_target = (batch.targets != IGNORED) & (batch.segments >= 0)
    for sample in range(batch.samples):
        places = (batch.segments == sample) & is_target
        assert output.counts[sample] == places.sum()
        torch.testing.assert_close(output.sums[sample], (output.per_token * batch.token_weights)[places].sum())
    assert (output.per_token[~is_target] == 0).all() and (output.log_normalizers[~is_target] == 0).all()
    exact = F.linear(batch.hidden.double(), batch.weight.double(), batch.bias.double()).logsumexp(1)
    plain = F.linear(batch.hidden, batch.weight, batch.bias).float().logsumexp(1)
    assert_as_accurate(output.log_normalizers[is_target], plain[is_target], exact[is_target])
    assert output.squared_norms is None
    assert not any(x.requires_grad for x in ours(batch, impl=impl)[0][1:5])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("bias", "terms"), [(True, EVERYTHING), (False, PLAIN)])
@pytest.mark.parametrize(("chunk_rows", "longest"), [(4, None), (5, 20), (1000, 17), (1, None)])
def test_squared_norms_are_those_of_one_backward_a_sample(place, impl, bias, terms, chunk_rows, longest):
    if chunk_rows == 1 and (impl == "triton" or not bias):
        pytest.skip("one case of it is enough")
    batch = make(place.device, place.dtype, bias=bias, vocabulary=203)
    output = batch.run(squared_norms=True, chunk_rows=chunk_rows, longest=longest, impl=impl, **terms)
    assert_as_accurate(output.squared_norms, norms_of(batch, **terms).float(), norms_of(batch, torch.float64, **terms))
    assert output.counts.max() > 2 * 4  # a sample spans at least three chunks of four rows
    assert output.squared_norms[0] > 0 and batch.sample_weights[0] == 0
    assert output.squared_norms[1] == 0


def test_a_sample_longer_than_promised_gets_no_number_for_a_norm():
    batch = make()
    output = batch.run(squared_norms=True, chunk_rows=2, longest=4)
    assert torch.equal(output.squared_norms.isnan(), output.counts > 4)
    torch.testing.assert_close(output.squared_norms[3], norms_of(batch, **PLAIN)[3])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_agrees_with_liger_and_with_torchs_own(device, smoothing):
    batch = make(device, weights=False)
    targets = torch.where(batch.segments < 0, IGNORED, batch.targets)
    total, gradients = ours(batch, label_smoothing=smoothing)[0].total, ours(batch, label_smoothing=smoothing)[1]
    others = [lambda h, w, b: F.cross_entropy(F.linear(h, w, b), targets, reduction="sum", label_smoothing=smoothing)]
    if hasattr(F, "linear_cross_entropy"):
        options = {"reduction": "sum", "label_smoothing": smoothing}
        others.append(lambda h, w, b: F.linear_cross_entropy(h, w, targets, linear_bias=b, **options))
    liger = pytest.importorskip("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    others.append(lambda h, w, b: liger(reduction="sum", label_smoothing=smoothing)(w, h, targets, b))
    for other in others:
        leaves = batch.fresh().leaves()
        theirs = other(*leaves)
        torch.testing.assert_close(total, theirs)
        for mine, their in zip(gradients, torch.autograd.grad(theirs, leaves), strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_peaked_and_huge_logits_keep_their_digits(place, impl):
    width, vocabulary = 8, 37
    weight = torch.zeros(vocabulary, width)
    weight[3, 0], weight[5, 1], weight[5, 0], weight[:, 2] = 1, 1, -1, 1
    # Right by 20, wrong by 20, ±1e4, all alike at 1e4, and 1e4 right with all others at 9984.
    hidden = torch.tensor([[20.0, 0, 0], [20, 0, 0], [1e4, 0, 0], [0, -1e4, 0], [0, 0, 1e4], [16, 0, 9984]])
    hidden = F.pad(hidden, (0, width - 3))
    targets, segments = torch.tensor([3, 5, 3, 5, 7, 3]), torch.zeros(6, dtype=torch.int64)
    tensors = [x.to(place.device) for x in (hidden.to(place.dtype), weight.to(place.dtype), targets, segments)]
    batch = Batch(tensors[0], tensors[1], None, tensors[2], tensors[3], 1, None, None)
    exact, plain = reference(batch, torch.float64, **PLAIN), reference(batch, **PLAIN)
    output, gradients = ours(batch, impl=impl)
    for mine, simple, precise in zip((output.total, output.per_token, *gradients), plain, exact, strict=True):
        assert_as_accurate(mine.detach(), simple, precise)
    huge = float(batch.hidden[2, 0])  # in 16 bits not quite 1e4
    assert torch.allclose(
        output.log_normalizers.cpu()[2:5].double(), torch.tensor([huge, math.log(36), huge + math.log(37)]).double()
    )


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_impossible_entry_has_no_probability_and_no_gradient(place, impl):
    batch = make(place.device, place.dtype, vocabulary=131)
    batch.bias[7], batch.bias[100:] = -torch.inf, -torch.inf
    possible = batch._replace(targets=torch.where(batch.targets >= 0, batch.targets % 7, IGNORED))
    output, (d_hidden, d_weight, d_bias) = ours(possible, impl=impl)
    assert output.total.isfinite() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert (d_bias[100:] == 0).all() and (d_weight[7] == 0).all() and (d_weight[6] != 0).any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gradients_follow_what_arrives_at_the_total(device, impl):
    batch = make(device, vocabulary=53)
    plain = ours(batch, impl=impl)[1]
    for use, factor in (
        (lambda total: total * 2 + total, 3),
        (lambda total: total.expand(4).sum(), 4),
        (lambda total: (total.expand(3) * torch.ones((), device=device).expand(3)).sum(), 3),
        (lambda total: total / 3, 1 / 3),
    ):
        fresh = batch.fresh()
        use(fresh.run(impl=impl).total).backward()
        for leaf, gradient in zip(fresh.leaves(), plain, strict=True):
            torch.testing.assert_close(leaf.grad, gradient * factor)


def test_a_16_bit_gradient_is_scaled_without_rounding_the_scale():
    batch = make(dtype=torch.bfloat16, vocabulary=53).fresh()
    total = batch.run().total
    whole = torch.autograd.grad(total, batch.leaves(), retain_graph=True)
    third = torch.autograd.grad(total / 3, batch.leaves())
    for one, other in zip(whole, third, strict=True):
        assert torch.equal(other, (one.float() / 3).to(torch.bfloat16))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    "which", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_gradients_that_are_asked_for_are_computed(device, monkeypatch, impl, which):
    products = []
    for name in ("multiply", "accumulate", "accumulate_rows"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: products.append(n) or f(*a, **k))
    batch = make(device, vocabulary=53)
    complete = ours(batch, impl=impl)[1]
    products.clear()
    leaves = [x.clone().requires_grad_(needed) for x, needed in zip(batch[:3], which, strict=True)]
    total = batch._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2]).run(impl=impl).total
    total.backward()
    for leaf, needed, gradient in zip(leaves, which, complete, strict=True):
        assert (leaf.grad is not None) == needed
        assert not needed or torch.equal(leaf.grad, gradient)
    expected = ("multiply", "accumulate", "accumulate_rows")
    assert products == [name for name, needed in zip(expected, which, strict=True) if needed]


def test_without_gradients_logits_are_computed_once_and_nothing_else(monkeypatch):
    for name in ("multiply", "accumulate", "accumulate_rows"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a gradient was computed"))
    batch = make(vocabulary=53)
    with torch.no_grad():
        total = batch.fresh().run().total
    assert not total.requires_grad
    assert torch.equal(total, batch.run().total)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gradients_computed_anew_are_those_of_the_total(device, impl):
    batch = make(device, vocabulary=53)
    expected = ours(batch, impl=impl, chunk_rows=5, **EVERYTHING)[1]
    again = batch.fresh().run(linear_cross_entropy_gradients, impl=impl, chunk_rows=5, **EVERYTHING)
    assert all(map(torch.equal, again, expected)) and not any(x.requires_grad for x in again)
    function = linear_cross_entropy_gradients
    assert [x is None for x in batch.run(function, weight_gradient=False)] == [False, True, True]
    assert [x is None for x in batch.run(function, hidden_gradient=False)] == [True, False, False]
    assert [x is None for x in batch._replace(bias=None).run(function)] == [False, False, True]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_gradients_by_the_logits_are_kept_for_weights_that_are_known_later(place, impl, chunk_rows):
    batch = make(place.device, place.dtype, vocabulary=53)
    options = {"impl": impl, "chunk_rows": chunk_rows, **EVERYTHING}
    _, *expected = batch.run(linear_cross_entropy_gradients, **options)
    loss = batch._replace(sample_weights=None).run(squared_norms=True, logit_gradients=True, **options)
    slopes, places = loss.logit_gradients.double(), loss.places
    is_target = (batch.targets != IGNORED) & (batch.segments >= 0)
    assert places[places >= 0].tolist() == is_target.nonzero()[:, 0].tolist() and not slopes[places < 0].any()
    weighted = slopes * torch.where(places < 0, 0, batch.sample_weights[batch.segments[places]])[:, None]
    for mine, theirs in zip((weighted.T @ batch.hidden[places].double(), weighted.sum(0)), expected, strict=True):
        assert_same(mine.to(place.dtype), theirs, place.dtype)
    assert_same(loss.squared_norms, batch.run(squared_norms=True, **options).squared_norms, place.dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_strides_do_not_matter(place, impl):
    batch = make(place.device, place.dtype, vocabulary=53)._replace(token_weights=torch.full((48,), 2.0))
    batch = batch._replace(token_weights=batch.token_weights.to(place.device))
    plain, gradients = ours(batch, impl=impl, chunk_rows=8)
    columns = [torch.stack([x, torch.full_like(x, 7)], 1)[:, 0] for x in (batch.bias, batch.targets, batch.segments)]
    hidden, weight = (x.t().contiguous().t().requires_grad_() for x in batch[:2])
    strided = Batch(
        hidden,
        weight,
        columns[0].requires_grad_(),
        *columns[1:],
        5,
        torch.stack([batch.sample_weights] * 2, 1)[:, 1],
        torch.full((), 2.0, device=place.device).expand(48),
    )
    output = strided.run(impl=impl, chunk_rows=8)
    assert_same(output.per_token, plain.per_token, place.dtype)
    for mine, simple in zip(torch.autograd.grad(output.total, strided.leaves()), gradients, strict=True):
        assert_same(mine, simple, place.dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_tied_weight_gets_the_gradients_of_both_uses(device, impl):
    batch = make(device, vocabulary=53)
    tokens = torch.arange(48, device=device) % 53
    gradients = []
    for loss in (lambda b: b.run(impl=impl).total, lambda b: (losses_of(b, **PLAIN) * math.prod(weights_of(b))).sum()):
        weight = batch.weight.clone().requires_grad_()
        loss(batch._replace(hidden=batch.hidden + weight[tokens], weight=weight)).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("tokens", "samples"), [(0, 0), (0, 3), (6, 0), (6, 2)])
def test_without_targets_everything_is_zero(place, impl, tokens, samples):
    made = make(place.device, place.dtype, vocabulary=53)
    segments = torch.full((tokens,), -1 if samples == 0 else 1, device=place.device)
    targets = torch.full((tokens,), IGNORED, device=place.device)
    batch = Batch(made.hidden[:tokens], made.weight, made.bias, targets, segments, samples, None, None)
    for capacity in (None, 0, 4):
        output, gradients = ours(batch, squared_norms=True, capacity=capacity, impl=impl)
        assert output.total == 0 and (output.per_token == 0).all() and output.per_token.shape == (tokens,)
        assert output.sums.tolist() == output.counts.tolist() == output.squared_norms.tolist() == [0] * samples
        assert all((x == 0).all() for x in gradients)
        assert [x.shape for x in gradients] == [x.shape for x in batch.leaves()]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_one_target_is_enough(place, impl):
    batch = make(place.device, place.dtype, vocabulary=53)
    targets = torch.full_like(batch.targets, IGNORED)
    targets[30] = 5
    batch = batch._replace(targets=targets)
    output = batch.run(squared_norms=True, impl=impl)
    assert output.counts.tolist() == [0, 0, 1, 0, 0]
    losses = reference(batch, **PLAIN)[1], reference(batch, torch.float64, **PLAIN)[1]
    assert_as_accurate(output.per_token, *losses, dtype=place.dtype)
    norms = norms_of(batch, **PLAIN).float(), norms_of(batch, torch.float64, **PLAIN)
    assert_as_accurate(output.squared_norms, *norms, dtype=place.dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_room_for_more_targets_changes_nothing(place, impl):
    batch = make(place.device, place.dtype, vocabulary=53)
    hidden = batch.hidden.clone()
    hidden[(batch.targets == IGNORED) | (batch.segments < 0)] = torch.nan  # not even read into a product
    batch = batch._replace(hidden=hidden)
    count = int(ours(batch, impl=impl)[0].counts.sum())
    options = {"squared_norms": True, "chunk_rows": 9, "impl": impl, **EVERYTHING}
    expected, gradients = ours(batch, capacity=count, **options)
    assert expected.total.isfinite()
    for capacity in (count + 5, 48, 1000):
        output, others = ours(batch, capacity=capacity, **options)
        for mine, theirs in zip((*output, *others), (*expected, *gradients), strict=True):
            assert_same(mine, theirs, place.dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("missing", [1, 20])
def test_without_room_for_all_targets_sums_norms_and_gradients_are_nan_and_counts_exact(place, impl, missing):
    batch = make(place.device, place.dtype, vocabulary=53)
    counts = batch.run(impl=impl).counts
    for capacity in (int(counts.sum()) - missing, 0):
        output, gradients = ours(batch, capacity=capacity, squared_norms=True, chunk_rows=9, impl=impl)
        assert torch.equal(output.counts, counts)
        for values in (output.total, output.sums, output.squared_norms, *gradients[1:]):
            assert values.isnan().all()
        assert gradients[0].isnan().any()
        options = {"capacity": capacity, "impl": impl}
        alone = batch.run(linear_cross_entropy_gradients, weight_gradient=False, **options)[0]
        assert torch.equal(alone.isnan(), gradients[0].isnan())
        assert all(x.isnan().all() for x in batch.run(linear_cross_entropy_gradients, **options)[1:])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_how_many_rows_a_chunk_has_does_not_matter(place, impl):
    batch = make(place.device, place.dtype, vocabulary=53)
    expected, gradients = ours(batch, chunk_rows=1000, impl=impl)
    for chunk_rows in (1, 3, 23):
        output, others = ours(batch, chunk_rows=chunk_rows, impl=impl)
        for mine, theirs in zip((*output[:5], *others), (*expected[:5], *gradients), strict=True):
            assert_same(mine, theirs, place.dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("label", [-1, 53, 2**40])
@pytest.mark.parametrize("terms", [PLAIN, EVERYTHING])
def test_a_label_outside_the_vocabulary_poisons_its_sample_and_the_gradients(place, impl, label, terms):
    batch = make(place.device, place.dtype, vocabulary=53)
    targets = batch.targets.clone()
    targets[20] = label  # weighs 0, which does not hide it
    output, gradients = ours(batch._replace(targets=targets), squared_norms=True, impl=impl, **terms)
    assert output.total.isnan() and output.per_token.isnan().nonzero().tolist() == [[20]]
    for values in (output.sums, output.squared_norms):
        assert values.isnan().tolist() == [False, False, True, False, False]
    counted = (targets != IGNORED) & (batch.segments == torch.arange(5, device=place.device)[:, None])
    assert torch.equal(output.counts, counted.sum(1))
    assert gradients[0].isnan().any(1).nonzero().tolist() == [[20]]
    assert all(x.isnan().all() for x in gradients[1:])


def test_under_autocast_products_are_of_its_dtype_and_gradients_of_the_parameters(place):
    batch = make(place.device)
    halved = batch._replace(hidden=batch.hidden.bfloat16(), weight=batch.weight.bfloat16())
    expected, gradients = ours(halved, **EVERYTHING)
    with torch.autocast(place.device, torch.bfloat16):
        output, others = ours(batch, **EVERYTHING)
    assert torch.equal(output.per_token, expected.per_token)
    assert all(x.dtype == torch.float32 for x in others)
    for mine, theirs in zip(others, gradients, strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel_writes_every_row_and_reads_no_ignored_one(place, gradient):
    logits = torch.full((3, 5 * ALIGNMENT), torch.nan, device=place.device, dtype=place.dtype)
    logits[1] = torch.arange(5 * ALIGNMENT, device=place.device) % 11
    labels, weights = torch.tensor([IGNORED, 4, IGNORED], device=place.device), torch.ones(3, device=place.device)
    losses, log_normalizers = (torch.full((3,), torch.nan, device=place.device) for _ in range(2))
    view = logits[:, :301]
    softmax_epilogue(
        view, None, labels, weights, Terms(0.1, 0.1, 4.0), gradient, losses, log_normalizers, impl="triton"
    )
    assert losses.isfinite().all() and losses[0] == losses[2] == log_normalizers[0] == 0
    assert logits[0, 301:].isnan().all()
    if gradient:
        assert view.isfinite().all() and (view[::2] == 0).all() and (view[1] != 0).any()
    with pytest.raises(ValueError, match="apart"):
        softmax_epilogue(
            logits[:, :1].t(), None, labels, weights, Terms(0, 0, None), True, losses, losses, impl="triton"
        )


def test_products_of_16_bit_numbers_are_added_up_in_float32(place):
    left, right = (torch.randn(shape, device=place.device).to(torch.bfloat16) for shape in ((5, 700), (700, 3)))
    exact = left.double() @ right.double()
    assert torch.allclose(multiply(left, right).double(), exact, atol=1e-4)
    sums = torch.full((5, 3), 1000.0, device=place.device)
    for _ in range(3):
        accumulate(sums, left, right)
    assert torch.allclose(sums.double(), 1000 + 3 * exact, atol=1e-2)
    assert torch.allclose(multiply(left.float(), right.float()).double(), exact, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_weighted_rows_are_added_to_what_is_there(place, impl):
    for rows, columns in ((70, 301), (1, 1), (0, 5)):
        matrix = torch.randn(rows, 320, device=place.device).to(place.dtype)[:, :columns]
        weights, sums = torch.randn(rows, device=place.device), torch.randn(columns, device=place.device)
        expected = sums.double() + weights.double() @ matrix.double()
        accumulate_rows(sums, matrix, weights, impl)
        assert torch.allclose(sums.double(), expected, atol=1e-4)


def test_a_chunk_of_logits_takes_32_mib_or_512_rows():
    assert default_chunk_rows(30522, torch.bfloat16) == 512
    assert default_chunk_rows(8192, torch.bfloat16) == 2048
    assert default_chunk_rows(8192, torch.float32) == 1024
    assert default_chunk_rows(262144, torch.float32) == 512
    assert default_chunk_rows(10007, torch.bfloat16) % 128 == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"soft_cap": 0.0}, "soft_cap"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"impl": "fast"}, "impl"),
    ],
)
def test_numbers_without_meaning_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make().run(**wrong)


def test_tensors_that_do_not_fit_are_refused():
    batch = make()
    for wrong, message in (
        ({"segments": batch.segments[1:]}, r"^segments: \[47\] is not \[N\], with S = 5, N = 48"),
        ({"hidden": batch.hidden[:, 1:]}, r"^weight: \[1013, 20\] is not \[V, d\], with S = 5, N = 48, d = 19"),
        ({"weight": batch.weight.double()}, r"^hidden is torch\.float32, weight torch\.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            batch._replace(**wrong).run()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_it_is_a_proper_operator_and_compiles_into_one_graph(device, impl):
    batch = make(device, vocabulary=53)

    def step(*tensors):
        fresh = batch._replace(hidden=tensors[0], weight=tensors[1], bias=tensors[2])
        output = fresh.run(impl=impl, chunk_rows=9, squared_norms=True)
        return output.total * 2, output.sums, output.squared_norms

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = batch.fresh().leaves()
        total, *rest = function(*leaves)
        results.append((total.detach(), *rest, *torch.autograd.grad(total, leaves)))
    assert all(map(torch.equal, *results))

    leaves = batch.fresh().leaves()
    weights = (batch.sample_weights, batch.token_weights, 0.1, 0.01, 3.0)
    sizes, sampling = (None, 9, None, True, False), (None, None, None, 0, "", 1.0)
    arguments = (*leaves, batch.targets, batch.segments, 5, *weights, *sizes, *sampling)
    torch.library.opcheck(module._head, (*arguments, True, True, True, torch.float32, impl))
    torch.library.opcheck(module._head, (*arguments, True, False, False, torch.float32, impl))
    keeping = (*arguments[:14], True, *arguments[15:])
    torch.library.opcheck(module._head, (*keeping, True, False, False, torch.float32, impl))


def test_torchs_flop_counter_sees_the_products_over_the_targets():
    hidden, weight = torch.randn(33, 16), torch.randn(101, 16)
    targets, segments = torch.randint(0, 101, (33,)), torch.zeros(33, dtype=torch.int64)
    for products, (hidden_gradient, weight_gradient) in ((1, (False, False)), (2, (True, False)), (3, (True, True))):
        hidden.requires_grad_(hidden_gradient)
        weight.requires_grad_(weight_gradient)
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, targets, segments, 1, capacity=20)
        assert counter.get_total_flops() == products * 2 * 20 * 16 * 101
