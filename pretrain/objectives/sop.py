"""Sentence order prediction (ALBERT, arXiv 1909.11942, section 3.1): tell whether a text's halves were exchanged."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_objectives import draws
from fused_objectives.segments import per_token, spans
from fused_objectives.targets import IGNORED, compact
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.policies import words
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.projection import Score, scored
from pretrain.model.rows import rows_of
from pretrain.objectives.base import Objective, TermLoss, View, register
from pretrain.objectives.scores import DetectionScore

_SHORTEST_HALF = 2  # tokens: one of them may give way to the separator
_BITS = 24  # of a number of tokens


class SOPConfig(Config):
    """Keys of ``objectives.sop``: none."""


class OrderHead(nn.Module):
    """Linear layer and tanh on a sample's first state, then one logit."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, 1)

    def forward(self, first: torch.Tensor, score: Score | None = None) -> Any:
        """First states ``[S, hidden]`` → logits ``[S, 1]``, positive where the halves were exchanged; or what
        ``score`` makes of the last layer."""
        with scored(self.classifier, score):
            return self.classifier(torch.tanh(self.dense(first)))


@dataclass(frozen=True)
class OrderView(View):
    """A view with a label for every sample."""

    labels: torch.Tensor
    """``[S]`` int64: 1 exchanged, 0 in order, ``IGNORED`` where the text cannot be split."""


class Text(NamedTuple):
    """The K text tokens of a batch, sample after sample; on a GPU K is the number of places, and −1 fills up."""

    places: torch.Tensor
    """``[K]`` int64: places in the flattened rows."""
    tokens: torch.Tensor
    """``[K]`` int64."""
    segments: torch.Tensor
    """``[K]`` int64: which of the S samples."""
    starts: torch.Tensor
    """``[S]`` int64: where each sample's text begins among the K."""
    lengths: torch.Tensor
    """``[S]`` int64: tokens of each sample's text."""
    order: torch.Tensor
    """``[K]`` int64: each token's number within its sample's text."""


@register
class SentenceOrderPrediction(Objective):
    """Binary cross entropy of each sample's order.

    The text of a sample, all but its special tokens, is split at the sentence end nearest its middle, or where it has
    none at the word border nearest it, with two tokens or more on either side; a text without such a border is no
    target. The halves are exchanged with probability ½. The last token of what comes first gives way to the
    separator, in texts left in order as well, so that lengths stay and the separator tells nothing.
    """

    name = "sop"
    Config = SOPConfig
    heads = ("order",)

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            raise UserError(
                f"objectives.sop: '{encoder.config.model_type}' is a decoder, whose first token sees nothing else"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {"order": OrderHead(encoder.config.hidden_size)}

    def corrupt(self, batch: Batch, progress: float) -> View:
        text = self._text(batch)
        borders = self._borders(batch, text)
        splits = borders > 0
        segments = torch.arange(len(borders), device=borders.device)
        coin, *_ = draws.words(
            self.seed, self.name, torch.zeros_like(segments), segments, batch.sample_ids, batch.visits
        )
        exchanged = splits & (coin < 2**31)
        tokens = self._arranged(batch, text, borders, exchanged)
        labels = torch.where(splits, exchanged.long(), IGNORED)
        tallies = {"sop/positives": exchanged.sum()}
        return OrderView(replace(batch, tokens=tokens), tokens, {self.name: splits.long()}, tallies, labels)

    def _text(self, batch: Batch) -> Text:
        is_text = self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real
        chosen = compact(is_text.reshape(-1))
        segments = chosen.take(batch.segment_ids.reshape(-1), padding=-1)
        starts, ends = spans(segments, len(batch.sample_ids))
        order = torch.arange(len(segments), device=segments.device) - per_token(starts, segments)
        return Text(chosen.places, chosen.take(batch.tokens.reshape(-1)), segments, starts, ends - starts, order)

    def _borders(self, batch: Batch, text: Text) -> torch.Tensor:
        """Return for each sample how many tokens of its text stand before the split, ``[S]`` int64; 0: no split."""
        word = words(batch, self.vocabulary).reshape(-1)[text.places]
        ends_sentence = self.vocabulary.tables(batch.tokens.device).ends_sentence[text.tokens]
        lengths = per_token(text.lengths, text.segments)
        possible = (word != word.roll(1)) & (text.segments >= 0)
        possible &= (text.order >= _SHORTEST_HALF) & (lengths - text.order >= _SHORTEST_HALF)
        # The best border has the smallest key: a sentence end before none, then the nearest, then the first.
        key = (~ends_sentence.roll(1)).long() << 2 * _BITS
        key += ((2 * text.order - lengths).abs() << _BITS) + text.order
        none = 1 << (2 * _BITS + 1)
        best = key.new_full((len(text.starts) + 1,), none)
        owner = torch.where(possible, text.segments, len(text.starts))
        best = best.scatter_reduce(0, owner, key, "amin")[:-1]
        return torch.where(best < none, best & ((1 << _BITS) - 1), 0)

    def _arranged(self, batch: Batch, text: Text, borders: torch.Tensor, exchanged: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``[rows, length]`` with halves exchanged and separators put in; special tokens stay."""
        shift = per_token(torch.where(exchanged, borders, 0), text.segments)
        lengths, starts = per_token(text.lengths, text.segments), per_token(text.starts, text.segments)
        arranged = text.tokens[starts + (text.order + shift) % lengths.clamp(min=1)]
        if self.vocabulary.separator_id is not None:
            first_half = per_token(torch.where(exchanged, text.lengths - borders, borders), text.segments)
            split = per_token(borders, text.segments) > 0
            arranged = torch.where(split & (text.order == first_half - 1), self.vocabulary.separator_id, arranged)
        flat = batch.tokens.reshape(-1)
        beyond = torch.where(text.places < 0, len(flat), text.places)  # what only fills up goes to a place to spare
        flat = torch.cat([flat, flat.new_zeros(1)]).scatter(0, beyond, arranged)
        return flat[:-1].view_as(batch.tokens)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        batch = view.batch
        hidden = model.encoder(view.tokens, Layout(batch, implementation=model.encoder.attention)).flatten(0, 1)
        starts, _ = spans(batch.segment_ids.reshape(-1), len(batch.sample_ids))
        segments = torch.arange(len(starts), device=starts.device)
        score = DetectionScore(view.labels, segments, len(starts), weights, self.impl)
        with rows_of(segments):
            loss = model.heads["order"](hidden[starts], score)
        return {self.name: TermLoss(loss.total, loss.sums)}
