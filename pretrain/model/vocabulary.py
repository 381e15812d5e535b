"""What objectives need to know of a tokenizer."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from pretrain.data.tokenization import barred_ids, continues_word, sentence_ends, sentinel_ids


@dataclass(frozen=True)
class Tables:
    """What is looked up by token id, on one device."""

    is_ordinary: torch.Tensor
    """``[V]`` bool: text."""
    ordinary_ids: torch.Tensor
    """``[n]`` int64: the ids that are text."""
    continues_word: torch.Tensor
    """``[V]`` bool: belongs to the word of the token before."""
    frequencies: torch.Tensor
    """``[V]`` float64: share of a store's text, 0 for special tokens."""
    sentinel_ids: torch.Tensor
    """``[sentinels]`` int64: the ids that stand for spans."""
    cumulative: torch.Tensor
    """``[V]`` int64: 2³² × the share of the tokens up to and including each; a 32-bit word below it and not below the
    one before draws the token."""
    ends_sentence: torch.Tensor
    """``[V]`` bool: ends a sentence."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token ids by rôle."""

    size: int
    """Number of ids, the width of a vocabulary head."""
    pad_id: int
    mask_id: int | None
    special_ids: np.ndarray
    """Sorted int64 ids that are no text: never masked, never a random replacement."""
    continuing_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Sorted int64 ids of tokens that belong to the word of the token before."""
    counts: np.ndarray | None = None
    """``[size]`` how often each token occurs in a part of the store; None takes all alike."""
    bos_id: int | None = None
    """Begins a sample."""
    eos_id: int | None = None
    """Ends a sample."""
    sentinel_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 ids that stand for spans, the first, second, …: special tokens too."""
    separator_id: int | None = None
    """The token between two texts, if there is one."""
    sentence_end_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Sorted int64 ids of tokens that end a sentence."""

    @property
    def ordinary_ids(self) -> np.ndarray:
        """Sorted int64 ids that are text."""
        return np.setdiff1d(np.arange(self.size), self.special_ids)

    @cache  # noqa: B019  (one vocabulary a run)
    def tables(self, device: torch.device) -> Tables:
        """Return the tables on a device; they travel once."""
        is_ordinary = np.ones(self.size, bool)
        is_ordinary[self.special_ids] = False
        continues = np.zeros(self.size, bool)
        continues[self.continuing_ids] = True
        ends = np.zeros(self.size, bool)
        ends[self.sentence_end_ids] = True
        counts = np.where(is_ordinary, 1.0 if self.counts is None else self.counts, 0.0)
        if not counts.any():
            counts = is_ordinary.astype(np.float64)
        frequencies = counts / max(counts.sum(), 1.0)
        running = counts.cumsum()  # here and not on the device, so that all devices round alike
        cumulative = np.rint(running / max(running[-1], 1.0) * 2**32).astype(np.int64)
        arrays = is_ordinary, self.ordinary_ids, continues, frequencies, self.sentinel_ids, cumulative, ends
        return Tables(*(torch.from_numpy(array).to(device) for array in arrays))

    @classmethod
    def of(cls, tokenizer, counts: np.ndarray | None = None) -> "Vocabulary":
        """Read a Hugging Face tokenizer; the unknown-word token counts as text."""
        sentinels = sentinel_ids(tokenizer)
        special = barred_ids(tokenizer) | set(sentinels.tolist())
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        begin, end = (tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
        return cls(
            size=len(tokenizer),
            pad_id=pad,
            mask_id=tokenizer.mask_token_id,
            special_ids=np.array(sorted(special), np.int64),
            continuing_ids=continues_word(tokenizer),
            counts=counts,
            bos_id=next((index for index in begin if index is not None), None),
            eos_id=next((index for index in end if index is not None), None),
            sentinel_ids=sentinels,
            separator_id=tokenizer.sep_token_id,
            sentence_end_ids=sentence_ends(tokenizer),
        )
