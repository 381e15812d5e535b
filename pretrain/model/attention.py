"""Attention over packed rows, behind transformers' attention interface.

Every sample attends to itself alone, whatever shares its row. The model is built with the attention implementation
:data:`NAME`; the layout of the rows travels to it as the keyword ``layout`` of the backbone's forward. Two ways to the
same numbers: ``blocks`` computes the diagonal blocks as batches of samples of like length with PyTorch's scaled
dot-product attention, on any device; ``varlen`` runs all samples in one flash-attention kernel and needs a GPU and
16-bit numbers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pretrain.data.batch import Batch

NAME = "packed_rows"
_SHORTEST_BLOCK = 16  # tokens; shorter samples share a block of this size


@dataclass
class Layout:
    """Where the samples of a batch lie, and whether attention is causal."""

    batch: Batch
    causal: bool = False
    implementation: str = "blocks"
    _cache: dict = field(default_factory=dict, repr=False)

    def blocks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return samples grouped by length: ``places [n, longest]`` int64 into the flattened rows, ``real [n,
        longest]``.

        The length of a group's places is at most twice that of its shortest sample.
        """
        if "blocks" not in self._cache:
            batch = self.batch
            place_of = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
            first = place_of[(batch.position_ids == 0).reshape(-1) & batch.real.reshape(-1)]
            starts = torch.zeros_like(batch.lengths).index_copy(0, batch.segment_ids.reshape(-1)[first], first)
            self._cache["blocks"] = []
            ceiling = torch.clamp(batch.lengths, min=_SHORTEST_BLOCK) - 1
            group_of = torch.where(batch.lengths > 0, torch.frexp(ceiling.double()).exponent, -1)
            for group in group_of[batch.lengths > 0].unique().tolist():  # a sample may have lost all its tokens
                chosen = group_of == group
                lengths = batch.lengths[chosen]
                steps = torch.arange(int(lengths.max()), device=lengths.device)
                real = steps < lengths[:, None]
                self._cache["blocks"].append(((starts[chosen][:, None] + steps * real), real))
        return self._cache["blocks"]

    def allowed(self, block: int, window: int | None) -> torch.Tensor:
        """Return which keys each query of a block may see, ``[n, 1, longest or 1, longest]`` bool."""
        key = ("allowed", block, window)
        if key not in self._cache:
            _, real = self.blocks()[block]
            allowed = real[:, None, None, :]
            if self.causal or window is not None:
                steps = torch.arange(real.shape[1], device=real.device)
                distance = steps[:, None] - steps[None, :]
                near = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
                allowed = allowed & (near & (distance >= 0) if self.causal else near)
                # A query beyond its sample's end still needs one key, or its softmax is 0/0.
                allowed = allowed | torch.eye(len(steps), dtype=torch.bool, device=real.device)
            self._cache[key] = allowed
        return self._cache[key]

    def flat(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the real places in order ``[tokens]``, ``cu_seqlens [S + 1]`` int32, and the longest sample."""
        if "flat" not in self._cache:
            places = self.batch.real.reshape(-1).nonzero().squeeze(1)
            cu_seqlens = F.pad(self.batch.lengths.cumsum(0), (1, 0)).to(torch.int32)
            self._cache["flat"] = places, cu_seqlens, int(self.batch.lengths.max()) if len(self.batch.lengths) else 0
        return self._cache["flat"]


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    """Attend within each sample. Called by transformers' attention layers.

    Args:
        query: ``[rows, heads, length, dim]``; ``key`` and ``value`` may have fewer heads.
        layout: the batch's :class:`Layout`; padding places come out as zeros.
        kwargs: ``sliding_window`` (w: a query sees keys nearer than w) is honoured, the rest is not ours.

    Returns:
        ``[rows, length, heads, dim]`` and None (no attention weights).
    """
    if layout is None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand on the layout of the rows: its family does not support packing"
        )
    rows, heads, length, _ = query.shape
    window = kwargs.get("sliding_window")
    # Rotary positions leave queries and keys in float32 under autocast; the values have the layer's own type.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    attend = _varlen if layout.implementation == "varlen" else _blocks
    output = attend(q, k, v, layout, window, scaling, dropout)
    return output.view(rows, length, heads, value.shape[-1]), None


def _blocks(q, k, v, layout, window, scaling, dropout):
    output = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # PyTorch's CPU kernel takes twice as long in bf16
    groups = q.shape[1] // k.shape[1]
    for number, (places, real) in enumerate(layout.blocks()):
        query, key, value = (x[places].transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            attn_mask=layout.allowed(number, window),
            dropout_p=dropout,
            scale=scaling,
        )
        output = output.index_put((places[real],), attended.transpose(1, 2)[real].to(output.dtype))
    return output


def _varlen(q, k, v, layout, window, scaling, dropout):
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise RuntimeError("varlen attention has no dropout; set model.attention_dropout to 0")
    places, cu_seqlens, longest = layout.flat()
    reach = -1 if window is None else window - 1
    groups = q.shape[1] // k.shape[1]  # PyTorch 2.11 has no grouped heads here
    attended = varlen_attn(
        q[places],
        k[places].repeat_interleave(groups, dim=1),
        v[places].repeat_interleave(groups, dim=1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if layout.causal else reach),
    )
    return q.new_zeros(q.shape[0], q.shape[1], v.shape[2]).index_put((places,), attended)


def _no_mask(*args, **kwargs):
    return None  # the layout says who sees whom


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
