"""Masking policies and the corruption they share.

A policy says which tokens are chosen; :class:`Masker` then hides them. Both draw from one Philox call a token:
word 0 chooses, word 1 decides between mask, random and keep, word 2 picks the random token.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import model_validator

from fused_objectives.philox import below
from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.vocabulary import Vocabulary

IGNORED = -100
"""Label of a place that is no target."""


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


class MaskingConfig(Config):
    """Which tokens are chosen, how many, and what becomes of them."""

    policy: Literal["random"] = "random"
    """``random``: every ordinary token alike (arXiv 1810.04805)."""
    rate: ScheduledFraction = Scheduled(start=0.15)
    """Expected fraction of ordinary tokens that are chosen."""
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _hides_something(self):
        if max(self.rate.values()) == 0:
            raise ValueError("rate 0 hides nothing")
        return self


class MaskingPolicy(ABC):
    """Chooses tokens to hide."""

    @abstractmethod
    def choose(self, batch: Batch, word: torch.Tensor, eligible: torch.Tensor, rate: float) -> torch.Tensor:
        """Return which places are chosen.

        Args:
            batch: the rows.
            word: ``[rows, length]`` random 32-bit words.
            eligible: ``[rows, length]`` bool, places that hold ordinary tokens.
            rate: expected fraction of them to choose.

        Returns:
            ``[rows, length]`` bool, within ``eligible``.
        """


class RandomPolicy(MaskingPolicy):
    """Every eligible token alike, independently."""

    def choose(self, batch: Batch, word: torch.Tensor, eligible: torch.Tensor, rate: float) -> torch.Tensor:
        return eligible & (word < int(rate * 2**32))


POLICIES: dict[str, type[MaskingPolicy]] = {"random": RandomPolicy}


class Masker:
    """Applies a policy: the masked-language-model corruption of a batch, a function of (seed, stream, sample,
    visit)."""

    def __init__(self, config: MaskingConfig, vocabulary: Vocabulary, seed: int, stream: str):
        if vocabulary.mask_id is None and max(config.split.mask.values()) > 0:
            raise UserError(
                "the store's tokenizer has no mask token; prepare the store with one that does, or set split.mask to 0"
            )
        self.config, self.seed, self.stream = config, seed, stream
        self.policy = POLICIES[config.policy]()
        self.mask_id = vocabulary.mask_id or 0
        self.ordinary_ids = torch.from_numpy(vocabulary.ordinary_ids)
        self.is_ordinary = torch.ones(vocabulary.size, dtype=torch.bool)
        self.is_ordinary[torch.from_numpy(vocabulary.special_ids)] = False

    def eligible(self, batch: Batch) -> torch.Tensor:
        """Return ``[rows, length]`` bool: places with an ordinary token."""
        return batch.real & self.is_ordinary.to(batch.tokens.device)[batch.tokens]

    def __call__(self, batch: Batch, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return corrupted tokens and labels (:data:`IGNORED` where not chosen), both ``[rows, length]`` int64."""
        choose, kind, replacement, _ = batch.random_words(self.seed, self.stream)
        chosen = self.policy.choose(batch, choose, self.eligible(batch), self.config.rate.at(progress))
        mask, random = self.config.split.mask.at(progress), self.config.split.random.at(progress)
        to_mask, to_random = (kind < int(bound * 2**32) for bound in (mask, mask + random))
        ordinary = self.ordinary_ids.to(batch.tokens.device)
        tokens = torch.where(chosen & to_random, ordinary[below(replacement, len(ordinary))], batch.tokens)
        tokens = torch.where(chosen & to_mask, self.mask_id, tokens)
        return tokens, torch.where(chosen, batch.tokens, IGNORED)
