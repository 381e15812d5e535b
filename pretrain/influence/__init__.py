"""Influence: how much each sample of a step counts, by its own gradient or loss. Every weigher registers itself."""

from pretrain.influence import presence, weighers  # noqa: F401  (registration)
from pretrain.influence.base import WEIGHERS, Measures, Weigher, WeigherConfig, build_weigher, parse_weigher

__all__ = ["WEIGHERS", "Measures", "Weigher", "WeigherConfig", "build_weigher", "parse_weigher"]
