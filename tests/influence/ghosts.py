"""Models with one objective, recordings of them, and the oracle: autograd on every sample alone, in fp64."""

import copy
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.influence.ghost import GhostNorms
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import View, build_objectives, parse_objectives
from tests.builders import PAIRED_VOCABULARY, TINY_PAIRED, VOCABULARY, lay_out, random_samples, tiny_encoder
from tests.objectives.builders import annotated, numbered

LENGTHS = [[9, 4, 7], [1, 17], [23], [2, 1]]  # of the samples in each row; a row of 24 places
UNTIED = {"tie_word_embeddings": False}
CALM = {"initializer_factor": 0.5}  # T5's fp32 is too noisy with wide weights
FACTOR = 0.37


@dataclass(frozen=True)
class Setup:
    """A family, an objective, and keys of either."""

    family: str
    objective: str
    overrides: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)

    def model(self, **model_keys) -> MultiObjectiveModel:
        vocabulary = PAIRED_VOCABULARY if self.paired else VOCABULARY
        objectives = build_objectives(parse_objectives({self.objective: self.keys}, "test"), vocabulary, 1)
        encoder = tiny_encoder(self.family, overrides=self.overrides, **model_keys)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MultiObjectiveModel(encoder, objectives).eval()

    @property
    def paired(self) -> bool:
        return self.family in TINY_PAIRED


SETUPS = {
    "bert": Setup("bert", "mlm", keys={"masking": {"rate": 0.4}}),
    "bert untied": Setup("bert", "mlm", UNTIED, {"masking": {"rate": 0.4}}),
    "modernbert": Setup("modernbert", "mlm", keys={"masking": {"rate": 0.4}}),
    "modernbert untied, biased": Setup(
        "modernbert", "mlm", {**UNTIED, "attention_bias": True, "mlp_bias": True, "norm_bias": True}
    ),
    "electra": Setup("electra", "rtd", {"embedding_size": 32}, {"masking": {"rate": 0.3}}),
    "electra, nothing shared": Setup("electra", "rtd", UNTIED, {"generator": {"embeddings": "separate", "width": 0.5}}),
    "electra, disentangled": Setup("electra", "rtd", keys={"generator": {"embeddings": "disentangled", "width": 0.5}}),
    "roberta sop": Setup("roberta", "sop"),
    "gpt2": Setup("gpt2", "clm"),
    "llama": Setup("llama", "clm", UNTIED),
    "t5": Setup("t5", "span_corruption", CALM, {"masking": {"rate": 0.3}}),
    "t5 untied": Setup("t5", "denoise", {**CALM, **UNTIED}),
}
PACKED = [name for name, setup in SETUPS.items() if not setup.paired]


def batch_of(setup: Setup, packed: bool = True) -> Batch:
    """Return some samples in packed rows, or each in its own."""
    rows = [random_samples(lengths, seed=number) for number, lengths in enumerate(LENGTHS)]
    rows = rows if packed else [[sample] for row in rows for sample in row]
    ids = np.arange(sum(map(len, rows))).tolist()
    return numbered(rows, [[ids.pop(0) for _ in row] for row in rows], row_length=25)


def scales_of(model: MultiObjectiveModel) -> dict[str, float]:
    (objective,) = model.objectives.values()
    return {term: FACTOR * weight for term, weight in objective.terms.items()}


def view_of(model: MultiObjectiveModel, batch: Batch) -> dict[str, View]:
    return {name: objective.corrupt(batch, 0.0) for name, objective in model.objectives.items()}


def loss_of(model: MultiObjectiveModel, batch: Batch, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
    scales = {term: scale * factor for term, factor in scales_of(model).items()}
    return model(view_of(model, batch), scales, None if weights is None else dict.fromkeys(model.objectives, weights))[
        0
    ]


def record(model, batch, ghost: GhostNorms, *, deferred: bool = False, step: int = 0, **loss_keys) -> Tensor:
    """Run forward and backward; return the squared norms."""
    with ghost.recording(batch, deferred=deferred, step=step):
        torch.autograd.backward(loss_of(model, batch, **loss_keys))
    return ghost.squared_norms()


def alone(batch: Batch, sample: int) -> Batch:
    """Return the batch of one sample."""
    tokens = batch.tokens[batch.segment_ids == sample]
    ids = {"ids": [int(batch.sample_ids[sample])], "visits": [int(batch.visits[sample])]}
    return annotated(lay_out([[tokens.numpy()]], **ids))


def gradients_alone(model: MultiObjectiveModel, batch: Batch) -> list[dict[str, Tensor]]:
    """Return the gradients of each sample's loss, in fp64; of parameters that it does not reach zeros."""
    exact = copy.deepcopy(model).double()
    names, parameters = zip(*exact.named_parameters(), strict=True)
    found = []
    for sample in range(len(batch.sample_ids)):
        loss = loss_of(exact, alone(batch, sample))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def norms_of(gradients: list[dict[str, Tensor]], names: set[str] | None = None) -> Tensor:
    """Return ``[S]`` fp64: the squared norms over some parameters, or all."""
    wanted = [[each for name, each in own.items() if names is None or name in names] for own in gradients]
    return torch.stack([sum(each.square().sum() for each in own) for own in wanted])


@dataclass(frozen=True)
class Case:
    """A setup's model, and what the oracle says of its samples."""

    model: MultiObjectiveModel
    packed: Batch
    padded: Batch
    exact: list[dict[str, Tensor]]


@cache
def case(name: str) -> Case:
    setup = SETUPS[name]
    model, padded = setup.model(), batch_of(setup, packed=False)
    return Case(model, batch_of(setup), padded, gradients_alone(model, padded))


def assert_close(found: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    """Compare squared norms, each relative to itself; where the exact one is 0 the found one must be."""
    assert found.shape == exact.shape and found.dtype == torch.float32
    error = (found.double() - exact).abs()
    assert (error <= tolerance * exact).all(), (error / exact).tolist()


def worst_gradient(model: MultiObjectiveModel, exact: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient. Some are but rounding, such as a key's bias, which
    softmax does not feel: relative to a hundredth of the largest, then."""
    largest = max(float(each.norm()) for each in exact.values())
    errors = []
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        errors.append(float((found - exact[name]).norm()) / max(float(exact[name].norm()), 1e-2 * largest))
    return max(errors)


def weighted(gradients: list[dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Return Σ_s w_s · gradient of sample s."""
    return {n: sum(w * own[n] for w, own in zip(weights.double(), gradients, strict=True)) for n in gradients[0]}
