"""What objectives need to know of a tokenizer."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.tokenization import barred_ids


@dataclass(frozen=True)
class Vocabulary:
    """Token ids by rôle."""

    size: int
    """Number of ids, the width of a vocabulary head."""
    pad_id: int
    mask_id: int | None
    special_ids: np.ndarray
    """Sorted int64 ids that are no text: never masked, never a random replacement."""

    @property
    def ordinary_ids(self) -> np.ndarray:
        """Sorted int64 ids that are text."""
        return np.setdiff1d(np.arange(self.size), self.special_ids)

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        """Read a Hugging Face tokenizer; the unknown-word token counts as text."""
        special = barred_ids(tokenizer)
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return cls(len(tokenizer), pad, tokenizer.mask_token_id, np.array(sorted(special), np.int64))
