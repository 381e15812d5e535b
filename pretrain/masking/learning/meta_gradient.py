"""How the loss of an end task, after a step of masked language modelling, depends on the mask of that step.

A mask m hides tokens: their embeddings become (1 − m)·E[x] + m·E[mask], and the step's loss is L_mlm(θ; x, m) =
Σ m_t·CE_t / Σ m_t. After θ' = θ − α ∇L_mlm the task's loss is, to first order in α,
L_task(θ) − α ⟨∇L_task(θ), ∇L_mlm(θ; x, m)⟩ (arXiv 2104.08840; DARTS, 1806.09055, makes the same step). So

    ∂L_task(θ') / ∂m_t ≈ −α ∂/∂m_t ⟨g, ∇_θ L_mlm⟩ = −α · d/dε ∂L_mlm(θ + εg) / ∂m_t  at ε = 0,  g = ∇L_task(θ)

and the derivative by ε is a central difference of two ordinary gradients. The other way, a second backward pass through
the gradient of L_mlm, needs every operation to be differentiable twice: flash attention, the fused
losses and activation checkpointing are not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from fused_objectives.linear_cross_entropy import linear_cross_entropy
from fused_objectives.targets import IGNORED
from pretrain.data.batch import Batch
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder

RELATIVE_STEP = 1e-4
"""The displacement εg as a fraction of the weights' norm: in float32 the error then is a few times 1e-4 of the result,
as much from rounding as from curvature."""


class MaskGradient(NamedTuple):
    """What the loss of one micro-batch contributes to the gradient by its mask, before the division by Σ m."""

    by_weight: torch.Tensor
    """``[rows, length]`` float32: CE_t, the share of m_t in the loss; 0 where not eligible."""
    by_input: torch.Tensor
    """``[rows, length]`` float32: what m_t does to all weighted cross entropies through the embeddings; 0 where not
    eligible."""
    total: torch.Tensor
    """``[]`` float32: Σ m_t·CE_t."""


class Alignment(NamedTuple):
    """⟨g, ∇_θ L_mlm⟩ and its derivative by the masks."""

    value: torch.Tensor
    """``[]`` float32; where it is positive, the step of masked language modelling lowers the end task's loss."""
    by_weight: list[torch.Tensor]
    """For each micro-batch ``[rows, length]`` float32: where it is positive, more weight for the token's loss helps.
    Without meaning where not eligible."""
    by_input: list[torch.Tensor]
    """Likewise: where it is positive, it helps that the others are predicted from less of the token."""

    @property
    def by_mask(self) -> list[torch.Tensor]:
        """The whole derivative, the sum of both."""
        return [weight + through for weight, through in zip(self.by_weight, self.by_input, strict=True)]


class Masked(NamedTuple):
    """A micro-batch and its mask."""

    batch: Batch
    mask: torch.Tensor
    """``[rows, length]`` float32 in 0..1."""
    eligible: torch.Tensor
    """``[rows, length]`` bool: tokens that may be hidden."""


@contextmanager
def mixed_embeddings(encoder: Encoder, mask: torch.Tensor, mask_id: int) -> Iterator[None]:
    """Let the encoder read (1 − m)·E[x] + m·E[mask] for tokens x; ``mask [rows, length]``, differentiable by it."""

    def mix(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        hidden = layer.forward(torch.full((1,), mask_id, device=output.device))
        share = mask[..., None].to(output.dtype)
        return (1 - share) * output + share * hidden

    handle = encoder.backbone.get_input_embeddings().register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


def mask_gradient(encoder: Encoder, head: nn.Module, masked: Masked, mask_id: int, impl: str = "auto") -> MaskGradient:
    """Differentiate Σ m_t·CE_t by the mask; no gradient of a weight is touched.

    Args:
        head: :class:`pretrain.model.encoder.VocabularyHead`.
        mask_id: the token that stands for hidden ones.
    """
    batch, eligible = masked.batch, masked.eligible
    with torch.enable_grad():
        mask = masked.mask.detach().requires_grad_()
        with mixed_embeddings(encoder, mask, mask_id):
            hidden = encoder(batch.tokens, Layout(batch, implementation=encoder.attention))
        loss = head(
            hidden.flatten(0, 1),
            lambda features, weight, bias: linear_cross_entropy(
                features,
                weight.detach(),
                torch.where(eligible, batch.tokens, IGNORED).reshape(-1),
                batch.segment_ids.reshape(-1),
                len(batch.sample_ids),
                bias=None if bias is None else bias.detach(),
                token_weights=masked.mask.detach().reshape(-1).float(),
                impl=impl,
            ),
        )
        (by_input,) = torch.autograd.grad(loss.total, mask)
    losses = loss.per_token.detach().view_as(by_input)
    return MaskGradient(torch.where(eligible, losses, 0.0), torch.where(eligible, by_input, 0.0), loss.total.detach())


@contextmanager
def displaced(parameters: Sequence[nn.Parameter], direction: Sequence[torch.Tensor], step: float) -> Iterator[None]:
    """Add ``step`` times ``direction`` to the parameters, and put back the very bits they had."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            torch._foreach_add_(list(parameters), list(direction), alpha=step)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), before)


def alignment_by_mask(
    parameters: Sequence[nn.Parameter],
    direction: Sequence[torch.Tensor],
    gradients: Callable[[], list[MaskGradient]],
    hidden: float,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    relative_step: float = RELATIVE_STEP,
) -> Alignment:
    """Return ⟨direction, ∇_θ L_mlm⟩ over some micro-batches, and its derivative by their masks.

    A direction that is zero or not finite gives zeros or NaN.

    Args:
        parameters: those that the end task and the masked loss share, whole on this rank, float32.
        direction: for each, the gradient of the task's loss over the global batch; the same on every rank.
        gradients: evaluates :func:`mask_gradient` on the micro-batches with the weights as they are; deterministic.
        hidden: Σ m over the global batch.
        sum_over_ranks: adds a tensor up over ranks.
        relative_step: length of the displacement, as a fraction of the parameters' norm.
    """
    length = float(nn.utils.get_total_norm(direction))
    step = relative_step * float(nn.utils.get_total_norm([each.detach() for each in parameters])) / (length or 1.0)
    means, ends = [], []
    for sign in (1.0, -1.0):
        with displaced(parameters, direction, sign * step):
            found = gradients()
        means.append(sum_over_ranks(torch.stack([each.total for each in found]).sum()) / hidden)
        ends.append([(each.by_weight - means[-1], each.by_input) for each in found])
    by_weight, by_input = (
        [(ahead[part] - behind[part]) / (2 * step * hidden) for ahead, behind in zip(*ends, strict=True)]
        for part in (0, 1)
    )
    return Alignment((means[0] - means[1]) / (2 * step), by_weight, by_input)
