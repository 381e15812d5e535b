"""What objectives do to a sample, in plain loops: the random words, the draws, and the losses of samples alone."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from fused_objectives.philox import philox, philox_of_key
from pretrain.data.batch import Batch
from pretrain.model.attention import Layout
from pretrain.model.multi_objective import MultiObjectiveModel
from tests.builders import VOCABULARY, padded

SEED = 1  # of the builders' models

# Common and rare tokens, and two that do not occur at all.
COUNTED = replace(VOCABULARY, counts=np.arange(VOCABULARY.size) ** 2 % 37 * (np.arange(VOCABULARY.size) % 50 > 0))


def word(stream: str, counter: int, sample_id: int, visit: int, number: int = 0) -> int:
    """Return one of the four random words of a token."""
    return int(philox(SEED, stream, counter, sample_id & 0xFFFFFFFF, sample_id >> 32, visit)[number])


def unigram(stream: str, position: int, sample_id: int, visit: int, vocabulary=COUNTED) -> int:
    """Return the first token whose cumulative share of the corpus' text passes a random number."""
    counts = [int(count) for count in vocabulary.counts]
    for index in vocabulary.special_ids:
        counts[index] = 0
    aim, reached = Fraction(word(stream, position, sample_id, visit), 2**32), 0
    for token, count in enumerate(counts):
        reached += count
        if Fraction(reached, sum(counts)) > aim:
            return token
    raise AssertionError("the shares do not add up to 1")


def samples_of(batch: Batch) -> list[list[int]]:
    """Return the tokens of each sample of a batch; they must stand in the order of their positions."""
    found = []
    for number in range(len(batch.sample_ids)):
        mine = batch.segment_ids == number
        assert batch.position_ids[mine].tolist() == list(range(int(batch.lengths[number])))
        found.append(batch.tokens[mine].tolist())
    return found


def labels_of(batch: Batch, labels: torch.Tensor) -> list[list[int]]:
    """Return the labels of each sample's tokens."""
    return [labels[batch.segment_ids == number].tolist() for number in range(len(batch.sample_ids))]


@torch.no_grad()
def detection_sums(
    model: MultiObjectiveModel, head: str, samples: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[float]:
    """Return the sum of binary cross entropies over each sample's tokens, each sample in a batch of its own."""
    sums = []
    for tokens, wanted in zip(samples, labels, strict=True):
        batch = padded([np.array(tokens, np.int64)])
        logits = model.heads[head](model.encoder(batch.tokens, Layout(batch)))[0, :, 0]
        losses = F.binary_cross_entropy_with_logits(logits, torch.tensor(wanted, dtype=torch.float32), reduction="none")
        sums.append(float(losses.sum()))
    return sums


def gumbel_draw(stream: str, logits: torch.Tensor, position: int, sample_id: int, visit: int) -> int:
    """Add Gumbel noise to one place's logits and take the largest, in numpy's float64."""
    key = philox(SEED, stream, position, sample_id, 0, visit)[:2]
    entries = np.arange(len(logits))
    words = np.choose(entries % 4, philox_of_key(*key, entries // 4))
    noise = -np.log(-np.log1p(-(words + 0.5) / 2**32))
    return int((logits.double().numpy() + noise).argmax())
