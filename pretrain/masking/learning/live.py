"""Spans of a learnt policy computed while training, in place of an annotation that was computed once."""

import time
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.data.store import Store
from pretrain.errors import UserError
from pretrain.masking.learning.annotate import BATCH_TOKENS, check_fits, units_of_samples
from pretrain.masking.learning.extractor import Extractor

TIMED_TOKENS = 1 << 13


class LiveExtractor:
    """An extractor that stores are read with.

    Args:
        folder: what ``medley learn-mask`` wrote.

    Raises:
        UserError: if the folder holds no extractor.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.extractor, self.card = Extractor.load(self.folder)

    def on(self, store: Store) -> "LiveSpans":
        """Return the spans of a store.

        Raises:
            UserError: if the extractor was made for another tokenizer or for shorter samples.
        """
        try:
            check_fits(self.extractor, self.folder, store.folder.parent, store.max_length)
        except UserError as error:
            raise UserError(str(error).replace("--model", "masking.live", 1)) from None
        return LiveSpans(self, store)


class LiveSpans:
    """Spans of a store's samples, those that ``medley annotate … learned`` would have written; does what an
    :class:`~pretrain.data.annotations.Annotation` does."""

    def __init__(self, live: LiveExtractor, store: Store):
        self.live, self.store = live, store

    def look_up(self, ids: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the units of the samples ``ids``, one after another."""
        live = self.live
        budget = BATCH_TOKENS[live.extractor.device.type]
        return units_of_samples(live.extractor, self.store, ids, live.card.top_k, live.card.max_span, budget)

    @cached_property
    def note(self) -> str:
        """What it costs, measured on the store's first samples, and what would spare it."""
        count = max(1, int(np.searchsorted(np.cumsum(self.store.lengths[:TIMED_TOKENS]), TIMED_TOKENS)))
        ids = np.arange(min(count, len(self.store)))
        self.look_up(ids[:8], *self.store.index[ids[:8]].T)  # warms up
        began = time.perf_counter()
        tokens = len(self.look_up(ids, *self.store.index[ids].T))
        speed = tokens / (time.perf_counter() - began)
        return (
            f"its spans are computed live, at {speed:,.0f} tokens/s and at every step; once and for all with "
            f"'medley annotate {self.store.folder.parent} learned --model {self.live.folder}'"
        )
