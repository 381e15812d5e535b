"""Gumbel noise, by which the largest of many perturbed scores is a sample: argmax_v (z_v + Gumbel_v) is v with
probability softmax(z)_v (arXiv 1411.0030).

The noise is a function of counter-based random words, so a token's sample does not depend on what else is in the batch,
and nothing of the vocabulary's size has to be kept.
"""

from typing import NamedTuple

import torch

from fused_objectives import draws
from fused_objectives.backend import jit, tl
from fused_objectives.philox import philox_of_key

_SERIES_BELOW = 1 / 16
"""Below, −log(1 − u) is taken from its series: the difference from 1 would lose u's digits."""


class Sampling(NamedTuple):
    """Whose noise, and how much of it."""

    positions: torch.Tensor
    """``[n]`` int64: each row's place within its sample."""
    segments: torch.Tensor
    """``[n]`` int64: each row's sample, −1 padding."""
    sample_ids: torch.Tensor
    """``[S]`` int64."""
    visits: torch.Tensor
    """``[S]`` int64."""
    seed: int
    stream: str
    temperature: float

    def rows(self, part: slice) -> "Sampling":
        return self._replace(positions=self.positions[part], segments=self.segments[part])


def gumbel(word: torch.Tensor) -> torch.Tensor:
    """Map random 32-bit words (int64) to Gumbel noise, float32: −log(−log(1 − u)) with u = (word + ½) / 2³².

    It lies between −3.14 and 22.88, falls as the word grows, and has a float's relative accuracy at both ends.
    """
    share = word.float().add_(0.5).mul_(2.0**-32)
    rest = (0xFFFFFFFF - word).float().add_(0.5).mul_(2.0**-32)
    series = share / 6
    for order in range(5, 0, -1):
        series.add_(1 / order).mul_(share)
    return torch.where(share < _SERIES_BELOW, series, rest.log_().neg_()).log_().neg_()


def sample(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the sampled entry of each row of ``scores [n, V]``, ``[n]`` int64; NaN scores are never sampled.

    A row's call of Philox gives two words, the key of its noise; its entry v takes word v mod 4 of the counter v // 4.
    """
    count = scores.shape[1]
    first, second, *_ = draws.words(
        sampling.seed,
        sampling.stream,
        sampling.positions,
        sampling.segments,
        sampling.sample_ids,
        sampling.visits,
    )
    counters = torch.arange(-(-count // 4), device=scores.device).expand(len(scores), -1)
    if scores.is_cuda:
        words = philox_of_key(first[:, None], second[:, None], counters)
    else:  # numpy's loops take half as long as torch's
        words = philox_of_key(first.numpy()[:, None], second.numpy()[:, None], counters.numpy())
        words = tuple(map(torch.from_numpy, words))
    noise = gumbel(torch.stack(words, -1).flatten(1)[:, :count])
    return (scores / sampling.temperature).add_(noise).nan_to_num_(-torch.inf, torch.inf, -torch.inf).argmax(1)


@jit
def gumbel_block(key, start, BLOCK: tl.constexpr):
    """The same noise within a kernel, for the entries ``start .. start + BLOCK − 1`` of a row.

    Args:
        key: scalar uint64, the row's two words (second, first).
        start: scalar, a multiple of 4.
    """
    counters = start // 4 + tl.arange(0, BLOCK // 4)
    zero = counters * 0
    word_0, word_1, word_2, word_3 = tl.philox(key, counters, zero, zero, zero)
    return gumbel_of(tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3)))


@jit
def gumbel_of(word):
    """:func:`gumbel` within a kernel, of a uint32 block."""
    share = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = share * (1 + share * (1 / 2 + share * (1 / 3 + share * (1 / 4 + share * (1 / 5 + share / 6)))))
    return -tl.log(tl.where(share < 0.0625, series, -tl.log(rest)))
