"""Swapped token detection (arXiv 2305.03981): tell tokens that changed places within their sample from the others."""

from dataclasses import replace

from fused_objectives.swapping import swap_tokens
from pretrain.data.batch import Batch
from pretrain.objectives.base import View, register
from pretrain.objectives.detection import DetectionConfig, TokenDetection


class STDConfig(DetectionConfig):
    """Keys of ``objectives.std``."""


@register
class SwappedTokenDetection(TokenDetection):
    """The chosen tokens of a sample change places; what stands where an equal token stood is not positive."""

    name = "std"
    Config = STDConfig

    def corrupt(self, batch: Batch, progress: float) -> View:
        tokens, labels = swap_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.name,
            is_ordinary=self.vocabulary.tables(batch.tokens.device).is_ordinary,
            rate=self.config.rate.at(progress),
            impl=self.impl,
        )
        return self.view(replace(batch, tokens=tokens), labels)
