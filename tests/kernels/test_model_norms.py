"""All norms of a small model together, against autograd on each sample alone and against Opacus."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_objectives.embedding_norms import embedding_norms, tied_cross_term
from fused_objectives.linear_norms import linear_norms
from fused_objectives.vector_gradients import layer_norm_gradients
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.one_by_one import SAMPLES, packed_segments

V, D, H = 50, 24, 40
EPS = 1e-5
IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])


class Model(nn.Module):
    """A causal language model whose tokens look at the mean of those before them."""

    def __init__(self, tied: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D, eps=EPS)
        self.up = nn.Linear(D, H)
        self.down = nn.Linear(H, D, bias=False)
        self.last_norm = nn.RMSNorm(D, eps=EPS)
        self.head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.norm(self.embedding(tokens))
        counts = torch.arange(1, states.shape[-2] + 1, device=states.device)[:, None]
        context = states.cumsum(-2) / counts.to(states.dtype)
        return self.head(self.last_norm(states + self.down(F.gelu(self.up(context)))))


LAYERS = ("embedding", "norm", "up", "down", "last_norm", "head")


def watch(model) -> tuple[dict, list]:
    """Keep each layer's inputs and outputs, with the gradients at these, of the calls that follow; return them and the
    hooks."""
    calls = {}

    def keep(name):
        def hook(_, inputs, output):
            output.retain_grad()
            calls[name] = inputs[0].detach(), output

        return getattr(model, name).register_forward_hook(hook)

    return calls, [keep(name) for name in LAYERS]


def run_one_by_one(model, tokens, segments):
    """Run each sample alone; return the squared norms of its gradient and, of each layer, the inputs and the gradients
    at the outputs of all samples, packed with NaN at padding."""
    norms, kept = [], {}
    for sample in range(SAMPLES):
        own = segments == sample
        calls, hooks = watch(model)
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[own]), tokens[own].roll(-1), reduction="sum")
        loss.backward()
        for hook in hooks:
            hook.remove()
        norms.append(sum(p.grad.square().sum() for p in model.parameters()))
        for name, (inputs, output) in calls.items():
            for what, values in (("inputs", inputs), ("gradients", output.grad)):
                if (name, what) not in kept:
                    padding = torch.nan if values.is_floating_point() else 0
                    kept[name, what] = values.new_full((len(segments), *values.shape[1:]), padding)
                kept[name, what][own] = values
    return torch.stack(norms), kept


@IMPLS
@pytest.mark.parametrize("method", ["gram", "instantiate"])
def test_a_tied_models_norms_add_up_to_those_of_its_whole_gradient(place, impl, method):
    model, segments = Model(tied=True).to(place.device), packed_segments(place.device)
    tokens = torch.randint(0, V, segments.shape, generator=torch.Generator().manual_seed(1)).to(place.device)
    plain, kept = run_one_by_one(model.to(place.dtype), tokens, segments)
    exact, _ = run_one_by_one(model.double(), tokens, segments)
    packed = {"segments": segments, "samples": SAMPLES, "impl": impl}
    ours = torch.zeros(SAMPLES, device=place.device)
    for name, bias in (("up", True), ("down", False), ("head", False)):
        ours += linear_norms(kept[name, "inputs"], kept[name, "gradients"], bias=bias, method=method, **packed)
    for name, rms in (("norm", False), ("last_norm", True)):
        operands = kept[name, "gradients"], kept[name, "inputs"]
        ours += layer_norm_gradients(*operands, eps=EPS, rms=rms, shift=not rms, **packed).square().sum((0, 2))
    ours += embedding_norms(kept["embedding", "gradients"], tokens, **packed)
    hidden, weight = kept["head", "inputs"], model.head.weight.detach().to(place.dtype)
    targets = tokens.new_full(segments.shape, -100)
    for sample in range(SAMPLES):
        targets[segments == sample] = tokens[segments == sample].roll(-1)
    normalizers = (hidden.float() @ weight.float().T).logsumexp(1)
    lookup = tokens, kept["embedding", "gradients"]
    cross = tied_cross_term(hidden, weight, targets, segments, normalizers, *lookup, **packed)
    assert (cross.abs() > 1e-3 * ours)[[0, 3, 4]].all()  # leaving it out would show
    assert_as_accurate(ours + 2 * cross, plain, exact)


def test_an_untied_models_norms_are_opacuss():
    opacus = pytest.importorskip("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
    samples, length = 3, 21
    model = Model(tied=False)
    model.last_norm = nn.LayerNorm(D, eps=EPS)  # Opacus knows no RMSNorm
    segments = torch.arange(samples).repeat_interleave(length)
    tokens = torch.randint(0, V, (samples, length), generator=torch.Generator().manual_seed(1))
    calls, _ = watch(model)
    wrapped = opacus.GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
    losses = F.cross_entropy(wrapped(tokens).transpose(1, 2), tokens.roll(-1, 1), reduction="none")
    losses.sum().backward()
    packed = {"segments": segments, "samples": samples}
    for name, (inputs, output) in calls.items():
        layer, inputs, gradient = getattr(model, name), inputs.flatten(0, 1), output.grad.flatten(0, 1)
        theirs = sum(parameter._norm_sample.square() for parameter in layer.parameters())
        if isinstance(layer, nn.Linear):
            ours = linear_norms(inputs, gradient, bias=layer.bias is not None, **packed)
        elif isinstance(layer, nn.LayerNorm):
            ours = layer_norm_gradients(gradient, inputs, eps=EPS, **packed).square().sum((0, 2))
        else:
            ours = embedding_norms(gradient, inputs, **packed)
        assert torch.allclose(ours, theirs, rtol=1e-5), name
