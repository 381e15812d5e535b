"""The end task as an objective of pre-training (TARTAN, arXiv 2109.07437): classes or numbers of labelled samples."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.rows import owned_by, rows_of
from pretrain.objectives.base import TermLoss, register
from pretrain.objectives.task_samples import DrawnView, TaskConfig, TaskObjective


class EndTaskConfig(TaskConfig):
    """Keys of ``objectives.end_task``."""

    pooling: Literal["first", "mean"] = "first"
    """A sample's features: its first token's hidden state, or the mean over its tokens."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the head, before each of its layers."""


class TaskHead(nn.Module):
    """Features ``[n, hidden]`` → logits ``[n, outputs]``; RoBERTa's head for sequence classification."""

    def __init__(self, hidden_size: int, outputs: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(features)))))


@dataclass(frozen=True)
class EndTaskView(DrawnView):
    """A batch, and the labelled samples that its rows drew, with their labels."""

    labels: torch.Tensor
    """``[drawn]`` int64 classes, or float32 standardised numbers."""


@register
class EndTask(TaskObjective):
    """Cross entropy of the class, or squared error of the standardised number, of labelled samples."""

    name = "end_task"
    Config = EndTaskConfig
    heads = ("end_task",)

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.mean, self.sd = 0.0, 1.0

    def prepare(self, tokenizer, longest: int) -> None:
        super().prepare(tokenizer, longest)
        if self.task.regression:
            labels = self.splits["train"].labels.double()
            self.mean, self.sd = labels.mean().item(), labels.std(correction=0).item()

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only and self.config.pooling == "first":
            raise UserError(f"objectives.{self.name}.pooling: a decoder's first token sees nothing else; use 'mean'")
        super().check(encoder)

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        config = encoder.config
        if self.task is not None:  # kept with the weights: an export knows its labels without the task's files
            names = self.task.label_names or ["LABEL_0"]
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
            config.problem_type = "regression" if self.task.regression else "single_label_classification"
            config.label_mean, config.label_sd = self.mean, self.sd
        return {self.name: TaskHead(config.hidden_size, config.num_labels, self.config.dropout)}

    def view(self, batch, draw, split, progress) -> EndTaskView:
        labels = self.samples(split, draw.counted.device).labels[draw.samples.sample_ids]
        counts = {self.name: draw.per_sample(draw.counted.long(), len(batch.sample_ids))}
        return EndTaskView(batch, batch.tokens, counts, {}, draw, self._targets(labels))

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        draw = view.draw
        with owned_by(draw.drawn_for):
            features = self.features(model.encoder, draw.samples)
            with rows_of(torch.arange(len(features), device=features.device)):
                losses = self.losses(model.heads[self.name](features), view.labels) * draw.counted
        weighted = losses if weights is None else losses * draw.weights(weights)
        return {self.name: TermLoss(weighted.sum(), draw.per_sample(losses.detach(), len(view.batch.sample_ids)))}

    def features(self, encoder: Encoder, drawn: Batch) -> torch.Tensor:
        """Return what the head reads of labelled samples laid out one a row, ``[drawn, hidden]``."""
        hidden = encoder(drawn.tokens, Layout(drawn, encoder.causal_only, encoder.attention))
        if self.config.pooling == "first":
            return hidden[:, 0]
        sums = (hidden.float() * drawn.real[:, :, None]).sum(1)
        return (sums / drawn.lengths[:, None]).to(hidden.dtype)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each labelled sample, ``[drawn]`` float32, from logits ``[drawn, outputs]``."""
        if labels.is_floating_point():
            return F.mse_loss(logits.float().squeeze(1), labels, reduction="none")
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def lay_out(self, split: str, indices: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        """Return the samples of a split at ``indices [n]``, one a row, and their labels ``[n]`` as :meth:`losses` takes
        them, on the device of the indices."""
        samples = self.samples(split, indices.device)
        drawn = samples.lay_out(indices, indices, samples.longest, self.vocabulary.pad_id)
        return drawn, self._targets(samples.labels[indices])

    @torch.no_grad()
    def predictions(self, model, split: str, samples_at_once: int = 64) -> torch.Tensor:
        """Return what the model predicts for every sample of a split, in the order of its labels in ``splits``:
        ``[samples]`` classes, or numbers in the scale of the labels. Dropout is the caller's business."""
        samples = self.samples(split, next(model.parameters()).device)
        found = []
        for indices in torch.arange(len(samples), device=samples.lengths.device).split(samples_at_once):
            drawn, _ = self.lay_out(split, indices)
            logits = model.heads[self.name](self.features(model.encoder, drawn)).float()
            found.append(logits.squeeze(1) * self.sd + self.mean if self.task.regression else logits.argmax(1))
        return torch.cat(found)

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Standardised numbers make one learning rate fit every scale."""
        return (labels - self.mean) / self.sd if labels.is_floating_point() else labels
