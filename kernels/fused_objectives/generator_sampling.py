"""The generator of replaced-token detection: its loss, and a token sampled from its prediction at every target."""

from typing import NamedTuple

import torch

from fused_objectives.gumbel import Sampling
from fused_objectives.linear_cross_entropy import LinearCrossEntropy, evaluate
from fused_objectives.softmax_epilogue import Terms


class Sampled(NamedTuple):
    """A generator's loss, and what it puts in place of the targets."""

    loss: LinearCrossEntropy
    tokens: torch.Tensor
    """``[N]`` int64: sampled ids, −1 where there is no target."""


def linear_cross_entropy_and_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    *,
    seed: int,
    stream: str,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    sample_weights: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    capacity: int | None = None,
    chunk_rows: int | None = None,
    squared_norms: bool = False,
    logit_gradients: bool = False,
    impl: str = "auto",
) -> Sampled:
    """Return the linear cross entropy and, from the same logits, a token per target: v with probability
    softmax(z / temperature)_v (ELECTRA's generator, arXiv 2003.10555).

    A target's token is a function of its z and of (seed, stream, position, sample id, visit): Gumbel-max, with noise as
    :mod:`fused_objectives.gumbel` derives it. Ties go to the lowest id, an entry with logit −∞ is never sampled.

    Args:
        positions: ``[N]`` integers, each token's place within its sample.
        sample_ids, visits: ``[S]`` integers.
        seed, stream: key of the random words.
        temperature: above 0; 1 samples the distribution that the loss trains.
        The others are those of :func:`~fused_objectives.linear_cross_entropy.linear_cross_entropy`: ``segments`` says
            for each token which sample it belongs to; a sample's tokens are one contiguous run; −1 is padding.

    Raises:
        ValueError: for a temperature that is not above 0, and as :func:`linear_cross_entropy` does.

    FLOPs and bytes are those of :func:`linear_cross_entropy`: no noise is written to memory.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    sampling = Sampling(positions, segments, sample_ids, visits, seed & 0xFFFFFFFF, stream, temperature)
    terms = Terms(label_smoothing, z_loss, soft_cap)
    weights, limits = (sample_weights, token_weights), (capacity, chunk_rows, None)
    arguments = (hidden, weight, bias, targets, segments, samples, weights, terms, limits, squared_norms, impl)
    loss, output = evaluate(*arguments, sampling, logit_gradients=logit_gradients)
    return Sampled(loss, output[-1])
