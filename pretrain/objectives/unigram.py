"""Tokens drawn from the distribution of tokens in the corpus: what takes the place of a generator at no cost."""

import torch

from fused_objectives import draws
from pretrain.data.batch import Batch
from pretrain.model.vocabulary import Vocabulary


def draw_unigram(batch: Batch, vocabulary: Vocabulary, seed: int, stream: str) -> torch.Tensor:
    """Return a token of text for every place of a batch, ``[rows, length]`` int64: a function of (seed, stream, sample,
    visit, position)."""
    cumulative = vocabulary.tables(batch.tokens.device).cumulative
    word, *_ = draws.words(seed, stream, batch.position_ids, batch.segment_ids, batch.sample_ids, batch.visits)
    return torch.searchsorted(cumulative, word, right=True)
