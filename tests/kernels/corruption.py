"""What the tests of corruptions share: a vocabulary, samples laid out by a plain loop, Philox one call at a time."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fused_objectives.philox import philox

VOCABULARY, PAD, CLS, SEP, MASK = 97, 0, 1, 50, 96
SPECIAL = (PAD, CLS, SEP, MASK)
ORDINARY = [token for token in range(VOCABULARY) if token not in SPECIAL]
IS_ORDINARY = torch.tensor([token in ORDINARY for token in range(VOCABULARY)])
ORDINARY_IDS = torch.tensor(ORDINARY)
KEY = {"seed": 2**40 + 2**31 + 7, "stream": "corruption"}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote to holds the greatest integer, not by chance what it should."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Sample(NamedTuple):
    tokens: list[int]
    id: int
    visit: int


class Rows(NamedTuple):
    """The first five arguments of a corruption."""

    tokens: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    sample_ids: torch.Tensor
    visits: torch.Tensor

    def to(self, device: str) -> "Rows":
        return Rows(*(tensor.to(device) for tensor in self))


@cache
def draws(position: int, sample: int, visit: int) -> tuple[int, ...]:
    """The four words of one token, one call of the generic Philox."""
    return tuple(philox(KEY["seed"], KEY["stream"], position, sample, sample >> 32, visit))


def below(word: int, probability: float) -> bool:
    return word < int(probability * 2**32)


def pick(word: int) -> int:
    return ORDINARY[word * len(ORDINARY) // 2**32]


def random_sample(length: int, number: int, special: bool = True) -> Sample:
    """Text between [CLS] and [SEP], as far as there is room, with some special tokens and repetitions within."""
    rng = np.random.default_rng(number)
    tokens = rng.choice([*ORDINARY[:20], *ORDINARY[-3:]], length)
    if special:
        tokens[rng.random(length) < 0.1] = MASK
        tokens[:1], tokens[1:][-1:] = CLS, SEP
    return Sample(tokens.tolist(), [number, 2**32 + number, 2**45 - number][number % 3], number % 4)


def lay_out(rows: Sequence[Sequence[Sample | int]], length: int, order: Sequence[int] | None = None, pad=PAD) -> Rows:
    """Lay samples out in rows, place by place; a number among them leaves so many places empty.

    ``order`` gives the segment id of each sample in turn; ids may be left out, as of samples without a token.
    """
    count = sum(isinstance(item, Sample) for row in rows for item in row)
    order = list(range(count)) if order is None else list(order)
    total = max(order, default=-1) + 1
    tokens = torch.full((len(rows), length), pad)
    segments, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    ids, visits = torch.full((total,), 12345), torch.zeros(total, dtype=torch.int64)
    for number, row in enumerate(rows):
        column = 0
        for item in row:
            if not isinstance(item, Sample):
                column += item
                continue
            segment = order.pop(0)
            ids[segment], visits[segment] = item.id, item.visit
            for position, token in enumerate(item.tokens):
                tokens[number, column], segments[number, column], positions[number, column] = token, segment, position
                column += 1
    return Rows(tokens, segments, positions, ids, visits)


SAMPLES = [random_sample(length, number) for number, length in enumerate([40, 1, 2, 70, 3, 33, 1, 17, 100])]


def odd_rows() -> Rows:
    """Rows of all kinds: full, with padding before, between and behind samples, and empty; segment ids in no order,
    one of them of a sample without tokens; padding that looks like text."""
    a, b, c, d, e, f, g, h, i = SAMPLES
    return lay_out(
        [[a, b, c], [], [5, d, 3, e, 1, f], [g, h], [1, i]], 117, [3, 1, 9, 0, 2, 8, 5, 4, 7], pad=ORDINARY[1]
    )


def padded_rows() -> Rows:
    """The same samples one a row."""
    return lay_out([[sample] for sample in SAMPLES], 104)


def reordered_rows() -> Rows:
    """The same samples in one long row, the last first."""
    return lay_out([list(reversed(SAMPLES))], 300)


def by_sample(rows: Rows, *values: torch.Tensor) -> dict[int, tuple]:
    """Gather what became of each sample, by its global id."""
    gathered = {}
    for segment, sample in enumerate(rows.sample_ids.tolist()):
        mine = (rows.segments == segment).cpu()
        if mine.any():
            gathered[sample] = tuple(value.cpu()[mine].tolist() for value in values)
    return gathered


def many(samples: int, length: int, seed: int = 0) -> Rows:
    """Samples of random text, one a row, without a loop over places: [CLS], text, [SEP] and 8 places of padding."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.choice(ORDINARY, (samples, length)))
    tokens[:, 0], tokens[:, -9], tokens[:, -8:] = CLS, SEP, PAD
    columns = torch.arange(length).expand(samples, length)
    real = columns < length - 8
    segments = torch.where(real, torch.arange(samples)[:, None], -1)
    return Rows(
        tokens, segments, torch.where(real, columns, 0), torch.arange(samples) + 2**33, torch.ones_like(segments[:, 0])
    )


def same(ours, expected) -> None:
    """Assert that tensors are equal and int64."""
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one.cpu(), torch.as_tensor(other).cpu())
