"""Medley: pre-training of language encoders on many objectives at once."""

__version__ = "0.1.0"
