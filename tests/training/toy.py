"""A small module with tied weights, a trunk and three heads; the engine's runs of it, and plain torch's."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.training.optimizer import OptimizerSettings, ParameterGroup

VOCABULARY, WIDTH, LENGTH = 13, 7, 5
ADAMW = OptimizerSettings("adamw", weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
LR_SCALES = {"backbone": 1.0, "head/lm": 1.0, "head/pair": 0.5, "head/score": 2.0}


class Toy(nn.Module):
    """Embedding, two residual layers, and heads that give the summed loss of one objective on ``tokens [rows, 5]``."""

    def __init__(self, seed: int = 0, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.embedding.weight
        self.pooler = nn.Linear(WIDTH, WIDTH)  # of the backbone, but only "pair" uses it
        self.pair = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
        self.score = nn.Linear(WIDTH, 1)
        self.register_buffer("seen", torch.tensor(2.5))

    def trunk(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            step = lambda x, layer=layer: x + torch.tanh(layer(x))  # noqa: E731
            x = checkpoint(step, x, use_reentrant=False) if self.checkpointing else step(x)
        return self.norm(x)

    def forward(self, work: dict[str, Tensor]) -> Tensor:
        """Return the summed loss of ``work``, objective → tokens; 0 rows give 0."""
        total = 0.0
        for objective, tokens in work.items():
            x = self.trunk(tokens)
            if objective == "lm":
                logits = wide(self.decoder(x[:, :-1]))
                loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1), reduction="sum")
            elif objective == "pair":
                loss = F.cross_entropy(wide(self.pair(self.pooler(x[:, 0]))), tokens[:, 0] % 3, reduction="sum")
            else:
                loss = (wide(self.score(x)) - tokens[..., None]).square().sum() / 10
            total = total + loss
        return total


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def groups_of(module: Toy) -> list[ParameterGroup]:
    heads = {"head/pair": module.pair, "head/score": module.score}
    params = {name: list(head.parameters()) for name, head in heads.items()} | {"head/lm": [module.decoder.bias]}
    taken = {id(parameter) for group in params.values() for parameter in group}
    params["backbone"] = [parameter for parameter in module.parameters() if id(parameter) not in taken]
    return [ParameterGroup(name, params[name], LR_SCALES[name]) for name in LR_SCALES]


@dataclass(frozen=True)
class Step:
    """One step: per micro-step and rank the work; ``poison`` multiplies rank 1's last loss by NaN; ``drop`` skips."""

    work: list[list[dict[str, Tensor]]]
    lr: float = 0.01
    poison: bool = False
    drop: bool = False

    @property
    def active(self) -> set[str]:
        return {"backbone"} | {f"head/{name}" for micro in self.work for each in micro for name in each}


@dataclass
class Trace:
    """What a run left after each step: fp32 weights, (norm, applied), and the rank's part of the optimizer's states."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    outcomes: list[tuple[float, bool]] = field(default_factory=list)
    states: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def run_plain(steps: list[Step], settings: OptimizerSettings = ADAMW, clip: float = 1.0, bf16: bool = False) -> Trace:
    """Train on one process with plain torch: the sum of all losses, groups without gradient left out."""
    master = Toy()
    named = dict(master.named_parameters())
    optimizers = _plain_optimizers(master, settings)
    trace = Trace()
    for step in steps:
        sums = {name: torch.zeros_like(each) for name, each in named.items()}
        for micro in step.work:
            over_ranks: dict[str, Tensor] = {}  # gradients travel between ranks in the model's own type
            for rank, work in enumerate(micro):
                model = copy.deepcopy(master).to(torch.bfloat16 if bf16 else torch.float32)
                loss = model(work)
                (loss * float("nan") if step.poison and rank == 1 else loss).backward()
                for name, each in model.named_parameters():
                    if each.grad is not None:
                        over_ranks[name] = over_ranks[name] + each.grad if name in over_ranks else each.grad
            for name, gradient in over_ranks.items():
                sums[name] += gradient.float()
        for name, each in named.items():
            each.grad = sums[name]
        norm = float(nn.utils.clip_grad_norm_(master.parameters(), clip))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = step.lr * group["scale"]
                if group["component"] not in step.active:
                    for each in group["params"]:
                        each.grad = None
        applied = math.isfinite(norm) and not step.drop
        if applied:
            for optimizer in optimizers:
                optimizer.step()
        trace.outcomes.append((norm if math.isfinite(norm) else math.inf, applied))
        trace.weights.append({name: each.detach().clone() for name, each in master.state_dict().items()})
    return trace


def _plain_optimizers(module: Toy, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """torch's own AdamW and, if asked for, Muon for the backbone's matrices."""
    matrices = {id(layer.weight) for layer in (*module.layers, module.pooler)} if settings.name == "muon" else set()
    adamw, muon = [], []
    for group in groups_of(module):
        for each in group.params:
            decay = settings.weight_decay if each.ndim >= 2 else 0.0
            entry = {"params": [each], "weight_decay": decay, "scale": group.lr_scale, "component": group.name}
            (muon if id(each) in matrices else adamw).append(entry)
    optimizers = [torch.optim.AdamW(adamw, lr=0.0, betas=settings.betas, eps=settings.eps)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@dataclass(frozen=True)
class Run:
    """One engine's life: load (if there is something to load), the steps, and a save after step ``save_after``."""

    steps: list[Step]
    ds_config: dict
    settings: OptimizerSettings = ADAMW
    load_from: Path | None = None
    save_to: Path | None = None
    save_after: int = 0
    checkpointing: bool = False
    joint: bool = False  # one backward for all of a step's forwards


def run_engine(run: Run) -> Trace:
    """Train on this rank with the engine."""
    from pretrain.training.engine import Engine, init_distributed

    init_distributed(60)
    module = Toy(checkpointing=run.checkpointing)
    engine = Engine(module, groups_of(module), run.ds_config, run.settings)
    trace = Trace()
    if run.load_from is not None:
        engine.load(run.load_from)
    for index, step in enumerate(run.steps):
        take_step(engine, step, trace, run.joint)
        trace.weights.append(engine.full_state_dict())
        trace.states.append(states_of(engine))
        if run.save_to is not None and index + 1 == run.save_after:
            engine.save(run.save_to)
    engine.close()
    return trace


def take_step(engine, step: Step, trace: Trace, joint: bool = False) -> None:
    engine.begin_step()
    work = [micro[engine.rank] for micro in step.work]
    for losses in [[engine(each) for each in work]] if joint else ([engine(each)] for each in work):
        loss = sum(losses)
        engine.backward(loss * float("nan") if step.poison and engine.rank == 1 else loss)
    if step.drop:
        engine.skip_step()
        trace.outcomes.append((math.nan, False))
    else:
        outcome = engine.step(step.lr, step.active)
        trace.outcomes.append((outcome.grad_norm, outcome.applied))


def states_of(engine) -> dict[str, dict[str, Tensor]]:
    """Return this rank's part of the masters and of the optimizer's states, by parameter."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = {}
    for flat in engine._flats:
        state = engine._optimizer.state.get(flat.master, {})
        for fragment in flat.fragments:
            parts = {"master": fragment.of(flat.master).clone()}
            for key, value in state.items():
                parts[key] = (value if value.ndim == 0 else fragment.of(value)).clone()
            found[names[id(fragment.parameter)]] = parts
    return found


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return ‖found − wanted‖ as a fraction of ‖wanted − start‖, the way the weights have gone."""
    error = sum((found[name] - wanted[name]).double().square().sum() for name in wanted)
    return float((error / sum((start[name] - wanted[name]).double().square().sum() for name in wanted)).sqrt())
