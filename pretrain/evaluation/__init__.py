"""Evaluation by fine-tuning on end tasks."""

from pretrain.evaluation.finetune import Settings
from pretrain.evaluation.protocol import evaluate

__all__ = ["Settings", "evaluate"]
