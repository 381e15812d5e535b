"""Objectives: what the model is trained to do. One file a family; every file registers its own."""

from pretrain.objectives import clm, cse, denoise, end_task, mlm, rtd, span_corruption  # noqa: F401  (registration)
from pretrain.objectives.base import REGISTRY, Objective, View, build_objectives

__all__ = ["REGISTRY", "Objective", "View", "build_objectives"]
