"""Samplers: which objectives a step trains, with which shares."""

from pretrain.sampling.rules import SAMPLERS, Sampler, SamplerConfig, build_sampler

__all__ = ["SAMPLERS", "Sampler", "SamplerConfig", "build_sampler"]
