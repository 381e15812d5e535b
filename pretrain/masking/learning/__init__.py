"""Masking policies that are learnt: which spans of a text are worth recovering."""
