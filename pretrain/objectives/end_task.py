"""The end task as an objective of pre-training (TARTAN, arXiv 2109.07437): classes or numbers of labelled samples.

The labelled samples are not those of the store. Every row of the global batch draws from the task's train split, with
replacement, by a counter of its own: its first sample's id and visit. So what a step trains on is decided by the step's
rows alone, whatever the ranks and micro-batches, and a resumed run goes on with the same draws. An epoch of the task is
therefore not enforced: to visit every labelled sample equally often needs a counter that outlives the batch, and with
it a row's draws would depend on the rows, and the sampler's choices, before it.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from fused_objectives.draws import words
from fused_objectives.philox import below
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.data.labelled import LabelledSamples, encode
from pretrain.data.order import shuffled
from pretrain.data.tasks import Task, load_task
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import Objective, TermLoss, View, register


class EndTaskConfig(Config):
    """Keys of ``objectives.end_task``."""

    task: str = Field(..., min_length=1)
    """A folder with train, dev and test files, ``hf:NAME``, or the name of a GLUE task."""
    text_field: str | None = None
    """Field of the text; null: ``text``, or ``text_a``."""
    pair_field: str | None = None
    """Field of the second text; null: ``text_b`` beside ``text_a``."""
    label_field: str | None = None
    """Field of the label; null: ``label``."""
    dataset_config: str | None = None
    """Configuration of the data set ``hf:NAME``."""
    regression: bool = False
    """Labels are numbers, not classes."""
    max_length: int | None = Field(None, ge=8)
    """Tokens of a labelled sample, special tokens included; what is beyond is cut. Null: the store's longest sample."""
    samples_per_row: int = Field(1, ge=1)
    """Labelled samples that each row of the batch draws: a step has ``training.batch_rows`` times as many."""
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
class DrawnView(View):
    """A batch, untouched, and the labelled samples that its rows drew. What a row drew is counted and weighed with the
    row's first sample."""

    drawn: Batch
    """The labelled samples, one a row, ``samples_per_row`` of them for each row of the batch."""
    labels: torch.Tensor
    """``[drawn]`` int64 classes, or float32 standardised numbers."""
    owners: torch.Tensor
    """``[rows]`` int64: the first of the S samples in each row of the batch, −1 in a row without samples."""
    counted: torch.Tensor
    """``[drawn]`` bool: False where nothing was drawn and the place is only filled."""


@register
class EndTask(Objective):
    """Cross entropy of the class, or squared error of the standardised number, of labelled samples."""

    name = "end_task"
    Config = EndTaskConfig
    heads = ("end_task",)
    rows_are_units = True

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.task: Task | None = None
        self.splits: dict[str, LabelledSamples] = {}
        self.mean, self.sd = 0.0, 1.0
        self._moved: dict[tuple[str, torch.device], LabelledSamples] = {}

    def prepare(self, tokenizer, longest: int) -> None:
        config = self.config
        try:
            self.task = load_task(
                config.task,
                text_field=config.text_field,
                pair_field=config.pair_field,
                label_field=config.label_field,
                config=config.dataset_config,
                regression=config.regression,
            )
        except UserError as error:  # names options of the command line, where here they are keys
            keys = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
            raise UserError(f"objectives.{self.name}.task: {keys}") from None
        limit, pad_id, regression = config.max_length or longest, self.vocabulary.pad_id, self.task.regression
        for name, split in self.task.splits.items():
            if name == "dev":  # its first samples shall be a fair part of it
                split = split.take(shuffled(torch.arange(len(split)).numpy(), len(split), 0)[0].tolist())
            self.splits[name] = encode(split, tokenizer, limit, pad_id, regression)
        if regression:
            labels = self.splits["train"].labels.double()
            self.mean, self.sd = labels.mean().item(), labels.std(correction=0).item()

    @property
    def notes(self) -> list[str]:
        cut = [f"{name}: {samples.cut} of {len(samples)} samples were cut" for name, samples in self.splits.items()
               if samples.cut]  # fmt: skip
        return [*(self.task.notes if self.task else []), *cut]

    @property
    def fingerprint(self) -> str | None:
        return " ".join(samples.fingerprint for name, samples in self.splits.items() if name != "test") or None

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only and self.config.pooling == "first":
            raise UserError(f"objectives.{self.name}.pooling: a decoder's first token sees nothing else; use 'mean'")
        room, longest = encoder.positions, max((samples.longest for samples in self.splits.values()), default=0)
        if room is not None and longest > room:
            raise UserError(
                f"objectives.{self.name}.max_length: the task's longest text has {longest} tokens, "
                f"but the model has room for {room}; set it to {room} or less"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        config = encoder.config
        if self.task is not None:  # kept with the weights: an export knows its labels without the task's files
            names = self.task.label_names or ["LABEL_0"]
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
            config.problem_type = "regression" if self.task.regression else "single_label_classification"
            config.label_mean, config.label_sd = self.mean, self.sd
        return {self.name: TaskHead(config.hidden_size, config.num_labels, self.config.dropout)}

    def corrupt(self, batch: Batch, progress: float) -> DrawnView:
        owners = _first_samples(batch)
        draws = torch.arange(self.config.samples_per_row, device=owners.device).expand(len(owners), -1)
        each = owners[:, None].expand_as(draws)
        word, *_ = words(self.seed, self.name, draws, each, batch.sample_ids, batch.visits)
        return self._view(batch, owners, "train", below(word, len(self.splits["train"])), each >= 0)

    def heldout_view(self, batch: Batch) -> DrawnView:
        """Return a view of the dev split: its samples in a fixed order, dealt out to the rows of the global batch, and
        none to the rows that are left; with rows enough the loss is that of the whole split."""
        owners, samples = _first_samples(batch), len(self.splits["dev"])
        places = self._places(batch, owners)
        return self._view(batch, owners, "dev", places % samples, (owners >= 0)[:, None] & (places < samples))

    def _view(self, batch, owners, split: str, indices, counted) -> DrawnView:
        """Return the view in which row r of the batch has the samples ``indices[r]`` of a split, ``[rows, each]``."""
        samples, places = self._samples(split, indices.device), self._places(batch, owners)
        counts = _spread(counted.sum(1), owners, len(batch.sample_ids))
        return DrawnView(
            batch=batch,
            tokens=batch.tokens,
            counts={self.name: counts},
            tallies={},
            drawn=samples.lay_out(indices.reshape(-1), places.reshape(-1), samples.longest, self.vocabulary.pad_id),
            labels=self._targets(samples.labels[indices.reshape(-1)]),
            owners=owners,
            counted=counted.reshape(-1),
        )

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        features = self.features(model.encoder, view.drawn)
        losses = self.losses(model.heads[self.name](features), view.labels) * view.counted
        rows = losses.view(len(view.owners), -1).sum(1)
        weighted = rows if weights is None else rows * _at(view.owners, weights)
        sums = _spread(rows.detach(), view.owners, len(view.batch.sample_ids))
        return {self.name: TermLoss(weighted.sum(), sums)}

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

    @torch.no_grad()
    def predictions(self, model, split: str, samples_at_once: int = 64) -> torch.Tensor:
        """Return what the model predicts for every sample of a split, in the order of its labels in ``splits``:
        ``[samples]`` classes, or numbers in the scale of the labels. Dropout is the caller's business."""
        samples = self._samples(split, next(model.parameters()).device)
        found = []
        for indices in torch.arange(len(samples), device=samples.lengths.device).split(samples_at_once):
            drawn = samples.lay_out(indices, indices, samples.longest, self.vocabulary.pad_id)
            logits = model.heads[self.name](self.features(model.encoder, drawn)).float()
            found.append(logits.squeeze(1) * self.sd + self.mean if self.task.regression else logits.argmax(1))
        return torch.cat(found)

    def _places(self, batch: Batch, owners: torch.Tensor) -> torch.Tensor:
        """Number the labelled samples of a step, ``[rows, samples_per_row]``, by the rows of the global batch."""
        each = self.config.samples_per_row
        return _at(owners, batch.sample_rows)[:, None] * each + torch.arange(each, device=owners.device)

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Standardised numbers make one learning rate fit every scale."""
        return (labels - self.mean) / self.sd if labels.is_floating_point() else labels

    def _samples(self, split: str, device: torch.device) -> LabelledSamples:
        """Return a split on a device, to which it travels once."""
        if (split, device) not in self._moved:
            self._moved[split, device] = self.splits[split].to(device)
        return self._moved[split, device]


def _first_samples(batch: Batch) -> torch.Tensor:
    """Return the first of the S samples in each row, ``[rows]`` int64, −1 in a row without samples."""
    samples = len(batch.sample_ids)
    first = torch.where(batch.real, batch.segment_ids, samples).amin(1)
    return torch.where(first < samples, first, -1)


def _at(owners: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values [S]`` of the owners, 0 for the owner −1."""
    return F.pad(values, (1, 0))[owners + 1]


def _spread(values: torch.Tensor, owners: torch.Tensor, samples: int) -> torch.Tensor:
    """Return ``[S]``: the owners' ``values [rows]``, 0 for samples that own nothing. No sum, so no order of one."""
    return values.new_zeros(samples + 1).scatter(0, owners + 1, values * (owners >= 0))[1:]
