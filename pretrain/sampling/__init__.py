"""Samplers: which objectives a step trains, with which shares. One file a family; every file registers its own."""

from pretrain.sampling import aioli, mometas, pike, rules, tartan, training_losses  # noqa: F401  (registration)
from pretrain.sampling.base import (
    SAMPLERS,
    Measured,
    Sampler,
    SamplerConfig,
    Wish,
    build_sampler,
    parse_sampler,
)

__all__ = ["SAMPLERS", "Measured", "Sampler", "SamplerConfig", "Wish", "build_sampler", "parse_sampler"]
