import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_objectives import embedding_norms as module
from fused_objectives.embedding_norms import embedding_norms, tied_cross_term
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import SAMPLES, packed_segments, plain_and_exact_norms, random_matrix

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])
V, D = 40, 24
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "capped": {"soft_cap": 3.0, "bias": True, "label_smoothing": 0.2, "z_loss": 1e-2},
}


def random_tokens(place, few=V):
    segments = packed_segments(place.device)
    tokens = torch.randint(0, few, segments.shape, generator=torch.Generator().manual_seed(5)).to(place.device)
    return tokens, segments


@IMPLS
@pytest.mark.parametrize("few", [1, 3, V])
def test_an_embeddings_norms_are_those_of_autograd_on_each_sample_alone(place, impl, few):
    """Fewer tokens than places, so that many repeat."""
    tokens, segments = random_tokens(place, few)
    gradients = random_matrix(place, D)
    plain, exact = plain_and_exact_norms(nn.Embedding(V, D), tokens, gradients, segments)
    gradients[segments < 0], tokens[segments < 0] = torch.nan, -7
    ours = embedding_norms(gradients, tokens, segments, SAMPLES, impl=impl)
    assert ours.dtype == torch.float32 and ours[1] == 0 and (ours >= 0).all()
    assert_as_accurate(ours, plain, exact)


def loss_of(hidden, weight, bias, targets, token_weights, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    """Return the weighted sum of the cross entropies, and their logsumexps."""
    logits = F.linear(hidden, weight, bias)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    normalizers = logits.logsumexp(1)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return ((losses + z_loss * normalizers.square()) * token_weights).sum(), normalizers


class Tied:
    """Places of targets in their samples, and a head that shares its matrix with the embedding."""

    def __init__(self, place, options):
        self.tokens, self.segments = random_tokens(place)
        self.options = {name: value for name, value in options.items() if name != "bias"}
        self.weight = random_matrix(place, D, seed=2, rows=V) / 2
        self.bias = random_matrix(place, 1, seed=3, rows=V)[:, 0].contiguous() if options.get("bias") else None
        self.gradients = random_matrix(place, D, seed=4)
        # Sample 3 has many targets, 0 and 4 some, the one-token sample 2 one; padding among them.
        generator = torch.Generator().manual_seed(6)
        chosen = (torch.rand(len(self.segments), generator=generator) < 0.6).to(place.device) | (self.segments == 2)
        owners = self.segments[chosen & (self.segments >= 0)]
        nowhere = torch.full((4,), -1, device=place.device)
        self.owners = torch.cat([nowhere, owners, nowhere])
        self.hidden = random_matrix(place, D, seed=7, rows=len(self.owners))
        targets = torch.randint(0, V, self.owners.shape, generator=generator).to(place.device)
        self.targets = torch.where(self.owners < 0, -100, targets)
        self.token_weights = torch.rand(self.owners.shape, generator=generator).to(place.device)

    def one_by_one(self, dtype):
        """⟨D, S⟩ of each sample from autograd's two gradients of the whole matrix, and all logsumexps."""
        result, normalizers = [], torch.full(self.owners.shape, torch.nan, dtype=dtype, device=self.owners.device)
        for sample in range(SAMPLES):
            own, here = self.owners == sample, self.segments == sample
            weight = self.weight.to(dtype, copy=True).requires_grad_()
            bias = None if self.bias is None else self.bias.to(dtype)
            factors = self.token_weights[own].to(dtype)
            loss, own_normalizers = loss_of(
                self.hidden[own].to(dtype), weight, bias, self.targets[own], factors, **self.options
            )
            normalizers[own] = own_normalizers.detach()
            [as_head] = torch.autograd.grad(loss, weight)
            looked_up = F.embedding(self.tokens[here], weight)
            [as_embedding] = torch.autograd.grad((looked_up * self.gradients[here].to(dtype)).sum(), weight)
            result.append((as_head * as_embedding).sum())
        return torch.stack(result), normalizers

    def ours(self, normalizers, impl):
        return tied_cross_term(
            self.hidden,
            self.weight,
            self.targets,
            self.owners,
            normalizers,
            self.tokens,
            self.gradients,
            self.segments,
            SAMPLES,
            bias=self.bias,
            token_weights=self.token_weights,
            **self.options,
            impl=impl,
        )


@IMPLS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cross_term_is_that_of_autograds_two_gradients(place, impl, options):
    tied = Tied(place, options)
    exact, normalizers = tied.one_by_one(torch.float64)
    plain, _ = tied.one_by_one(place.dtype)
    nowhere, padding = tied.owners < 0, tied.segments < 0
    tied.hidden[nowhere] = tied.token_weights[nowhere] = torch.nan
    tied.gradients[padding], tied.tokens[padding] = torch.nan, -7
    ours = tied.ours(normalizers.float(), impl)
    assert ours.dtype == torch.float32 and ours[1] == 0 and (ours < 0).any()
    assert_as_accurate(ours, plain, exact)


@IMPLS
def test_without_token_weights_every_target_weighs_one(place, impl):
    tied = Tied(place, {})
    normalizers = tied.one_by_one(torch.float64)[1].float()
    tied.token_weights.fill_(1)
    expected = tied.ours(normalizers, impl)
    tied.token_weights = None
    assert torch.equal(tied.ours(normalizers, impl), expected)


@IMPLS
def test_operands_may_be_views_of_any_stride_and_of_other_dtypes(place, impl):
    tied = Tied(place, {"bias": True})
    normalizers = tied.one_by_one(torch.float64)[1].float()
    expected = tied.ours(normalizers, impl)
    tied.hidden, tied.weight = tied.hidden.T.contiguous().T, torch.cat([tied.weight, tied.weight], 1)[:, :D]
    tied.gradients, tied.weight = tied.gradients.float(), tied.weight.float()
    tied.tokens = torch.stack([tied.tokens, tied.tokens], 1)[:, 0]
    tied.bias = torch.stack([tied.bias, tied.bias], 1)[:, 0]
    assert torch.equal(tied.ours(normalizers, impl), expected)


@IMPLS
def test_nothing_has_no_norms(place, impl):
    for rows, samples in ((0, 0), (0, 2), (4, 0), (4, 2)):
        ids = torch.full((rows,), -1, device=place.device)
        gradients, weight = random_matrix(place, D, rows=rows), random_matrix(place, D, rows=V)
        assert embedding_norms(gradients, ids, ids, samples, impl=impl).tolist() == [0] * samples
        for targets in (0, 3):
            none = torch.full((targets,), -1, device=place.device)
            hidden = random_matrix(place, D, rows=targets)
            ours = tied_cross_term(
                hidden, weight, none, none, hidden.float()[:, 0], ids, gradients, ids, samples, impl=impl
            )
            assert ours.tolist() == [0] * samples


@IMPLS
def test_they_stand_in_a_compiled_graph(place, impl):
    tied = Tied(place, OPTIONS["capped"])
    normalizers = tied.one_by_one(torch.float64)[1].float().nan_to_num()
    torch.library.opcheck(module._embedding_norms, (tied.gradients, tied.tokens, tied.segments, SAMPLES, impl))
    arguments = (tied.hidden, tied.weight, tied.targets, tied.owners, normalizers, tied.tokens, tied.gradients)
    options = (tied.bias, tied.token_weights, 0.2, 1e-2, 3.0, impl)
    torch.library.opcheck(module._tied_cross_term, (*arguments, tied.segments, SAMPLES, *options))

    def norms(normalizers):
        squares = embedding_norms(tied.gradients, tied.tokens, tied.segments, SAMPLES, impl=impl)
        return squares + 2 * tied.ours(normalizers, impl)

    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(normalizers), norms(normalizers))
