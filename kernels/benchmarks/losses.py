"""Benchmarks of the losses: a vocabulary head on the target places only, with and without sampling; detection."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import (
    FORWARD,
    SEED,
    STREAM,
    TRAINING,
    Benchmark,
    NotHere,
    Provider,
    Scale,
    Shape,
    SimpleNamespace,
    Step,
    Work,
    compiled,
    generator,
    layout,
    normal,
    twin,
)

NORMS = "forward+backward+norms"
GEMMS = "its GEMMs alone"
LENGTH = 512
CHUNKS = (512, 1024, 2048, 4096)


def number_of_targets(shape: Shape) -> int:
    return round(shape["tokens"] * shape["rate"])


def head_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return hidden states, a vocabulary's weight, and targets at exactly a fraction ``rate`` of the tokens.

    ``hidden [N, d]`` and ``weight [V, d]`` want gradients; ``places [n]`` are those of the targets, in order.
    """
    from fused_objectives.targets import IGNORED, capacity_for

    tokens, width, vocabulary = shape["tokens"], shape["d"], shape["V"]
    inputs = layout(device, tokens, LENGTH, vocabulary)
    inputs.shape = shape
    inputs.hidden = normal(device, dtype, tokens, width).requires_grad_()
    inputs.weight = normal(device, dtype, vocabulary, width, scale=0.02, seed=1).requires_grad_()
    order = torch.rand(tokens, device=device, generator=generator(device)).argsort()
    inputs.places = order[: number_of_targets(shape)].sort().values
    inputs.targets = torch.full((tokens,), IGNORED, device=device)
    inputs.targets[inputs.places] = inputs.tokens.flatten()[inputs.places]
    inputs.segments = inputs.segments.flatten()
    inputs.positions = inputs.positions.flatten()
    inputs.sample_weights = torch.linspace(0.5, 1.5, inputs.samples, device=device)
    inputs.capacity = capacity_for(tokens, shape["rate"]) if device == "cuda" else None  # a CPU can count them
    inputs.longest = int(inputs.segments[inputs.places].bincount().max())
    return inputs


def trained(loss: Callable[[], torch.Tensor], inputs: SimpleNamespace, mode: str) -> Step:
    """Return a step that computes the loss, and in training the gradients of hidden states and weight."""
    if mode == FORWARD:
        return torch.no_grad()(loss)
    return lambda: torch.autograd.grad(loss(), (inputs.hidden, inputs.weight))


def head_work(shape: Shape, mode: str, size: int) -> Work:
    """One GEMM forward and two backward; the target rows of the hidden states, the weight and the targets are read, and
    backward both gradients are written."""
    targets, width, vocabulary = number_of_targets(shape), shape["d"], shape["V"]
    tokens = shape["tokens"]
    reading = size * width * (targets + vocabulary) + 8 * tokens
    if mode == FORWARD:
        return Work(2 * targets * width * vocabulary, reading)
    return Work(6 * targets * width * vocabulary, reading + size * width * (tokens + vocabulary))


def head_with(impl: str, chunk_rows: int | None = None):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.linear_cross_entropy import linear_cross_entropy

        places = inputs.targets, inputs.segments, inputs.samples
        options = {
            "sample_weights": inputs.sample_weights,
            "capacity": inputs.capacity,
            "chunk_rows": chunk_rows,
            "squared_norms": mode == NORMS,
            "longest": inputs.longest,
            "impl": impl,
        }
        return trained(
            lambda: linear_cross_entropy(inputs.hidden, inputs.weight, *places, **options).total, inputs, mode
        )

    return prepare


def head_anew(inputs: SimpleNamespace, mode: str) -> Step | None:
    """The gradients of a second pass."""
    if mode != TRAINING:
        return None
    from fused_objectives.linear_cross_entropy import linear_cross_entropy_gradients

    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.segments, inputs.samples
    options = {"sample_weights": inputs.sample_weights, "capacity": inputs.capacity}
    return lambda: linear_cross_entropy_gradients(*arguments, **options)


def _plain_head(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _plain_head_of_places(hidden, weight, targets, places):
    return _plain_head(hidden[places], weight, targets[places])


def head_with_torch(inputs: SimpleNamespace, mode: str) -> Step | None:
    return _peer(inputs, mode, lambda: _plain_head(inputs.hidden, inputs.weight, inputs.targets))


def head_of_places_with_torch(inputs: SimpleNamespace, mode: str) -> Step | None:
    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.places
    return _peer(inputs, mode, lambda: _plain_head_of_places(*arguments))


def head_of_places_with_compile(inputs: SimpleNamespace, mode: str) -> Step | None:
    if mode != TRAINING:  # compiling takes longer than all the rest
        return None
    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.places
    loss = compiled(_plain_head_of_places)
    return trained(lambda: loss(*arguments), inputs, mode)


def head_with_torchs_own(inputs: SimpleNamespace, mode: str) -> Step | None:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotHere(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return _peer(
        inputs,
        mode,
        lambda: F.linear_cross_entropy(
            inputs.hidden[inputs.places],
            inputs.weight,
            inputs.targets[inputs.places],
            reduction="sum",
            options=options,
        ),
    )


def head_with_liger(inputs: SimpleNamespace, mode: str) -> Step | None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return _peer(inputs, mode, lambda: loss(inputs.weight, inputs.hidden, inputs.targets))


def head_of_places_with_liger(inputs: SimpleNamespace, mode: str) -> Step | None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    places = inputs.places
    return _peer(inputs, mode, lambda: loss(inputs.weight, inputs.hidden[places], inputs.targets[places]))


def head_with_cut_cross_entropy(inputs: SimpleNamespace, mode: str) -> Step | None:
    from cut_cross_entropy import linear_cross_entropy

    return _peer(
        inputs,
        mode,
        lambda: linear_cross_entropy(  # its filter leaves small gradients out, which pre-training cannot do without
            inputs.hidden, inputs.weight, inputs.targets, reduction="sum", filter_eps=None
        ),
    )


def _peer(inputs: SimpleNamespace, mode: str, loss: Callable[[], torch.Tensor]) -> Step | None:
    return None if mode == NORMS else trained(loss, inputs, mode)


def head_gemms(inputs: SimpleNamespace, mode: str) -> Step:
    """Logits, gradient of the hidden states, gradient of the weight: over the target rows, and nothing else."""
    hidden, weight = inputs.hidden.detach()[inputs.places], inputs.weight.detach()
    gradients = hidden @ weight.T

    def step():
        if mode == FORWARD:
            return hidden @ weight.T
        return hidden @ weight.T, gradients @ weight, gradients.T @ hidden

    return step


def sample_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.generator_sampling import linear_cross_entropy_and_sample

        whose = inputs.targets, inputs.segments, inputs.samples, inputs.positions, inputs.sample_ids, inputs.visits
        options = {
            "seed": SEED,
            "stream": STREAM,
            "sample_weights": inputs.sample_weights,
            "capacity": inputs.capacity,
            "impl": impl,
        }

        def loss():
            return linear_cross_entropy_and_sample(inputs.hidden, inputs.weight, *whose, **options).loss.total

        return trained(loss, inputs, mode)

    return prepare


def _plain_sample(hidden, weight, targets, places):
    logits = F.linear(hidden[places], weight).float()
    noise = -torch.empty_like(logits).exponential_().log()
    return F.cross_entropy(logits, targets[places], reduction="sum"), (logits.detach() + noise).argmax(-1)


def sample_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.places
    return trained(lambda: _plain_sample(*arguments)[0], inputs, mode)


def sample_with_compile(inputs: SimpleNamespace, mode: str) -> Step | None:
    if mode != TRAINING:
        return None
    arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.places
    sample = compiled(_plain_sample)
    return trained(lambda: sample(*arguments)[0], inputs, mode)


def detection_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return hidden states that want gradients, as does ``weight [d]``, and a label for every token."""
    inputs = layout(device, shape["tokens"], LENGTH, 30522)
    inputs.shape = shape
    inputs.hidden = normal(device, dtype, shape["tokens"], shape["d"]).requires_grad_()
    inputs.weight = normal(device, dtype, shape["d"], scale=0.02, seed=1).requires_grad_()
    inputs.labels = (inputs.tokens.flatten() % 7 == 0).long()
    inputs.segments = inputs.segments.flatten()
    inputs.sample_weights = torch.linspace(0.5, 1.5, inputs.samples, device=device)
    return inputs


def detection_work(shape: Shape, mode: str, size: int) -> Work:
    """Hidden states and labels are read once; backward their gradient is written (the weight's needs no other pass)."""
    elements = shape["tokens"] * shape["d"]
    reading = size * elements + 8 * shape["tokens"]
    if mode == FORWARD:
        return Work(2 * elements, reading)
    return Work(6 * elements, reading + size * elements)


def detect_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.detection import detection_loss

        arguments = inputs.hidden, inputs.weight, inputs.labels, inputs.segments, inputs.samples
        options = {"sample_weights": inputs.sample_weights, "impl": impl}
        return trained(lambda: detection_loss(*arguments, **options).total, inputs, mode)

    return prepare


def _plain_detection(hidden, weight, labels, token_weights):
    losses = F.binary_cross_entropy_with_logits((hidden @ weight).float(), labels.float(), reduction="none")
    return (losses * token_weights).sum()


def detect_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = inputs.hidden, inputs.weight, inputs.labels, inputs.sample_weights[inputs.segments]
    return trained(lambda: _plain_detection(*arguments), inputs, mode)


def detect_with_compile(inputs: SimpleNamespace, mode: str) -> Step | None:
    if mode != TRAINING:
        return None
    arguments = inputs.hidden, inputs.weight, inputs.labels, inputs.sample_weights[inputs.segments]
    loss = compiled(_plain_detection)
    return trained(lambda: loss(*arguments), inputs, mode)


def _head_shapes(scale: Scale) -> list[Shape]:
    return scale.sweep(scale.base("tokens", "d", "V", "rate"))


def _sampling_shapes(scale: Scale) -> list[Shape]:
    base = scale.base("tokens", "d", "V", "rate")
    return [shape for shape in scale.sweep(base) if shape["tokens"] == base["tokens"] and shape["d"] == base["d"]]


def _chunk_shapes(scale: Scale) -> list[Shape]:
    base = scale.base("tokens", "d", "V", "rate")
    return [shape for shape in scale.sweep(base) if shape["tokens"] == base["tokens"] and shape["rate"] < 0.4]


BENCHMARKS = [
    Benchmark(
        "linear_ce",
        "cross entropy of a vocabulary head on the target places, weighted by sample",
        ("linear_cross_entropy.linear_cross_entropy", "linear_cross_entropy.linear_cross_entropy_gradients"),
        _head_shapes,
        head_inputs,
        head_work,
        [
            Provider("medley", head_with("auto")),
            twin(head_with("torch"), waits=True),
            Provider("medley, gradients anew", head_anew),
            Provider("torch", head_with_torch),
            Provider("torch, target rows", head_of_places_with_torch),
            Provider("torch.compile, target rows", head_of_places_with_compile),
            Provider("F.linear_cross_entropy, target rows", head_with_torchs_own),
            Provider("Liger", head_with_liger, in_graph=False),
            Provider("Liger, target rows", head_of_places_with_liger, in_graph=False),
            Provider("cut-cross-entropy", head_with_cut_cross_entropy, in_graph=False),
            Provider(GEMMS, head_gemms),
        ],
        (FORWARD, TRAINING, NORMS),
    ),
    Benchmark(
        "chunk_rows",
        "linear_ce by the number of target rows that it takes at a time",
        ("linear_cross_entropy.linear_cross_entropy",),
        _chunk_shapes,
        head_inputs,
        head_work,
        [
            *(Provider(f"medley, chunk_rows={rows}", head_with("auto", rows)) for rows in CHUNKS),
            Provider(GEMMS, head_gemms),
        ],
        (TRAINING,),
        optional=True,
    ),
    Benchmark(
        "sample",
        "linear_ce that draws a token from the same logits, for a generator",
        ("generator_sampling.linear_cross_entropy_and_sample",),
        _sampling_shapes,
        head_inputs,
        head_work,
        [
            Provider("medley", sample_with("auto")),
            twin(sample_with("torch"), waits=False),
            Provider("torch, target rows", sample_with_torch),
            Provider("torch.compile, target rows", sample_with_compile),
            Provider(GEMMS, head_gemms),
        ],
        (FORWARD, TRAINING),
    ),
    Benchmark(
        "detection",
        "binary cross entropy of a detector's head",
        ("detection.detection_loss",),
        lambda scale: scale.sweep(scale.base("tokens", "d")),
        detection_inputs,
        detection_work,
        [
            Provider("medley", detect_with("auto")),
            twin(detect_with("torch"), waits=False),
            Provider("torch", detect_with_torch),
            Provider("torch.compile", detect_with_compile),
        ],
        (FORWARD, TRAINING),
    ),
]
