"""Which of a model's layers give a sample's gradient by the rows they see.

That is tried, because a layer's type does not tell how a family uses it: DeBERTa projects the rows of an embedding of
distances, which are no tokens.
"""

import torch

from pretrain.data.batch import Batch
from pretrain.influence.layers import Layer, Measure
from pretrain.influence.ledger import Ledger, weighted_gradients
from pretrain.influence.taps import tapped
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.rows import rows_of

_LENGTHS = (7, 4)
_WEIGHTS = (1.0, -2.0)


def told_apart(model: MultiObjectiveModel, layers: list[Layer]) -> list[Layer]:
    """Return those of ``layers`` whose weighted gradient, put together from the rows, is autograd's, and those that the
    trial does not reach, such as heads. Weights that ZeRO-3 has partitioned cannot be tried: then all are returned."""
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return layers
    wrong: set[int] = set()
    for backbone in model.modules():
        if isinstance(backbone, Encoder | EncoderDecoder):
            own = {id(each) for each in backbone.parameters()}
            wrong |= _wrong(backbone, [layer for layer in layers if id(layer.parameters[0]) in own])
    return [layer for layer in layers if id(layer.parameters[0]) not in wrong]


class _Trial(Ledger):
    """A ledger that goes on after a layer that cannot be told apart."""

    def __init__(self, device: torch.device):
        super().__init__((), Measure("gram", len(_LENGTHS), "torch"), keeps=True, device=device)
        self.refused: set[int] = set()

    def refuse(self, layer: Layer) -> None:
        self.refused.add(id(layer.parameters[0]))


def _wrong(backbone: Encoder | EncoderDecoder, layers: list[Layer]) -> set[int]:
    """Return the ids of the matrices and scales of the layers whose gradients do not come out right."""
    device = layers[0].parameters[0].device
    ledger, weights = _Trial(device), torch.tensor(_WEIGHTS, device=device)
    parameters = {id(each): each for layer in layers for each in layer.parameters}
    training = backbone.pretrained.training
    backbone.pretrained.eval()
    try:
        expected = torch.autograd.grad(_loss(backbone, weights), list(parameters.values()), allow_unused=True)
        anchor = torch.zeros((), device=device, requires_grad=True)
        with tapped(layers, ledger, anchor):
            torch.autograd.grad(_loss(backbone, torch.ones_like(weights)), [anchor], allow_unused=True)
        found = {}
        for members, told in ledger.take():
            found |= zip(map(id, members), weighted_gradients(members, told, weights), strict=True)
    except (RuntimeError, TypeError, ValueError):  # what families raise that take no such layers
        return {id(layer.parameters[0]) for layer in layers}
    finally:
        backbone.pretrained.train(training)
    wrong = {each for each, gradient in zip(parameters, expected, strict=True) if not _agree(found.get(each), gradient)}
    wrong |= ledger.refused
    return {id(p[0]) for p in (layer.parameters for layer in layers) if not wrong.isdisjoint(map(id, p))}


def _agree(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if expected is None:
        return found is None
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    found = torch.zeros_like(expected) if found is None else found
    return float((found - expected).norm()) <= tolerance * (float(expected.norm()) + 1e-3)


def _loss(backbone: Encoder | EncoderDecoder, weights: torch.Tensor) -> torch.Tensor:
    """Return a loss of two samples of different lengths, one a row, with weights."""
    config, device, longest = backbone.config, weights.device, max(_LENGTHS)
    lengths = torch.tensor(_LENGTHS, device=device)
    steps = torch.arange(longest, device=device).expand(len(lengths), -1)
    real, sample = steps < lengths[:, None], torch.arange(len(lengths), device=device)
    tokens = (steps * 2 + sample[:, None] + (config.pad_token_id or 0) + 1) % config.vocab_size
    if isinstance(backbone, EncoderDecoder):
        with rows_of(sample[:, None]):
            hidden = backbone(tokens, real, tokens.flip(1))
    else:
        segments = torch.where(real, sample[:, None], -1)
        batch = Batch(tokens, segments, steps * real, sample, sample * 0, lengths, sample)
        hidden = backbone(tokens, Layout(batch, backbone.causal_only))
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    return (hidden * noise * (real * weights[:, None])[:, :, None]).sum()
