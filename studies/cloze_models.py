"""The models of a masking study: pre-trained, trained on under a masking policy, fine-tuned on questions and scored."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fused_objectives.targets import IGNORED
from pretrain.data.order import shuffled
from pretrain.evaluation.finetune import MAX_GRADIENT_NORM, adamw
from pretrain.model.attention import Layout
from pretrain.objectives.base import LabelledView
from pretrain.recipe import Recipe, recipe_from
from pretrain.training.build import Parts, build
from studies.cloze import Fact, questions
from studies.drawing import draw_masks

OBJECTIVE = "mlm"
SHALLOW = {"tiny": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "small": {}}
"""Size → what replaces the family's keys. ModernBERT learns in a few hundred steps what BERT of the same size, with its
norms behind the layers and its learnt positions, does not begin to learn; two layers do for passages this short."""
ASKED_AT_ONCE = 128  # questions, when they are scored


@dataclass(frozen=True)
class Settings:
    """How long and how fast; the same for all policies of a study."""

    size: str = "tiny"
    base_steps: int = 1000
    """Steps of pre-training with random masks, before the policies part."""
    steps: int = 800
    """Steps under each policy."""
    tune_steps: int = 60
    """Steps on the questions of ``train``."""
    batch_rows: int = 2
    row_length: int = 256
    batch_questions: int = 16
    rate: float = 0.15
    base_lr: float = 1e-3
    lr: float = 1e-3
    tune_lr: float = 1e-3


@dataclass(frozen=True)
class Score:
    """How well questions are answered."""

    exact_match: float
    """Fraction of the answers all of whose tokens are the likeliest ones of all."""
    token_accuracy: float
    """Mean over answers of the fraction of their tokens."""
    log_likelihood: float
    """Mean over answers of the mean log probability of their tokens, in nats."""


def recipe_of(store: Path, settings: Settings, seed: int, stage: int, masking: dict) -> Recipe:
    """Return the recipe of a stage of a seed: 0 before the policies part, 1 after."""
    document = {
        "run": "unused",
        "seed": 10 * seed + stage,
        "data": {"store": str(store), "row_length": settings.row_length},
        "model": {"family": "modernbert", "size": settings.size, "dropout": 0.0, "overrides": SHALLOW[settings.size]},
        "objectives": {OBJECTIVE: {"masking": masking}},
        "training": {
            "steps": settings.steps,
            "batch_rows": settings.batch_rows,
            "micro_batch_rows": settings.batch_rows,
        },
    }
    return recipe_from(document, "study")


def build_parts(recipe: Recipe, start: dict[str, torch.Tensor] | None = None) -> Parts:
    """Build what a recipe says, with the weights ``start``, if given."""
    parts = build(recipe, dtype=torch.float32)
    if start is not None:
        parts.model.load_state_dict(start)
    return parts


def pretrain(parts: Parts, steps: int, lr: float) -> float:
    """Train on the corpus; return the mean loss of the last tenth of the steps."""

    def views() -> Iterator[LabelledView]:
        loader, objective = parts.loader(rank=0, world_size=1), parts.model.objectives[OBJECTIVE]
        for step in range(steps):
            yield objective.corrupt(loader.next().micro_batches[0], step / steps)

    return _train(parts.model, views(), steps, lr)


def fine_tune(parts: Parts, facts: Sequence[Fact], settings: Settings, seed: int) -> float:
    """Train on questions, in an order that ``seed`` decides; return the mean loss of the last tenth of the steps."""

    def views() -> Iterator[LabelledView]:
        for step in range(settings.tune_steps):
            positions = np.arange(settings.batch_questions) + step * settings.batch_questions
            chosen, _ = shuffled(positions, len(facts), 10 * seed + 2)
            yield _ask(parts, [facts[number] for number in chosen])

    return _train(parts.model, views(), settings.tune_steps, settings.tune_lr)


@torch.no_grad()
def score(parts: Parts, facts: Sequence[Fact]) -> Score:
    """Answer questions; the tokens of an answer are guessed at once."""
    model, right, likelihood, owner = parts.model.eval(), [], [], []
    for start in range(0, len(facts), ASKED_AT_ONCE):
        view = _ask(parts, facts[start : start + ASKED_AT_ONCE])
        asked = view.labels != IGNORED
        hidden = model.encoder(view.tokens, Layout(view.batch, implementation=model.encoder.attention))
        logits = model.heads["vocabulary"](hidden[asked]).float()
        targets = view.labels[asked]
        right.append(logits.argmax(-1) == targets)
        likelihood.append(-nn.functional.cross_entropy(logits, targets, reduction="none"))
        owner.append(asked.nonzero()[:, 0] + start)
    owner, right, likelihood = torch.cat(owner), torch.cat(right).double(), torch.cat(likelihood).double()
    tokens = torch.bincount(owner, minlength=len(facts)).double()
    share = torch.zeros_like(tokens).index_add(0, owner, right) / tokens
    mean = torch.zeros_like(tokens).index_add(0, owner, likelihood) / tokens
    return Score((share > 1 - 1e-9).double().mean().item(), share.mean().item(), mean.mean().item())


@dataclass(frozen=True)
class MaskStatistics:
    """What a policy hides."""

    hidden: float
    """Fraction of the corpus' tokens."""
    answers: float
    """Fraction of the answers that are hidden whole, in one visit."""


def mask_statistics(parts: Parts, facts: Sequence[Fact], visits: int = 4) -> MaskStatistics:
    """Measure a recipe's masks on the passages of some facts and on as many samples of the whole corpus."""
    samples = np.unique([fact.sample for fact in facts])
    everywhere = np.linspace(0, len(parts.store) - 1, min(len(parts.store), 512)).astype(np.int64)
    masker = parts.model.objectives[OBJECTIVE].masker
    chosen = [each.mean(0) for each in draw_masks(masker, parts.store, everywhere, visits)]
    hidden = sum(each.sum() for each in chosen) / sum(len(each) - 2 for each in chosen)  # without [CLS] and [SEP]
    drawn = dict(zip(samples.tolist(), draw_masks(masker, parts.store, samples, visits), strict=True))
    whole = [drawn[fact.sample][:, fact.first : fact.last + 1].all(1).mean() for fact in facts]
    return MaskStatistics(float(hidden), float(np.mean(whole)))


def as_row(result: object) -> dict[str, float]:
    """Return a dataclass of numbers as a dictionary."""
    return {key: float(value) for key, value in asdict(result).items()}


def _ask(parts: Parts, facts: Sequence[Fact]) -> LabelledView:
    longest = int(parts.store.lengths[[fact.sample for fact in facts]].max())
    batch, labels = questions(parts.store, facts, parts.vocabulary.pad_id, parts.vocabulary.mask_id, longest)
    counts = batch.sum_per_sample((labels != IGNORED).long())
    return LabelledView(batch, batch.tokens, {OBJECTIVE: counts}, {}, labels)


def _train(model: nn.Module, views: Iterator[LabelledView], steps: int, lr: float) -> float:
    """One step a view, each on the mean over its targets; return the mean loss of the last tenth."""
    optimizer, schedule = adamw(model, lr, steps)
    model.train()
    losses = []
    for view in views:
        loss, _ = model({OBJECTIVE: view}, {OBJECTIVE: 1.0 / max(int(view.counts[OBJECTIVE].sum()), 1)})
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :])) if losses else float("nan")
