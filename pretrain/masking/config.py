"""Keys of ``masking`` in a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.annotations import PARTS_OF_SPEECH

ANNOTATED = {"salient": "salient", "learned": "learned", "pos_weighted": "pos", "guided": "salient"}
"""Policy → the annotation of the store that it reads, unless the recipe names another."""

LIVE = "live:"
"""What the name of an annotation begins with that an extractor computes while training; its folder follows."""

_OWN_KEYS = {
    "annotation": tuple(ANNOTATED),
    "live": ("learned",),
    "span": ("span",),
    "power": ("frequency",),
    "weights": ("pos_weighted",),
}


class SplitConfig(Config):
    """What happens to a chosen token; whatever ``mask`` and ``random`` leave is kept as it is."""

    mask: ScheduledFraction = Scheduled(start=0.8)
    """Fraction that becomes the mask token."""
    random: ScheduledFraction = Scheduled(start=0.1)
    """Fraction that becomes a random token of the ordinary vocabulary."""

    @model_validator(mode="after")
    def _sums_to_one(self):
        moments = {percent / 100 for percent in range(101)} | {*self.mask.steps, *self.random.steps}
        if any(self.mask.at(moment) + self.random.at(moment) > 1 + 1e-9 for moment in moments):
            raise ValueError("mask and random sum to more than 1")
        return self


class SpanConfig(Config):
    """Lengths of spans (SpanBERT, arXiv 1907.10529, section 3.1)."""

    stop: float = Field(0.2, gt=0, le=1)
    """Probability that a span ends after each of its units: lengths are geometric."""
    longest: int = Field(10, ge=1, le=64)
    """Longest span; the probabilities of the lengths up to it are scaled to sum to 1."""
    whole_words: bool = True
    """Whether the units are words or tokens."""

    @property
    def lengths(self) -> tuple[float, ...]:
        """Probability of 1, 2, … units."""
        raw = [(1 - self.stop) ** k for k in range(self.longest)]
        return tuple(p / sum(raw) for p in raw)


class ChoiceConfig(Config):
    """Which tokens are chosen, and how many."""

    policy: Literal["random", "whole_word", "span", "salient", "frequency", "pos_weighted", "learned", "guided"] = (
        "random"
    )
    """docs/masking.md describes them."""
    rate: ScheduledFraction = Scheduled(start=0.15)
    """Expected fraction of ordinary tokens that are chosen; for ``guided`` the probability of each unit."""
    annotation: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Name of the annotation that ``salient``, ``learned``, ``guided`` or ``pos_weighted`` reads, if not their own."""
    live: str | None = Field(None, min_length=1)
    """For ``learned``: folder of an extractor that computes the spans at every step, in place of an annotation."""
    span: SpanConfig = SpanConfig()
    """For ``span``."""
    power: float = Field(0.5, ge=0, le=2)
    """For ``frequency``: a token's probability falls with this power of its frequency."""
    weights: dict[str, float] = {}
    """For ``pos_weighted``: part of speech → how much likelier than others its words are chosen; 1 if absent."""

    @model_validator(mode="after")
    def _consistent(self):
        if max(self.rate.values()) == 0:
            raise ValueError("rate 0 hides nothing")
        for key, policies in _OWN_KEYS.items():
            given = getattr(self, key) != type(self).model_fields[key].default  # a resolved recipe names every key
            if given and self.policy not in policies:
                raise ValueError(f"'{key}' goes with policy {' or '.join(policies)}, not with {self.policy}")
        if self.live and self.annotation:
            raise ValueError("'live' computes what 'annotation' would hold; give one of them")
        for name, weight in self.weights.items():
            if name not in PARTS_OF_SPEECH:
                raise ValueError(f"weights: '{name}' is none of {', '.join(PARTS_OF_SPEECH)}")
            if weight < 0:
                raise ValueError(f"weights: {name} must not be negative")
        return self

    @property
    def annotation_name(self) -> str | None:
        """The annotation that the policy reads, or None."""
        if self.live:
            return f"{LIVE}{self.live}"
        return self.annotation or ANNOTATED.get(self.policy)


class MaskingConfig(ChoiceConfig):
    """Which tokens are chosen, how many, and what becomes of each."""

    split: SplitConfig = SplitConfig()
