"""Guided masked language modelling (MOMETAS, arXiv 2210.10293): recover tokens of what an annotation marks."""

from typing import Literal

from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.masking.config import MaskingConfig
from pretrain.objectives.base import register
from pretrain.objectives.mlm import MaskedLanguageModelling


class GuidedMaskingConfig(MaskingConfig):
    """Masking within units, such as named entities."""

    policy: Literal["guided"] = "guided"
    rate: ScheduledFraction = Scheduled(start=0.5)
    """Probability that a unit is chosen."""


class GuidedMLMConfig(Config):
    """Keys of ``objectives.guided_mlm``."""

    masking: GuidedMaskingConfig = GuidedMaskingConfig()


@register
class GuidedMaskedLanguageModelling(MaskedLanguageModelling):
    """Cross entropy of the original token at every chosen place, all of which lie in units; the vocabulary head is
    shared with ``mlm``."""

    name = "guided_mlm"
    Config = GuidedMLMConfig
