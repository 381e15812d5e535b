"""The random words by which corruptions decide: four for each token, from one Philox call whose counter is the token's
(position, sample id, visit). So neither packing, padding, batch, rank nor the block size of a kernel matters.

A decision of probability p is ``word < threshold(p)``, compared in 64 bits: p = 0 never happens, p = 1 always.
"""

import torch

from fused_objectives.backend import jit, tl
from fused_objectives.philox import philox, philox_words


def threshold(probability: float) -> int:
    """Return the integer that a random 32-bit word lies below with this probability.

    Raises:
        ValueError: if it is not a probability, but for rounding.
    """
    if not -1e-9 <= probability <= 1 + 1e-9:
        raise ValueError(f"a probability lies between 0 and 1, not at {probability}")
    return int(probability * 2**32)


def words(
    seed: int,
    stream: str,
    counters: torch.Tensor,
    segments: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return four int64 tensors of random 32-bit words, in the shape of ``counters``; on padding they mean nothing.

    Args:
        seed, stream: key of the numbers.
        counters: integers, mostly positions within the sample.
        segments: like ``counters``: which of the S samples, −1 padding.
        sample_ids, visits: ``[S]`` int64.
    """
    if len(sample_ids) == 0:
        return (torch.zeros_like(counters),) * 4
    if counters.is_cuda:
        ids = sample_ids[segments]  # padding reads the last sample's
        return philox(seed, stream, counters, ids, ids >> 32, visits[segments])
    owner, ids = segments.numpy(), sample_ids.numpy()  # numpy's loops take a third less time than torch's
    drawn = philox(seed, stream, counters.numpy(), ids[owner], (ids >> 32)[owner], visits.numpy()[owner])
    return tuple(map(torch.from_numpy, drawn))


@jit
def token_words(seed, stream, counters, segments, mask, sample_ids_ptr, visits_ptr):
    """The same words within a kernel, as uint32, for a block of tokens; beyond ``mask`` they mean nothing.

    Args:
        seed, stream: scalars, as :func:`philox_words` takes them.
        counters, segments: integer blocks of one shape.
        mask: which of them are tokens.
        sample_ids_ptr, visits_ptr: ``[S]`` int64.
    """
    sample = tl.load(sample_ids_ptr + segments, mask=mask, other=0)
    visit = tl.load(visits_ptr + segments, mask=mask, other=0)
    return philox_words(seed, stream, counters, sample, visit)
