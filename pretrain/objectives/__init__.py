"""Objectives: what the model is trained to do. One file a family; every file registers its own."""

from pretrain.courses import correction  # noqa: F401  (registration)
from pretrain.objectives import (  # noqa: F401
    clm,
    cse,
    denoise,
    dtd,
    end_task,
    guided_mlm,
    itd,
    mlm,
    rtd,
    sop,
    span_corruption,
    std,
    task_mlm,
)
from pretrain.objectives.base import REGISTRY, Objective, View, build_objectives

__all__ = ["REGISTRY", "Objective", "View", "build_objectives"]
