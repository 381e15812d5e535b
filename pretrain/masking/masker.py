"""Masking: a policy chooses tokens, and what is chosen is hidden, replaced or kept."""

from typing import NamedTuple

import torch

from fused_objectives.masking import mask_tokens
from fused_objectives.targets import IGNORED, capacity_for
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import ChoiceConfig, MaskingConfig
from pretrain.masking.policies import POLICIES, Draws
from pretrain.model.vocabulary import Vocabulary


class MaskedBatch(NamedTuple):
    """A batch with tokens hidden."""

    tokens: torch.Tensor
    """``[rows, length]`` int64: what the model reads."""
    labels: torch.Tensor
    """``[rows, length]`` int64: the original where chosen, ``IGNORED`` elsewhere."""
    capacity: int | None
    """A number of targets that is not exceeded, known without asking the device; None on the CPU, where asking costs
    nothing."""
    fallbacks: torch.Tensor
    """``[]`` int64: samples in which the policy found nothing to choose from, so that random tokens were chosen."""


class ChosenTokens(NamedTuple):
    """What a policy chose."""

    chosen: torch.Tensor
    """``[rows, length]`` bool."""
    capacity: int | None
    """As in :class:`MaskedBatch`, for the chosen tokens."""
    fallbacks: torch.Tensor
    """As in :class:`MaskedBatch`."""


class Chooser:
    """The choice of tokens of a recipe: a function of (seed, stream, sample, visit) and of the run's progress."""

    def __init__(self, config: ChoiceConfig, vocabulary: Vocabulary, seed: int, stream: str, impl: str = "auto"):
        self.config, self.seed, self.stream, self.impl = config, seed, stream, impl
        self.vocabulary = vocabulary
        self.policy = POLICIES[config.policy](config, vocabulary)

    @property
    def annotations(self) -> dict[str, str]:
        """The annotation of the store that batches must bring, if any: name → kind."""
        name = self.config.annotation_name
        return {} if name is None else {name: "classes" if self.config.policy == "pos_weighted" else "spans"}

    def choose(self, batch: Batch, progress: float) -> ChosenTokens:
        """Choose tokens of a batch at ``progress``, the fraction of the run done."""
        _, labels, capacity, fallbacks = self._mask(batch, progress, mask_share=0.0, random_share=0.0)
        return ChosenTokens(labels != IGNORED, capacity, fallbacks)

    def _mask(self, batch: Batch, progress: float, mask_share: float, random_share: float) -> MaskedBatch:
        rate, tables = self.config.rate.at(progress), self.vocabulary.tables(batch.tokens.device)
        choice = self.policy.choose(batch, rate, Draws(batch, self.seed, self.stream))
        masked = mask_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.stream,
            is_ordinary=tables.is_ordinary,
            ordinary_ids=tables.ordinary_ids,
            mask_id=self.vocabulary.mask_id or 0,
            rate=rate if choice.chosen is None else 1.0,
            mask_share=mask_share,
            random_share=random_share,
            eligible=choice.chosen,
            units=choice.units,
            span_lengths=choice.span_lengths,
            impl=self.impl,
        )
        capacity = None
        if batch.tokens.is_cuda:
            share = self.policy.largest_share(rate)
            capacity = capacity_for(batch.tokens.numel(), share, together=self.policy.together)
        fallbacks = choice.fallbacks
        if fallbacks is None:
            fallbacks = batch.tokens.new_zeros(())
        return MaskedBatch(*masked, capacity, fallbacks)


class Masker(Chooser):
    """The masking of a recipe: what it chooses is hidden, replaced or kept."""

    def __init__(self, config: MaskingConfig, vocabulary: Vocabulary, seed: int, stream: str, impl: str = "auto"):
        if vocabulary.mask_id is None and max(config.split.mask.values()) > 0:
            raise UserError(
                "the store's tokenizer has no mask token; prepare the store with one that does, or set split.mask to 0"
            )
        super().__init__(config, vocabulary, seed, stream, impl)

    def __call__(self, batch: Batch, progress: float) -> MaskedBatch:
        """Mask a batch at ``progress``, the fraction of the run done."""
        split = self.config.split
        return self._mask(batch, progress, split.mask.at(progress), split.random.at(progress))
