"""The samples of a labelled task as the data of an objective: how the rows of a batch come by them.

These samples are not those of the store. Every row of the global batch draws from the task's train split, with
replacement, by a counter of its own: its first sample's id and visit. So what a step trains on is decided by the step's
rows alone, whatever the ranks and micro-batches, and a resumed run goes on with the same draws. An epoch of the task is
therefore not enforced: to visit every labelled sample equally often needs a counter that outlives the batch, and with
it a row's draws would depend on the rows, and the sampler's choices, before it.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import Field

from fused_objectives.draws import words
from fused_objectives.philox import below
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.data.labelled import LabelledSamples, encode
from pretrain.data.order import shuffled
from pretrain.data.tasks import Task, load_task
from pretrain.errors import UserError
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import Objective, View


class TaskConfig(Config):
    """Keys of every objective on a labelled task."""

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

    def load(self) -> Task:
        """Load the task; raises what :func:`pretrain.data.tasks.load_task` does."""
        return load_task(
            self.task,
            text_field=self.text_field,
            pair_field=self.pair_field,
            label_field=self.label_field,
            config=self.dataset_config,
            regression=self.regression,
        )


@dataclass(frozen=True)
class Draw:
    """The samples of a task that the rows of a batch drew. They are counted and weighed with their row's first
    sample."""

    samples: Batch
    """One a row, ``samples_per_row`` of them for each row of the batch."""
    owners: torch.Tensor
    """``[rows]`` int64: the first of the S samples in each row of the batch, −1 in a row without samples."""
    counted: torch.Tensor
    """``[drawn]`` bool: False where nothing was drawn and the place is only filled."""

    def per_sample(self, values: torch.Tensor, samples: int) -> torch.Tensor:
        """Return ``[S]``: to each owner the sum of its row's ``values [drawn]``, 0 to samples that own nothing."""
        rows = values.view(len(self.owners), -1).sum(1)
        spread = rows.new_zeros(samples + 1)  # no sum from here on, so no order of one
        return spread.scatter(0, self.owners + 1, rows * (self.owners >= 0))[1:]

    def weights(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """Return ``[drawn]`` float32: to each drawn sample the weight of its owner, from ``weights [S]``; None means
        1."""
        return None if weights is None else self._each(_at(self.owners, weights))

    @property
    def drawn_for(self) -> torch.Tensor:
        """``[drawn]`` int64: the owner of each drawn sample, −1 where nothing was drawn."""
        return torch.where(self.counted, self._each(self.owners), -1)

    def _each(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat ``values [rows]`` for each sample that a row drew."""
        return values.repeat_interleave(len(self.counted) // max(1, len(self.owners)))


@dataclass(frozen=True)
class DrawnView(View):
    """A batch, untouched, and the labelled samples that its rows drew."""

    draw: Draw


class TaskObjective(Objective):
    """An objective on the samples of a labelled task, which the rows of the batch draw."""

    rows_are_units = True

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.task: Task | None = None
        self.splits: dict[str, LabelledSamples] = {}
        self._moved: dict[tuple[str, torch.device], LabelledSamples] = {}

    def prepare(self, tokenizer, longest: int) -> None:
        config = self.config
        try:
            self.task = config.load()
        except UserError as error:  # names options of the command line, where here they are keys
            keys = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
            raise UserError(f"objectives.{self.name}.task: {keys}") from None
        limit, pad_id, regression = config.max_length or longest, self.vocabulary.pad_id, self.task.regression
        for name, split in self.task.splits.items():
            if name == "dev":  # its first samples shall be a fair part of it
                split = split.take(shuffled(torch.arange(len(split)).numpy(), len(split), 0)[0].tolist())
            self.splits[name] = encode(split, tokenizer, limit, pad_id, regression)

    @property
    def notes(self) -> list[str]:
        cut = [f"{name}: {samples.cut} of {len(samples)} samples were cut" for name, samples in self.splits.items()
               if samples.cut]  # fmt: skip
        return [*(self.task.notes if self.task else []), *cut]

    @property
    def fingerprint(self) -> str | None:
        return " ".join(samples.fingerprint for name, samples in self.splits.items() if name != "test") or None

    def check(self, encoder: Encoder) -> None:
        super().check(encoder)
        room, longest = encoder.positions, max((samples.longest for samples in self.splits.values()), default=0)
        if room is not None and longest > room:
            raise UserError(
                f"objectives.{self.name}.max_length: the task's longest text has {longest} tokens, "
                f"but the model has room for {room}; set it to {room} or less"
            )

    def corrupt(self, batch: Batch, progress: float) -> DrawnView:
        owners = _first_samples(batch)
        draws = torch.arange(self.config.samples_per_row, device=owners.device).expand(len(owners), -1)
        each = owners[:, None].expand_as(draws)
        word, visit, *_ = words(self.seed, self.name, draws, each, batch.sample_ids, batch.visits)
        indices = below(word, len(self.splits["train"]))
        return self.view(batch, self._draw(batch, owners, "train", indices, each >= 0, visit), "train", progress)

    def heldout_view(self, batch: Batch) -> DrawnView:
        """Return a view of the dev split: its samples in a fixed order, dealt out to the rows of the global batch, and
        none to the rows that are left; with rows enough the loss is that of the whole split."""
        owners, samples = _first_samples(batch), len(self.splits["dev"])
        places = self._places(batch, owners)
        indices, counted = places % samples, (owners >= 0)[:, None] & (places < samples)
        draw = self._draw(batch, owners, "dev", indices, counted, torch.zeros_like(places))
        return self.view(batch, draw, "dev", 0.0)

    @abstractmethod
    def view(self, batch: Batch, draw: Draw, split: str, progress: float) -> DrawnView:
        """Return the view of a batch whose rows drew ``draw`` of a split."""

    def samples(self, split: str, device: torch.device) -> LabelledSamples:
        """Return a split on a device, to which it travels once."""
        if (split, device) not in self._moved:
            self._moved[split, device] = self.splits[split].to(device)
        return self._moved[split, device]

    def _draw(self, batch, owners, split: str, indices, counted, visits) -> Draw:
        """Return the samples ``indices[r]`` of a split, ``[rows, each]``, for row r of the batch."""
        samples, places = self.samples(split, indices.device), self._places(batch, owners)
        drawn = samples.lay_out(indices.reshape(-1), places.reshape(-1), samples.longest, self.vocabulary.pad_id)
        return Draw(replace(drawn, visits=visits.reshape(-1)), owners, counted.reshape(-1))

    def _places(self, batch: Batch, owners: torch.Tensor) -> torch.Tensor:
        """Number the labelled samples of a step, ``[rows, samples_per_row]``, by the rows of the global batch."""
        each = self.config.samples_per_row
        return _at(owners, batch.sample_rows)[:, None] * each + torch.arange(each, device=owners.device)


def _first_samples(batch: Batch) -> torch.Tensor:
    """Return the first of the S samples in each row, ``[rows]`` int64, −1 in a row without samples."""
    samples = len(batch.sample_ids)
    first = torch.where(batch.real, batch.segment_ids, samples).amin(1)
    return torch.where(first < samples, first, -1)


def _at(owners: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values [S]`` of the owners, 0 for the owner −1."""
    return F.pad(values, (1, 0))[owners + 1]
