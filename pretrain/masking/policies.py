"""Masking policies: which tokens are chosen. What becomes of them is the masker's affair.

All draw from counter-based words, so a choice is a function of (seed, stream, sample, visit) and not of the batch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fused_objectives import draws
from pretrain.data.annotations import NO_UNIT, PARTS_OF_SPEECH
from pretrain.data.batch import Batch
from pretrain.masking.config import ChoiceConfig
from pretrain.model.vocabulary import Vocabulary

_RATE_WITHOUT_UNITS = 0.15  # of guided masking


@dataclass(frozen=True)
class Draws:
    """The random words of a batch's tokens."""

    batch: Batch
    seed: int
    stream: str

    def choose(self, counters: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, length]`` bool: true with ``probability``, alike for all tokens of a sample that share a
        counter."""
        batch = self.batch
        word, *_ = draws.words(self.seed, self.stream, counters, batch.segment_ids, batch.sample_ids, batch.visits)
        return word < (probability.double() * 2**32).long()


@dataclass(frozen=True)
class Choice:
    """What a policy chose: units and spans for the kernel to draw, or the tokens themselves."""

    units: torch.Tensor | None = None
    """``[rows, length]`` int64: the number of each token's unit within its sample; −1 in none. None: its position."""
    span_lengths: tuple[float, ...] = (1.0,)
    """Probability that a span has 1, 2, … units."""
    chosen: torch.Tensor | None = None
    """``[rows, length]`` bool: the chosen tokens; None leaves the draw to the kernel."""
    fallbacks: torch.Tensor | None = None
    """``[]`` int64: samples in which there was nothing to choose from."""


class Policy(ABC):
    """Chooses the tokens to hide."""

    together = 1
    """About how many tokens are chosen or left together: what makes their number vary more."""

    def __init__(self, config: ChoiceConfig, vocabulary: Vocabulary):
        self.config, self.vocabulary = config, vocabulary

    def largest_share(self, rate: float) -> float:
        """Return the largest fraction of tokens that is chosen in expectation."""
        return rate

    @abstractmethod
    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        """Choose ``rate`` of the ordinary tokens of a batch, in expectation."""


class Random(Policy):
    """Every token alike, independently (arXiv 1810.04805)."""

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        return Choice()


class WholeWord(Policy):
    """Every word alike, with all of its tokens."""

    together = 8

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        return Choice(units=words(batch, self.vocabulary))


class Span(Policy):
    """Spans of words or tokens, of geometric length (SpanBERT, arXiv 1907.10529)."""

    together = 32

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        units = words(batch, self.vocabulary) if self.config.span.whole_words else None
        return Choice(units=units, span_lengths=self.config.span.lengths)


class Frequency(Policy):
    """Rarer tokens more often: in proportion to frequency ** −power, as far as a probability can be."""

    together = 32  # a batch may have more rare tokens than the corpus

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        tables = self.vocabulary.tables(batch.tokens.device)
        odds = proportional(tables.frequencies, tables.frequencies.clamp(min=1e-9) ** -self.config.power, rate)
        return Choice(chosen=draw.choose(batch.position_ids, odds[batch.tokens]))


class PartOfSpeech(Policy):
    """Words of some classes more often; the annotation ``pos`` tells a token's class."""

    together = 32

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        classes = batch.units[self.config.annotation_name]
        weights = [self.config.weights.get(name, 1.0) for name in PARTS_OF_SPEECH]
        weight = torch.tensor([*weights, 1.0], device=classes.device)[classes.clamp(max=len(weights))]
        text = self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real
        probability = rate * weight / _mean_per_sample(batch, weight, text)
        return Choice(chosen=draw.choose(words(batch, self.vocabulary), probability.clamp(max=1)))


class Annotated(Policy):
    """Units that an annotation marks: entities, or the spans that a learnt policy deems worth recovering.

    Each unit of a sample has the probability that hides ``rate`` of the sample's tokens in expectation, or 1 if its
    units have too few. In a sample without a unit tokens are chosen at random.
    """

    together = 32

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        units = batch.units[self.config.annotation_name]
        inside = units != NO_UNIT
        text = self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real
        in_units, in_all = (batch.sum_per_sample(which.long()) for which in (inside & text, text))
        without = in_units == 0
        probability = torch.where(without, rate, rate * in_all / in_units.clamp(min=1)).clamp(max=1)
        lost = _spread(batch, without)
        chosen = draw.choose(torch.where(lost, batch.position_ids, units), _spread(batch, probability))
        return Choice(chosen=chosen & (inside | lost), fallbacks=(without & (in_all > 0)).sum())


class Guided(Policy):
    """Nothing but units that an annotation marks, each with probability ``rate`` (MOMETAS, arXiv 2210.10293).

    In a sample without a unit tokens are chosen at random, 15 % of them.
    """

    together = 32

    def largest_share(self, rate: float) -> float:
        return max(rate, _RATE_WITHOUT_UNITS)

    def choose(self, batch: Batch, rate: float, draw: Draws) -> Choice:
        units = batch.units[self.config.annotation_name]
        inside = units != NO_UNIT
        text = self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real
        in_units, in_all = (batch.sum_per_sample(which.long()) for which in (inside & text, text))
        lost = _spread(batch, in_units == 0)
        probability = torch.full_like(units, rate, dtype=torch.float64).masked_fill(lost, _RATE_WITHOUT_UNITS)
        chosen = draw.choose(torch.where(lost, batch.position_ids, units), probability)
        return Choice(chosen=chosen & (inside | lost), fallbacks=((in_units == 0) & (in_all > 0)).sum())


POLICIES: dict[str, type[Policy]] = {
    "random": Random,
    "whole_word": WholeWord,
    "span": Span,
    "frequency": Frequency,
    "pos_weighted": PartOfSpeech,
    "salient": Annotated,
    "learned": Annotated,
    "guided": Guided,
}


def words(batch: Batch, vocabulary: Vocabulary) -> torch.Tensor:
    """Return the number of each token's word within its sample, ``[rows, length]`` int64; −1 for special tokens and
    padding, which are in none."""
    tables = vocabulary.tables(batch.tokens.device)
    text = tables.is_ordinary[batch.tokens] & batch.real
    after_text = torch.nn.functional.pad(text[:, :-1], (1, 0)) & (batch.position_ids > 0)
    begins = text & ~(tables.continues_word[batch.tokens] & after_text)
    so_far = begins.cumsum(1)
    earlier = torch.where(batch.position_ids == 0, so_far - begins.long(), 0).cummax(1).values  # of other samples
    return torch.where(text, so_far - earlier - 1, -1)


def proportional(shares: torch.Tensor, weights: torch.Tensor, rate: float) -> torch.Tensor:
    """Return probabilities in proportion to ``weights``, at most 1, whose mean under ``shares`` is ``rate``.

    Args:
        shares: ``[n]`` how often each kind occurs; they sum to 1.
        weights: ``[n]``, not negative.
    """
    shares, weights = shares.double(), weights.double()
    scale = rate / (shares * weights).sum().clamp(min=1e-300)
    for _ in range(30):  # what is cut off at 1 is made up for by the others
        reached = (shares * (scale * weights).clamp(max=1)).sum()
        scale = scale * (rate / reached.clamp(min=1e-300))
    return (scale * weights).clamp(max=1)


def _spread(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Spread ``values [S]`` over the places of each sample; padding gets anything."""
    if len(values) == 0:
        return torch.zeros_like(batch.tokens, dtype=values.dtype)
    return values[batch.segment_ids.clamp(min=0)]


def _mean_per_sample(batch: Batch, values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``values`` over the places of each sample where ``where``, spread over its places."""
    sums = batch.sum_per_sample(torch.where(where, values, 0))
    return _spread(batch, sums / batch.sum_per_sample(where.long()).clamp(min=1)).clamp(min=1e-9)
