"""Fine-tuning of one classifier on one task with one seed: the epoch is chosen on dev, test is looked at once."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pretrain.data.tasks import Split
from pretrain.errors import UserError
from pretrain.evaluation.metrics import Scores, score

WARMUP_FRACTION = 0.06  # of all steps
WEIGHT_DECAY = 0.01  # on matrices only
MAX_GRADIENT_NORM = 1.0
BUCKET_BATCHES = 50  # batches among which samples of like length are brought together


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Raises:
        UserError: if a number is out of range.
    """

    epochs: int = 3
    lr: float = 5e-5
    """Peak learning rate, after the warm-up; falls linearly to 0 at the last step."""
    batch: int = 32
    """Samples a step."""
    max_length: int = 128
    """Tokens of a sample, special tokens included; what is beyond is cut."""
    seeds: int = 5
    """Number of runs, with consecutive seeds."""
    first_seed: int = 0
    """The first run's seed."""
    patience: int | None = None
    """Epochs without improvement on dev after which a run ends; None for never. The learning rate falls as if it did
    not."""
    max_train: int | None = None
    """Most training samples to use."""
    metric: str | None = None
    """The metric that chooses the epoch; None for accuracy, or Spearman's correlation for regression."""
    untrained: bool = False
    """Draw all weights at random: the control."""

    def __post_init__(self):
        for name, least in {
            "epochs": 1,
            "batch": 1,
            "seeds": 1,
            "max_length": 4,
            "max_train": 2,
            "patience": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if not 0 < self.lr < 1:
            raise UserError(f"--lr {self.lr}: must be between 0 and 1; 1e-5 to 1e-4 is usual")


@dataclass(frozen=True)
class EncodedSplit:
    """Tokenised samples, unpadded, with their labels ``[samples]`` (int64 classes or float32 numbers)."""

    inputs: list[dict[str, list[int]]]
    labels: torch.Tensor
    cut: int
    """Samples that were longer than the limit."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, ``[samples]`` int64."""
        return np.array([len(sample["input_ids"]) for sample in self.inputs])


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave; the scores are those of the chosen epoch, counted from 1."""

    seed: int
    epoch: int
    dev: Scores
    test: Scores | None
    """None where the task has no test split."""
    dev_by_epoch: list[float]
    """The choosing metric on dev after each epoch."""
    loss_by_epoch: list[float | None]
    """Mean training loss of each epoch; None where it was not finite."""
    seconds: float


def encode(split: Split, tokenizer: Tokenizer, names: list[str], max_length: int, regression: bool) -> EncodedSplit:
    """Tokenise a split, keeping the inputs in ``names`` and at most ``max_length`` tokens a sample."""
    inputs, cut = [], 0
    for start in range(0, len(split), 1000):
        texts = split.texts[start : start + 1000]
        pairs = [None] * len(texts) if split.pairs is None else split.pairs[start : start + 1000]
        encoded = tokenizer(texts, None if split.pairs is None else pairs, verbose=False)
        for i, ids in enumerate(encoded["input_ids"]):
            sample = {name: encoded[name][i] for name in names if name in encoded}
            if len(ids) > max_length:
                short = tokenizer(texts[i], pairs[i], truncation=True, max_length=max_length)
                sample, cut = {name: short[name] for name in sample}, cut + 1
            elif not ids:  # an empty text, and a tokenizer without special tokens
                sample = {"input_ids": [tokenizer.pad_token_id], "attention_mask": [1]}
            inputs.append(sample)
    return EncodedSplit(inputs, torch.tensor(split.labels, dtype=torch.float32 if regression else torch.int64), cut)


def batches(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal all samples into random batches of samples of like length: a list of index arrays, the last one shorter."""
    order = rng.permutation(len(lengths))
    bucket = batch * BUCKET_BATCHES
    order = np.concatenate(
        [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(bucket, len(order), bucket))]
    )
    dealt = np.split(order, range(batch, len(order), batch))
    return [dealt[i] for i in rng.permutation(len(dealt))]


def adamw(model: torch.nn.Module, lr: float, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW for all of a model, and linear warm-up to ``lr`` and decay to 0 over ``steps``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr)
    warmup = max(1, round(WARMUP_FRACTION * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Finetuner:
    """One classifier in training; predictions and loss know of the task only whether it is regression."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, settings: Settings, regression: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.model, self.tokenizer = model.to(self.device), tokenizer
        self.settings, self.regression = settings, regression

    def logits(self, data: EncodedSplit, indices: np.ndarray) -> torch.Tensor:
        """Return fp32 logits ``[samples, classes]``, or ``[samples]`` for regression."""
        inputs = self.tokenizer.pad([data.inputs[i] for i in indices], return_tensors="pt", verbose=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(**inputs.to(self.device)).logits
        return logits.float().squeeze(-1) if self.regression else logits.float()

    def train_epoch(self, data: EncodedSplit, order: list[np.ndarray], optimizer, schedule, name: str) -> float:
        """Go over all samples once; return the mean loss of a sample."""
        self.model.train()
        # standardised numbers make one learning rate fit every scale; correlations do not change
        mean, sd = (data.labels.mean(), data.labels.std()) if self.regression else (0, 1)
        total = torch.zeros((), device=self.device)
        for indices in tqdm(order, name, leave=False, disable=None):
            labels = data.labels[indices]
            targets = ((labels - mean) / sd if self.regression else labels).to(self.device)
            loss = (F.mse_loss if self.regression else F.cross_entropy)(self.logits(data, indices), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach() * len(indices)
        return (total / len(data.labels)).item()

    @torch.inference_mode()
    def score(self, data: EncodedSplit) -> Scores:
        """Predict every sample, in the order of length, and compare with the labels."""
        self.model.eval()
        order = np.argsort(data.lengths, kind="stable")
        parts = np.split(order, range(self.settings.batch, len(order), self.settings.batch))
        logits = torch.cat([self.logits(data, indices) for indices in parts]).cpu()
        predictions = logits if self.regression else logits.argmax(-1)
        return score(predictions.numpy(), data.labels[order].numpy(), self.regression)


def fine_tune(
    tuner: Finetuner, splits: dict[str, EncodedSplit], metric: str, seed: int, log: Callable[[str], None]
) -> SeedResult:
    """Train for all epochs, or until dev improves no more; score test, if there is one, once, with the weights of the
    epoch (the first of equals) best on dev.

    Sets torch's random state: order and dropout are functions of ``seed`` alone.

    Raises:
        UserError: if the GPU's memory does not suffice.
    """
    start, settings = time.perf_counter(), tuner.settings
    torch.manual_seed(seed)
    lengths = splits["train"].lengths
    optimizer, schedule = adamw(tuner.model, settings.lr, settings.epochs * -(-len(lengths) // settings.batch))
    by_epoch, losses, chosen, weights = [], [], 0, {}
    try:
        for epoch in range(settings.epochs):
            order = batches(lengths, settings.batch, np.random.default_rng((seed, epoch)))
            name = f"seed {seed}, epoch {epoch + 1}/{settings.epochs}"
            loss = tuner.train_epoch(splits["train"], order, optimizer, schedule, name)
            losses.append(loss if math.isfinite(loss) else None)
            dev = tuner.score(splits["dev"])
            by_epoch.append(dev.values[metric])
            log(f"{name}: loss {loss:.4f}, dev {metric} {by_epoch[-1]:.4f}, {time.perf_counter() - start:.0f} s")
            if epoch == 0 or by_epoch[-1] > by_epoch[chosen]:
                chosen, dev_chosen = epoch, dev
                weights = {key: value.clone() for key, value in tuner.model.state_dict().items()}
            if settings.patience is not None and epoch - chosen >= settings.patience:
                break
        tuner.model.load_state_dict(weights)
        test = tuner.score(splits["test"]) if "test" in splits else None
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory is too small: --batch {settings.batch}, --max-length {settings.max_length}; lower one"
        ) from None
    return SeedResult(seed, chosen + 1, dev_chosen, test, by_epoch, losses, time.perf_counter() - start)
