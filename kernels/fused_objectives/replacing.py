"""Replacement: puts sampled tokens in the place of a sample's own, for replaced token detection (arXiv 2003.10555)."""

from typing import NamedTuple

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton
from fused_objectives.checks import INT64, check, layout
from fused_objectives.targets import IGNORED

_BLOCK = 256


class Replaced(NamedTuple):
    """A corrupted batch."""

    tokens: torch.Tensor
    """Like the input, int64."""
    labels: torch.Tensor
    """Like the input, int64: 1 where the token differs from the original, 0 where not, also if the sampled token is
    the original; :data:`IGNORED` on padding."""


def replace_tokens(
    tokens: torch.Tensor, segments: torch.Tensor, slots: torch.Tensor, sampled: torch.Tensor, *, impl: str = "auto"
) -> Replaced:
    """Return ``sampled[slots]`` where there is one, the tokens elsewhere.

    Args:
        tokens, segments, slots: int64 of one shape, ``[N]`` or ``[rows, length]``: token ids; which sample a token
            belongs to (a sample's tokens are one contiguous run; −1 is padding), of which only padding matters here;
            index into ``sampled``, −1 where the token stays.
        sampled: ``[K]`` int64 token ids; −1 leaves the token as well.

    Bytes: 24 read and 16 written a token, and 8 a replaced one.

    Raises:
        ValueError: for shapes or dtypes that are not so.
    """
    all_tokens = layout(tokens)
    tensors = {
        "tokens": (tokens, all_tokens, INT64),
        "segments": (segments, all_tokens, INT64),
        "slots": (slots, all_tokens, INT64),
        "sampled": (sampled, "K", INT64),
    }
    check(tensors, impl)
    return Replaced(*_replace(tokens, segments, slots, sampled, impl))


@torch.library.custom_op("fused_objectives::replace_tokens", mutates_args=())
def _replace(
    tokens: torch.Tensor, segments: torch.Tensor, slots: torch.Tensor, sampled: torch.Tensor, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    run = replace_triton if uses_triton(impl, tokens) else replace_torch
    return run(tokens, segments, slots, sampled)


@_replace.register_fake
def _(tokens, *_):
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)


def replace_torch(tokens, segments, slots, sampled):
    """The op in plain torch."""
    drawn = torch.cat([sampled, sampled.new_full((1,), -1)])[slots]  # slot −1 is the last
    replaced = torch.where((segments >= 0) & (drawn >= 0), drawn, tokens)
    return replaced, torch.where(segments < 0, IGNORED, replaced != tokens)


def replace_triton(tokens, segments, slots, sampled, block=_BLOCK):
    """Launch the kernel."""
    tokens = tokens.contiguous()
    replaced, labels = torch.empty_like(tokens), torch.empty_like(tokens)
    if tokens.numel() == 0:
        return replaced, labels
    replace_kernel[(-(-tokens.numel() // block),)](
        tokens,
        segments.contiguous(),
        slots.contiguous(),
        sampled.contiguous(),
        replaced,
        labels,
        tokens.numel(),
        IGNORED=IGNORED,
        BLOCK=block,
    )
    return replaced, labels


@jit(do_not_specialize=["total"])
def replace_kernel(
    tokens_ptr,
    segments_ptr,
    slots_ptr,
    sampled_ptr,
    replaced_ptr,
    labels_ptr,
    total: tl.int64,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = places < total
    tokens = tl.load(tokens_ptr + places, mask=here, other=0)
    real = tl.load(segments_ptr + places, mask=here, other=-1) >= 0
    slots = tl.load(slots_ptr + places, mask=real, other=-1)
    drawn = tl.load(sampled_ptr + slots, mask=slots >= 0, other=-1)
    replaced = tl.where(drawn >= 0, drawn, tokens)
    tl.store(replaced_ptr + places, replaced, mask=here)
    tl.store(labels_ptr + places, tl.where(real, (replaced != tokens).to(tl.int64), IGNORED), mask=here)


_ARRAYS = ("tokens", "segments", "slots", "sampled", "replaced", "labels")
CONFIGURATIONS = [
    Configuration(
        replace_kernel,
        {f"{name}_ptr": "*i64" for name in _ARRAYS} | {"total": "i64"},
        {"IGNORED": IGNORED, "BLOCK": _BLOCK},
    )
]
