"""Masked language modelling on a labelled task's own texts (TAPT, arXiv 2004.10964), beside other objectives (TARTAN,
arXiv 2109.07437) or alone."""

from dataclasses import dataclass, replace

import torch
from pydantic import field_validator

from fused_objectives.targets import IGNORED
from pretrain.masking.config import MaskingConfig
from pretrain.model.rows import owned_by
from pretrain.objectives.base import LabelledView, TermLoss, register
from pretrain.objectives.mlm import MaskedLanguageModelling
from pretrain.objectives.task_samples import DrawnView, TaskConfig, TaskObjective


class TaskMLMConfig(TaskConfig):
    """Keys of ``objectives.task_mlm``."""

    masking: MaskingConfig = MaskingConfig()

    @field_validator("masking")
    @classmethod
    def _without_annotation(cls, masking: MaskingConfig) -> MaskingConfig:
        if masking.annotation_name is not None:
            raise ValueError(
                f"policy '{masking.policy}' reads an annotation of the store, which a task's texts lack; "
                "use random, whole_word, span or frequency"
            )
        return masking


@dataclass(frozen=True)
class MaskedDrawView(DrawnView):
    """A batch, and the task's texts that its rows drew, masked."""

    masked: LabelledView
    """Of the drawn samples; no targets where nothing was drawn."""


@register
class TaskMaskedLanguageModelling(TaskObjective, MaskedLanguageModelling):
    """Cross entropy of the original token at every chosen place of the task's texts; shares its head with ``mlm``.

    What is hidden in a drawn sample is a function of (seed, sample, draw), so it differs from draw to draw.
    """

    name = "task_mlm"
    Config = TaskMLMConfig

    def view(self, batch, draw, split, progress) -> MaskedDrawView:
        masked = MaskedLanguageModelling.corrupt(self, draw.samples, progress)
        labels = torch.where(draw.counted[:, None], masked.labels, IGNORED)
        counts = draw.per_sample(masked.counts[self.name] * draw.counted, len(batch.sample_ids))
        return MaskedDrawView(batch, batch.tokens, {self.name: counts}, {}, draw, replace(masked, labels=labels))

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        with owned_by(view.draw.drawn_for):
            losses = MaskedLanguageModelling.loss(self, model, view.masked, view.draw.weights(weights))
        total, sums = losses[self.name]
        return {self.name: TermLoss(total, view.draw.per_sample(sums, len(view.batch.sample_ids)))}
