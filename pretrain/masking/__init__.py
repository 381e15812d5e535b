"""Masking policies: which tokens an objective hides."""
