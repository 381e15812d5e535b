"""Spans of chosen tokens, taken out of their samples; what is left is the source of a sequence-to-sequence model.

Sources and targets are laid out anew, one sample a row, whatever shared a row before.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_objectives.targets import IGNORED
from pretrain.data.batch import Batch
from pretrain.model.rows import rows_of
from pretrain.objectives.base import TermLoss, View
from pretrain.objectives.losses import cross_entropies


@dataclass(frozen=True)
class PairView(View):
    """A view with a source and a target for every sample; at least one row, though there be no sample.

    ``tokens [S, source length]`` int64 is the source.
    """

    real: Tensor
    """``[S, source length]`` bool: where the source holds a token."""
    labels: Tensor
    """``[S, target length]`` int64: the target, :data:`fused_objectives.targets.IGNORED` behind its end."""
    capacity: int | None = None
    """On a GPU, a bound on the targets of all samples, so that the host need not wait for it; None: every place."""


class Spans(NamedTuple):
    """Runs of chosen tokens within samples, numbered from 0 in each; all ``[rows, length]``."""

    inside: Tensor
    """bool: places of the spans that are taken out."""
    first: Tensor
    """bool: the first place of each."""
    number: Tensor
    """int64: the span's number where ``inside``."""
    left: Tensor
    """``[]`` int64: spans that stay in the text."""


class Piece(NamedTuple):
    """Some tokens and where they go; equal shapes."""

    where: Tensor
    """bool: which go anywhere."""
    owner: Tensor
    """int64: their sample."""
    column: Tensor
    """int64: their place in its row."""
    tokens: Tensor
    """int64."""


def running_count(batch: Batch, flags: Tensor) -> Tensor:
    """Count, at every place, the ``flags [rows, length]`` of its sample up to and with this place; int64."""
    so_far = flags.long().cumsum(1)
    earlier = torch.where(batch.position_ids == 0, so_far - flags.long(), 0).cummax(1).values  # of other samples
    return so_far - earlier


def find_spans(batch: Batch, chosen: Tensor, most: int | None = None, room: int | None = None) -> Spans:
    """Find the spans of ``chosen [rows, length]`` bool: runs of neighbours in a sample.

    Args:
        most: spans of a sample that may be taken out; later ones stay.
        room: places for the spans of a sample, each with a mark before it; those that do not fit stay.
    """
    first = chosen & ~(torch.nn.functional.pad(chosen[:, :-1], (1, 0)) & (batch.position_ids > 0))
    number = running_count(batch, first) - 1
    endless = torch.iinfo(torch.int64).max
    too_many = chosen & (number >= (endless if most is None else most))
    if room is not None:
        too_many |= chosen & (running_count(batch, chosen) + number + 1 > room)
    owner = batch.segment_ids + 1  # 0: padding
    limit = torch.full((len(batch.sample_ids) + 1,), endless, device=chosen.device)
    numbers = torch.where(too_many, number, endless)
    limit = limit.scatter_reduce(0, owner.reshape(-1), numbers.reshape(-1), "amin")
    stays = number >= limit[owner]  # a span stays whole, and so do those behind it
    return Spans(chosen & ~stays, first & ~stays, number, (first & stays).sum())


def lay_out(batch: Batch, width: int, fill: int, *pieces: Piece) -> Tensor:
    """Return ``[S or 1, width]`` int64 that holds the pieces, and ``fill`` elsewhere."""
    rows = max(len(batch.sample_ids), 1)
    flat = torch.full((rows * width + 1,), fill, device=batch.tokens.device)  # the last place takes what goes nowhere
    for where, owner, column, tokens in pieces:
        places = torch.where(where, owner * width + column, rows * width)
        flat = flat.scatter(0, places.reshape(-1), tokens.reshape(-1))
    return flat[:-1].view(rows, width)


def width_for(lengths: Tensor, bound: int) -> int:
    """Return the width of rows that hold ``lengths [S]`` tokens: on a GPU ``bound``, so that the host need not wait."""
    return bound if lengths.is_cuda else max(1, int(lengths.max())) if len(lengths) else 1


def source(batch: Batch, spans: Spans, marks: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the samples with a mark for each span, ``[S, source length]`` int64, and where they hold a token, bool.

    ``marks [rows, length]`` int64 are the tokens for the first places of spans.
    """
    stays = batch.real & (~spans.inside | spans.first)
    tokens = torch.where(spans.first, marks, batch.tokens)
    lengths = batch.sum_per_sample(stays.long())
    width = width_for(lengths, batch.tokens.shape[1])
    laid_out = lay_out(batch, width, pad_id, Piece(stays, batch.segment_ids, running_count(batch, stays) - 1, tokens))
    steps = torch.arange(width, device=lengths.device)
    if len(lengths) == 0:
        return laid_out, steps[None] == 0
    return laid_out, steps < lengths[:, None]


def whole_samples(batch: Batch, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples where ``wanted [S]`` bool as targets, ``[S, target length]`` int64, and their lengths."""
    lengths = torch.where(wanted, batch.lengths, 0)
    width = width_for(lengths, batch.tokens.shape[1])
    where = batch.real & spread(batch, wanted)
    return lay_out(batch, width, IGNORED, Piece(where, batch.segment_ids, batch.position_ids, batch.tokens)), lengths


def spread(batch: Batch, values: Tensor) -> Tensor:
    """Spread ``values [S]`` over the places of each sample; padding gets zero."""
    return torch.nn.functional.pad(values, (1, 0))[batch.segment_ids + 1]


def pair_loss(model, view: PairView, weights: Tensor | None, impl: str) -> TermLoss:
    """Return the cross entropies of every sample's target, given its source and the target so far."""
    samples = len(view.batch.sample_ids)
    owner = torch.arange(len(view.labels), device=view.labels.device)[:, None]
    with rows_of(owner.masked_fill(owner >= samples, -1)):  # without samples there is a row all the same
        hidden = model.encoder(view.tokens, view.real, model.encoder.decoder_inputs(view.labels))
    owner = owner.expand_as(view.labels)
    head = model.heads["vocabulary"]
    return cross_entropies(head, hidden, view.labels, owner, samples, view.capacity, weights, impl)
