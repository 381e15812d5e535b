"""Training of a span extractor on windows with answers; dev chooses the step."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pretrain.errors import UserError
from pretrain.evaluation.finetune import MAX_GRADIENT_NORM, adamw, batches
from pretrain.masking.learning.extractor import Extractor
from pretrain.masking.learning.scores import Places, random_spans, score_spans
from pretrain.masking.learning.spans import Borders
from pretrain.masking.learning.windows import Window


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Raises:
        UserError: if a number is out of range.
    """

    steps: int = 2000
    batch: int = 32
    """Windows a step."""
    lr: float = 5e-5
    """Peak learning rate; rises over the first 6 % of the steps and falls linearly to 0 at the last."""
    max_length: int = 256
    """Tokens of a window, special tokens included."""
    overlap: int | None = None
    """Tokens of text that a window shares with the one before; None for a quarter of ``max_length``."""
    max_span: int = 10
    """Longest span in tokens; longer answers are not learnt from."""
    top_k: int = 10
    """Spans of a window among which the answers are looked for on dev."""
    seed: int = 0
    dev_fraction: float = 0.05
    """Of the contexts, chosen by hash; they choose the step and are not learnt from."""
    dev_interval: int | None = None
    """Steps between two looks at dev; None for a tenth of ``steps``."""
    max_bad: float = 0.01
    """Largest fraction of answers that may contradict their context; they are left out and counted."""

    def __post_init__(self):
        least = {"steps": 1, "batch": 1, "max_length": 8, "overlap": 0, "max_span": 1, "top_k": 1, "dev_interval": 1}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None and value < least[name]:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least[name]}")
        if not 0 < self.lr < 1:
            raise UserError(f"--lr {self.lr}: must be between 0 and 1; 1e-5 to 1e-4 is usual")
        if not 0 < self.dev_fraction < 1:
            raise UserError(f"--dev-fraction {self.dev_fraction}: must be between 0 and 1")
        if not 0 <= self.max_bad < 1:
            raise UserError(f"--max-bad {self.max_bad}: must be at least 0 and below 1")


@dataclass(frozen=True)
class Moment:
    """What dev says of the extractor after a step."""

    step: int
    loss: float
    """Mean training loss of the steps since the moment before."""
    dev_loss: float | None
    """Mean over dev's answers of at most ``max_span`` tokens; None if there is none."""
    dev: dict[str, float]
    control: dict[str, float]
    """Scores of random spans of the same lengths."""

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: the recall among the ``k`` best spans, of equals the lower loss."""
        return self.dev["recall_at_k"], -math.inf if self.dev_loss is None else -self.dev_loss


def train(
    extractor: Extractor, windows: list[Window], dev: list[Window], settings: Settings, log: Callable[[str], None]
) -> tuple[Moment, list[Moment]]:
    """Train; leave the extractor with the weights of the step that was best on dev, the first of equals."""
    optimizer, schedule = adamw(extractor.model, settings.lr, settings.steps)
    interval = settings.dev_interval or -(-settings.steps // 10)
    stream, moments, best, weights = _stream(windows, settings), [], None, {}
    total, since = torch.zeros((), device=extractor.device), 0
    try:
        for step in tqdm(range(1, settings.steps + 1), "learning", leave=False, disable=None):
            extractor.model.train()
            loss = answer_losses(extractor, [windows[i] for i in next(stream)]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(extractor.model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total, since = total + loss.detach(), since + 1
            if step % interval and step < settings.steps:
                continue
            mean = total.item() / since
            if not math.isfinite(mean):
                raise UserError(f"the loss is not finite by step {step}; try a lower --lr than {settings.lr:g}")
            total, since = torch.zeros_like(total), 0
            moments.append(Moment(step, mean, *judge(extractor, dev, settings)))
            log(_line(moments[-1], settings))
            if best is None or moments[-1].rank > best.rank:
                best = moments[-1]
                weights = {name: value.clone() for name, value in extractor.model.state_dict().items()}
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory is too small: --batch {settings.batch}, --max-length {settings.max_length}; lower one"
        ) from None
    extractor.model.load_state_dict(weights)
    return best, moments


def _stream(windows: list[Window], settings: Settings) -> Iterator[np.ndarray]:
    """Yield batches of windows' numbers without end, every window once an epoch."""
    lengths, epoch = np.array([len(window.tokens) for window in windows]), 0
    while True:
        yield from batches(lengths, settings.batch, np.random.default_rng((settings.seed, epoch)))
        epoch += 1


def answer_losses(extractor: Extractor, windows: Sequence[Window], longest: int | None = None) -> torch.Tensor:
    """Return −log p(start) − log p(end) of every answer of some windows, window after window, ``[answers]``.

    Args:
        longest: leave out answers of more tokens.
    """
    tokens, real = extractor.pad([window.tokens for window in windows])
    found = extractor.borders(tokens, real)
    targets = [
        (row, first, last)
        for row, window in enumerate(windows)
        for first, last in window.answers
        if longest is None or last - first < longest
    ]
    rows, firsts, lasts = torch.tensor(targets, dtype=torch.int64, device=extractor.device).reshape(-1, 3).T
    start, end = extractor.logits(tokens, real)
    start = start.masked_fill(~found.begins, -math.inf).log_softmax(1)
    end = end.masked_fill(~found.ends, -math.inf).log_softmax(1)
    return -start[rows, firsts] - end[rows, lasts]


@torch.no_grad()
def judge(
    extractor: Extractor, windows: list[Window], settings: Settings
) -> tuple[float | None, dict[str, float], dict[str, float]]:
    """Return the mean loss, the scores of the chosen spans, and those of random ones."""
    extractor.model.eval()
    order = np.argsort([len(window.tokens) for window in windows], kind="stable")
    chosen: list[Places] = [[] for _ in windows]
    guessed: list[Places] = [[] for _ in windows]
    losses = []
    for at in range(0, len(order), settings.batch):
        numbers = order[at : at + settings.batch]
        part = [windows[i] for i in numbers]
        losses += answer_losses(extractor, part, settings.max_span).tolist()
        tokens, real = extractor.pad([window.tokens for window in part])
        spans = extractor.spans(tokens, real, settings.top_k, settings.max_span)
        found = Borders(*(which.cpu() for which in extractor.borders(tokens, real)))
        for row, (number, firsts, lasts) in enumerate(
            zip(numbers, spans.first.tolist(), spans.last.tolist(), strict=True)
        ):
            chosen[number] = [place for place in zip(firsts, lasts, strict=True) if place[0] >= 0]
            guessed[number] = random_spans(chosen[number], found, row, settings.seed, int(number))
    return (
        float(np.mean(losses)) if losses else None,
        score_spans(windows, chosen, settings.top_k),
        score_spans(windows, guessed, settings.top_k),
    )


def _line(moment: Moment, settings: Settings) -> str:
    dev, control = moment.dev, moment.control
    return (
        f"step {moment.step:,}/{settings.steps:,}: loss {moment.loss:.4f}, dev EM {dev['exact_match']:.4f}, "
        f"F1 {dev['f1']:.4f}, recall in the best {settings.top_k} {dev['recall_at_k']:.4f} "
        f"(random spans {control['recall_at_k']:.4f})"
    )
