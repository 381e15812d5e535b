"""Which of a model's layers give a sample's gradient by the rows they see.

That is tried, because a layer's type does not tell how a family uses it: DeBERTa projects the rows of an embedding of
distances, which are no tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.influence.layers import Layer, Measure
from pretrain.influence.ledger import Ledger, weighted_gradients
from pretrain.influence.taps import tapped
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.encoder_decoder import EncoderDecoder, ProjectionHead
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.rows import rows_of
from pretrain.model.vocabulary_head import VocabularyHead

_LENGTHS = (7, 4)  # of two samples
_WEIGHTS = (1.0, -2.0)
Loss = Callable[[torch.Tensor], torch.Tensor]
"""The samples' weights ``[2]`` → the weighted loss of a part of the model."""


class Tried(NamedTuple):
    """What a trial has found."""

    layers: list[Layer]
    """Those whose weighted gradient, put together from the rows, is autograd's, and those that were not tried."""
    idle: set[int]
    """Ids of parameters that have no part in what their module computes."""


def try_layers(model: MultiObjectiveModel, layers: list[Layer]) -> Tried:
    """Try the ``layers`` of a model's backbones and vocabulary heads.

    Weights that ZeRO-3 has partitioned cannot be tried: then all layers are returned.
    """
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return Tried(layers, set())
    wrong: set[int] = set()
    own: set[int] = set()
    reached: set[int] = set()
    training = {module: module.training for module in model.modules()}
    model.eval()
    for part in model.modules():
        if isinstance(part, Encoder | EncoderDecoder | VocabularyHead | ProjectionHead):
            parameters = [each for each in part.parameters() if each.requires_grad]
            own |= set(map(id, parameters))
            within = [each for each in layers if not set(map(id, parameters)).isdisjoint(map(id, each.parameters))]
            refused, with_gradient = _try(_loss_of(part), parameters, within)
            wrong |= refused
            reached |= with_gradient
    for module, was in training.items():
        module.training = was
    return Tried([each for each in layers if wrong.isdisjoint(map(id, each.parameters))], own - reached)


class _Trial(Ledger):
    """A ledger that goes on after a layer that cannot be told apart."""

    def __init__(self, device: torch.device):
        super().__init__((), Measure("gram", len(_LENGTHS), "torch"), keeps=True, device=device)
        self.refused: set[int] = set()

    def refuse(self, layer: Layer) -> None:
        self.refused.update(map(id, layer.parameters))


def _try(loss: Loss, parameters: list[nn.Parameter], layers: list[Layer]) -> tuple[set[int], set[int]]:
    """Return the ids of the parameters whose gradients cannot be told apart, and of those that have one at all."""
    if not parameters:
        return set(), set()
    device = parameters[0].device
    ledger, weights = _Trial(device), torch.tensor(_WEIGHTS, device=device)
    try:
        expected = torch.autograd.grad(loss(weights), parameters, allow_unused=True)
        anchor = torch.zeros((), device=device, requires_grad=True)
        with tapped(layers, ledger, anchor):
            torch.autograd.grad(loss(torch.ones_like(weights)), [anchor], allow_unused=True)
        found: dict[int, torch.Tensor] = {}
        for members, told in ledger.take():
            found |= zip(map(id, members), weighted_gradients(members, told, weights), strict=True)
    except (RuntimeError, TypeError, ValueError):  # what families raise that cannot take a layer so
        return set(map(id, parameters)), set(map(id, parameters))
    exact = {id(p): gradient for p, gradient in zip(parameters, expected, strict=True) if gradient is not None}
    wrong = {each for each, gradient in exact.items() if not _agree(found.get(each), gradient)}
    return wrong | ledger.refused, set(exact)


def _agree(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    error = expected if found is None else found - expected
    return float(error.norm()) <= tolerance * (float(expected.norm()) + 1e-3)


def _loss_of(part: Encoder | EncoderDecoder | VocabularyHead | ProjectionHead) -> Loss:
    """Return a loss of two samples of different lengths: of a backbone one a row, of a head in a run."""
    device = next(part.parameters()).device
    lengths, sample = torch.tensor(_LENGTHS, device=device), torch.arange(len(_LENGTHS), device=device)
    steps = torch.arange(max(_LENGTHS), device=device).expand(len(lengths), -1)
    real = steps < lengths[:, None]
    owners = sample[:, None].expand_as(real)

    def outputs() -> torch.Tensor:
        if isinstance(part, VocabularyHead | ProjectionHead):
            hidden = _noise(real.numel(), part.hidden_size, like=next(part.parameters()))
            return part(hidden).view(*real.shape, -1)
        config = part.config
        tokens = (steps * 2 + owners + (config.pad_token_id or 0) + 1) % config.vocab_size
        if isinstance(part, EncoderDecoder):
            return part(tokens, real, tokens.flip(1))
        segments = torch.where(real, owners, -1)
        batch = Batch(tokens, segments, steps * real, sample, sample * 0, lengths, sample)
        return part(tokens, Layout(batch, part.causal_only))

    def loss(weights: torch.Tensor) -> torch.Tensor:
        with rows_of(owners.reshape(-1) if isinstance(part, VocabularyHead | ProjectionHead) else sample[:, None]):
            found = outputs()
        return (found * _noise(*found.shape, like=found) * (real * weights[:, None])[:, :, None]).sum()

    return loss


def _noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
