"""From text to samples of token ids."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pretrain.data.splitting import cut_tokens


@dataclass(frozen=True)
class Samples:
    """``tokens [sum of lengths]`` uint32, ``lengths [samples]`` int64, and how many texts were too short for one."""

    tokens: np.ndarray
    lengths: np.ndarray
    too_short: int


@dataclass(frozen=True)
class SampleMaker:
    """Turns text into samples. Plain data, so that it can be sent to a process.

    Args:
        tokenizer_file: path of a ``tokenizer.json``.
        before, after: special ids at a sample's start and end.
        barred: ids that text must not become; they turn into ``unknown``, or into nothing where that is None.
        capacity, minimum: the most and the fewest tokens of text in a sample.
    """

    tokenizer_file: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    barred: frozenset[int]
    unknown: int | None
    capacity: int
    minimum: int

    def start(self) -> Callable[[tuple[str, list[str]]], tuple[str, Samples]]:
        """Load the tokenizer; return the function (tag, texts) → (tag, samples), each text tokenised for itself.

        Literal special tokens in a text ("[MASK]") are taken for text.
        """
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return lambda tagged: (tagged[0], self._samples(tokenizer, tagged[1]))

    def _samples(self, tokenizer: Tokenizer, texts: list[str]) -> Samples:
        before, after = list(self.before), list(self.after)
        ids: list[int] = []
        lengths: list[int] = []
        too_short = 0
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens = encoding.ids
            clean = self.barred.isdisjoint(tokens)
            spans = cut_tokens(text, encoding, self.capacity, self.minimum)
            too_short += not spans
            for start, end in spans:
                sample = before + (tokens[start:end] if clean else self._without_barred(tokens[start:end])) + after
                ids += sample
                lengths.append(len(sample))
        return Samples(np.array(ids, np.uint32), np.array(lengths, np.int64), too_short)

    def _without_barred(self, tokens: list[int]) -> list[int]:
        if self.unknown is None:
            return [token for token in tokens if token not in self.barred]
        return [self.unknown if token in self.barred else token for token in tokens]
