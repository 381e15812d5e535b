"""From text to samples of token ids."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from tokenizers import Encoding, Tokenizer, normalizers

from pretrain.data.alignment import Mark, TokenText, numbered_spans, sample_units
from pretrain.data.annotations import NO_UNIT
from pretrain.data.annotators import Annotator
from pretrain.data.splitting import cut_tokens

Encoder = Callable[[list[str]], list[Encoding]]
Marker = Callable[[list[str]], Iterable[list[Mark]]]
PLAIN = re.compile(r"[\t\n\r -~]*")  # what BERT's normaliser leaves as it is, but for capital letters


@dataclass(frozen=True)
class Samples:
    """``tokens [sum of lengths]`` uint32, ``lengths [samples]`` int64, and how many texts were too short for one;
    ``units`` has annotation → ``[sum of lengths]`` uint16."""

    tokens: np.ndarray
    lengths: np.ndarray
    too_short: int
    units: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleMaker:
    """Turns text into samples. Plain data, so that it can be sent to a process.

    Args:
        tokenizer_file: path of a ``tokenizer.json``.
        before, after: special ids at a sample's start and end.
        barred: ids that text must not become; they turn into ``unknown``, or into nothing where that is None.
        capacity, minimum: the most and the fewest tokens of text in a sample.
        annotators: make annotations of the texts.
    """

    tokenizer_file: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    barred: frozenset[int]
    unknown: int | None
    capacity: int
    minimum: int
    annotators: tuple[Annotator, ...] = ()

    def start(self) -> Callable[[tuple[str, list[str]]], tuple[str, Samples]]:
        """Load the tokenizer; return the function (tag, texts) → (tag, samples), each text tokenised for itself.

        Literal special tokens in a text ("[MASK]") are taken for text.
        """
        encode = encoder(Tokenizer.from_file(self.tokenizer_file))
        markers = [annotator.start() for annotator in self.annotators]
        return lambda tagged: (tagged[0], self._samples(encode, markers, tagged[1]))

    def _samples(self, encode: Encoder, markers: list[Marker], texts: list[str]) -> Samples:
        before, after = list(self.before), list(self.after)
        ids: list[int] = []
        lengths: list[int] = []
        units: list[list[np.ndarray]] = [[] for _ in markers]
        too_short = 0
        marked = zip(*(mark(texts) for mark in markers), strict=True) if markers else ((),) * len(texts)
        for text, encoding, marks in zip(texts, encode(texts), marked, strict=True):
            tokens = encoding.ids
            clean = self.barred.isdisjoint(tokens)
            spans = cut_tokens(text, encoding, self.capacity, self.minimum)
            too_short += not spans
            for start, end in spans:
                sample = before + (tokens[start:end] if clean else self._without_barred(tokens[start:end])) + after
                ids += sample
                lengths.append(len(sample))
            if markers and spans:
                for made, found in zip(units, self._units(text, encoding, marks, spans), strict=True):
                    made += found
        return Samples(
            np.array(ids, np.uint32),
            np.array(lengths, np.int64),
            too_short,
            {
                annotator.name: np.concatenate([np.empty(0, np.uint16), *made])
                for annotator, made in zip(self.annotators, units, strict=True)
            },
        )

    def _units(
        self, text: str, encoding: Encoding, marks: tuple[list[Mark], ...], spans: list[tuple[int, int]]
    ) -> list[list[np.ndarray]]:
        """Return the units of a text's samples, special tokens included, for each annotator."""
        starts, ends = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2).T
        found = TokenText(text, starts, ends)
        kept = np.ones(len(starts), bool)
        if self.unknown is None and not self.barred.isdisjoint(encoding.ids):
            kept = ~np.isin(encoding.ids, list(self.barred))
        before, after = (np.full(len(frame), NO_UNIT, np.uint16) for frame in (self.before, self.after))
        units = []
        for annotator, its in zip(self.annotators, marks, strict=True):
            numbers = numbered_spans(found, its)
            inner = (numbers[start:end][kept[start:end]] for start, end in spans)
            units.append([part for one in inner for part in (before, sample_units(annotator.kind, one, its), after)])
        return units

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
