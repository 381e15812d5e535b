"""Masking: which tokens a recipe hides, and what becomes of them."""

from typing import Literal

import torch
from pydantic import model_validator

from fused_objectives.masking import Masked, mask_tokens
from fused_objectives.targets import capacity_for
from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.vocabulary import Vocabulary


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


class Masker:
    """Applies a policy: the masked-language-model corruption of a batch, a function of (seed, stream, sample,
    visit)."""

    def __init__(self, config: MaskingConfig, vocabulary: Vocabulary, seed: int, stream: str, impl: str = "auto"):
        if vocabulary.mask_id is None and max(config.split.mask.values()) > 0:
            raise UserError(
                "the store's tokenizer has no mask token; prepare the store with one that does, or set split.mask to 0"
            )
        self.config, self.seed, self.stream, self.impl = config, seed, stream, impl
        self.mask_id = vocabulary.mask_id or 0
        self._tables = {torch.device("cpu"): _tables(vocabulary)}

    def __call__(self, batch: Batch, progress: float) -> Masked:
        """Return corrupted tokens and labels (``IGNORED`` where not chosen), both ``[rows, length]`` int64."""
        is_ordinary, ordinary_ids = self._on(batch.tokens.device)
        return mask_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.stream,
            is_ordinary=is_ordinary,
            ordinary_ids=ordinary_ids,
            mask_id=self.mask_id,
            rate=self.config.rate.at(progress),
            mask_share=self.config.split.mask.at(progress),
            random_share=self.config.split.random.at(progress),
            impl=self.impl,
        )

    def capacity(self, batch: Batch, progress: float) -> int | None:
        """Return a number of targets that a call at ``progress`` does not exceed, known without asking the device; None
        on the CPU, where asking costs nothing."""
        return capacity_for(batch.tokens.numel(), self.config.rate.at(progress)) if batch.tokens.is_cuda else None

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vocabulary's tables on a device; they travel once."""
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[torch.device("cpu")])
        return self._tables[device]


def _tables(vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which ids are ordinary, ``[V]`` bool, and the ordinary ids."""
    is_ordinary = torch.ones(vocabulary.size, dtype=torch.bool)
    is_ordinary[torch.from_numpy(vocabulary.special_ids)] = False
    return is_ordinary, torch.from_numpy(vocabulary.ordinary_ids)
