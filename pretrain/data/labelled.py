"""Labelled samples as tokens: the splits of an end task, made with a store's tokenizer and laid out one a row."""

import hashlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.data.batch import Batch
from pretrain.data.tasks import Split
from pretrain.data.tokenization import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 1000  # texts a call of the tokenizer


@dataclass(frozen=True)
class LabelledSamples:
    """The samples of one split, one after another, on one device."""

    tokens: torch.Tensor
    """``[sum of lengths]`` int32."""
    offsets: torch.Tensor
    """``[samples]`` int64: where in ``tokens`` a sample begins."""
    lengths: torch.Tensor
    """``[samples]`` int64, in tokens, special tokens included; none is 0."""
    labels: torch.Tensor
    """``[samples]`` int64 classes, or float32 numbers."""
    longest: int
    """Length of the longest sample, in tokens."""
    cut: int
    """Samples that were longer than the limit."""

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "LabelledSamples":
        """Return the samples on ``device``."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: array.to(device) for name, array in arrays.items() if torch.is_tensor(array)})

    def lay_out(self, indices: torch.Tensor, sample_rows: torch.Tensor, row_length: int, pad_id: int) -> Batch:
        """Return the samples at ``indices [n]``, one a row; the host waits for no device.

        Args:
            indices: int64, of this split; they become the samples' ids.
            sample_rows: ``[n]`` int64, the numbers of the rows in the step's global batch.
            row_length: places a row, :attr:`longest` or more.
            pad_id: token that fills the rows.
        """
        lengths = self.lengths[indices]
        positions = torch.arange(row_length, device=indices.device).expand(len(indices), row_length)
        real = positions < lengths[:, None]
        places = torch.where(real, self.offsets[indices][:, None] + positions, 0)
        return Batch(
            tokens=torch.where(real, self.tokens[places].long(), pad_id),
            segment_ids=torch.where(real, torch.arange(len(indices), device=indices.device)[:, None], -1),
            position_ids=torch.where(real, positions, 0),
            sample_ids=indices,
            visits=torch.zeros_like(indices),
            lengths=lengths,
            sample_rows=sample_rows,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over tokens, lengths and labels."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.lengths, self.labels):
            digest.update(array.cpu().numpy().tobytes())
        return digest.hexdigest()


def encode(
    split: Split, tokenizer: "PreTrainedTokenizerFast", max_length: int, pad_id: int, regression: bool
) -> LabelledSamples:
    """Tokenise a split as samples of a store are: framed by special tokens; pairs with their border between them.

    Samples of more than ``max_length`` tokens are cut from the end, pairs from the longer text first. An empty text
    of a tokenizer without special tokens is one ``pad_id``.
    """
    before, after = frame(tokenizer)
    border = [] if split.pairs is None else pair_border(tokenizer)
    room = max(0, max_length - len(before) - len(border) - len(after))
    samples, cut = [], 0
    firsts = _ids(split.texts, tokenizer)
    seconds = [[]] * len(firsts) if split.pairs is None else _ids(split.pairs, tokenizer)
    for first, second in zip(firsts, seconds, strict=True):
        cut += len(first) + len(second) > room
        half = (room + (len(first) > len(second))) // 2
        kept = min(len(first), max(room - len(second), half))
        samples.append([*before, *first[:kept], *border, *second[: room - kept], *after] or [pad_id])
    lengths = np.array([len(sample) for sample in samples])
    return LabelledSamples(
        tokens=torch.tensor([token for sample in samples for token in sample], dtype=torch.int32),
        offsets=torch.from_numpy(np.cumsum(lengths) - lengths),
        lengths=torch.from_numpy(lengths),
        labels=torch.tensor(split.labels, dtype=torch.float32 if regression else torch.int64),
        longest=int(lengths.max()),
        cut=cut,
    )


def pair_border(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the special ids between the two texts of a pair: what the tokenizer itself puts there, or where it puts
    nothing, what ends a sample."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    before = next((i for i in range(len(one)) if one[i : i + len(bare)] == bare), 0)
    return two[before + len(bare) : len(two) - (len(one) - before)] or frame(tokenizer)[1]


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        ids += tokenizer(texts[start : start + _AT_ONCE], add_special_tokens=False, verbose=False)["input_ids"]
    return ids
