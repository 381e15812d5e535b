"""Deleted token detection (MOMETAS, arXiv 2210.10293): tell behind which tokens something is missing."""

from fused_objectives.editing import delete_tokens
from pretrain.data.batch import Batch
from pretrain.objectives.base import View, register
from pretrain.objectives.detection import DetectionConfig, TokenDetection


class DTDConfig(DetectionConfig):
    """Keys of ``objectives.dtd``."""


@register
class DeletedTokenDetection(TokenDetection):
    """Some tokens are deleted, and the token after a gap is positive; special tokens stay."""

    name = "dtd"
    Config = DTDConfig

    def corrupt(self, batch: Batch, progress: float) -> View:
        edited = delete_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.name,
            rate=self.config.rate.at(progress),
            is_ordinary=self.vocabulary.tables(batch.tokens.device).is_ordinary,
            pad_id=self.vocabulary.pad_id,
            impl=self.impl,
        )
        return self.view(batch.edited(edited), edited.labels)
