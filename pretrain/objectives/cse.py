"""Contrastive sentence embeddings (SimCSE, arXiv 2104.08821, eq. 4): two dropout views of a sample find each other."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import Objective, TermLoss, View, register


class CSEConfig(Config):
    """Keys of ``objectives.cse``."""

    temperature: float = Field(0.05, gt=0)
    """Divides the cosine similarities."""
    group_rows: int = Field(8, ge=1)
    """The negatives of a sample are the other samples of its group: this many consecutive rows of the global batch.
    Fixed by the recipe, so that the loss does not change with the micro-batch or the number of ranks; a micro-batch
    must hold whole groups."""
    pooling: Literal["first", "mean"] = "first"
    """A sample's embedding: its first token's hidden state, or the mean over its tokens."""


class EmbeddingHead(nn.Module):
    """Linear layer and tanh on the pooled hidden state."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(pooled))


@dataclass(frozen=True)
class GroupedView(View):
    """A view whose samples belong to groups."""

    candidates: torch.Tensor
    """``[S, S]`` bool: which samples' second views a sample's first view is compared with, itself included."""


@register
class ContrastiveSentenceEmbeddings(Objective):
    """Cross entropy of finding one's own second view among the group's. Samples couple: there is no per-sample
    gradient."""

    name = "cse"
    Config = CSEConfig
    heads = ("embedding",)
    needs_dropout = True
    couples_samples = True

    @property
    def rows_together(self) -> int:
        return self.config.group_rows

    def check(self, encoder: Encoder) -> None:
        if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in encoder.modules()):
            raise UserError(
                "objectives.cse: the backbone has no dropout, so both views would be equal; set model.dropout (0.1)"
            )
        if encoder.causal_only and self.config.pooling == "first":
            raise UserError("objectives.cse.pooling: a decoder's first token sees nothing else; use 'mean'")

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {"embedding": EmbeddingHead(encoder.config.hidden_size)}

    def corrupt(self, batch: Batch, progress: float) -> View:
        groups = batch.sample_rows // self.config.group_rows
        same_group = groups[:, None] == groups[None, :]
        itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
        twice = batch.sample_ids[:, None] == batch.sample_ids[None, :]  # one text seen twice is no negative
        candidates = itself | (same_group & ~twice)
        return GroupedView(batch, batch.tokens, {self.name: (candidates.sum(1) > 1).long()}, {}, candidates)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        batch = view.batch
        samples, rows = len(batch.sample_ids), len(batch.tokens)
        both = replace(
            batch,
            tokens=batch.tokens.repeat(2, 1),
            segment_ids=torch.cat([batch.segment_ids, torch.where(batch.real, batch.segment_ids + samples, -1)]),
            position_ids=batch.position_ids.repeat(2, 1),
            sample_ids=batch.sample_ids.repeat(2),
            visits=batch.visits.repeat(2),
            lengths=batch.lengths.repeat(2),
            sample_rows=torch.cat([batch.sample_rows, batch.sample_rows + rows]),
        )
        hidden = model.encoder(both.tokens, Layout(both, model.encoder.causal_only, model.encoder.attention))
        embeddings = model.heads["embedding"](_pool(hidden, both, self.config.pooling)).float()
        first, second = F.normalize(embeddings, dim=-1).tensor_split([samples])
        with torch.autocast(first.device.type, enabled=False):  # the temperature magnifies what 16 bits would lose
            similarities = (first @ second.T / self.config.temperature).masked_fill(~view.candidates, -torch.inf)
        losses = similarities.logsumexp(1) - similarities.diagonal()
        sums = losses * view.counts[self.name]
        return {self.name: TermLoss((sums if weights is None else sums * weights).sum(), sums.detach())}


def _pool(hidden: torch.Tensor, batch: Batch, pooling: str) -> torch.Tensor:
    """Return ``[S, hidden]``: one vector a sample."""
    flat, segments = hidden.flatten(0, 1), batch.segment_ids.reshape(-1)
    if pooling == "first":
        places = ((batch.position_ids == 0) & batch.real).reshape(-1).nonzero().squeeze(1)
        return flat[places[torch.argsort(segments[places])]]
    places = (segments >= 0).nonzero().squeeze(1)
    sums = flat.new_zeros(len(batch.lengths), flat.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, segments[places], flat[places].float())
    return (sums / batch.lengths[:, None]).to(flat.dtype)
