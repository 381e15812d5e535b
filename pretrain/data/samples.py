"""From text to samples of token ids."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from tokenizers import Encoding, Tokenizer, normalizers

from pretrain.data.splitting import cut_tokens

Encoder = Callable[[list[str]], list[Encoding]]
PLAIN = re.compile(r"[\t\n\r -~]*")  # what BERT's normaliser leaves as it is, but for capital letters


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
        encode = encoder(Tokenizer.from_file(self.tokenizer_file))
        return lambda tagged: (tagged[0], self._samples(encode, tagged[1]))

    def _samples(self, encode: Encoder, texts: list[str]) -> Samples:
        before, after = list(self.before), list(self.after)
        ids: list[int] = []
        lengths: list[int] = []
        too_short = 0
        for text, encoding in zip(texts, encode(texts), strict=True):
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


def encoder(tokenizer: Tokenizer) -> Encoder:
    """Return the function texts → encodings, without special tokens and with literal ones taken for text.

    A tokenizer like BERT's skips its normaliser on plain text, where that does nothing but fold case, if anything:
    the encodings are the same and take a fifth less time.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    encode = partial(tokenizer.encode_batch, add_special_tokens=False)
    normalizer = tokenizer.normalizer
    only_special = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    if not isinstance(normalizer, normalizers.BertNormalizer) or not only_special:
        return encode
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.normalizer = None
    bare.encode_special_tokens = True
    lowercase = normalizer.lowercase

    def encode_plain_apart(texts: list[str]) -> list[Encoding]:
        plain = [PLAIN.fullmatch(text) is not None for text in texts]
        folded = [text.lower() if lowercase else text for text, is_plain in zip(texts, plain, strict=True) if is_plain]
        others = [text for text, is_plain in zip(texts, plain, strict=True) if not is_plain]
        done = {True: iter(bare.encode_batch(folded, add_special_tokens=False)), False: iter(encode(others))}
        return [next(done[is_plain]) for is_plain in plain]

    return encode_plain_apart
