"""Benchmarks of per-sample gradient norms and of weighted gradients, and of a whole BERT layer to hold them against."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from cases import (
    SEED,
    STREAM,
    TRAINING,
    Benchmark,
    NotHere,
    Provider,
    Scale,
    Shape,
    Step,
    Work,
    compiled,
    generator,
    layout,
    normal,
    twin,
)

EXACT, SKETCHED = "exact norms", "sketched norms"
LINEAR, WITH_GRADIENT = "linear_norms.linear_norms", "linear_norms.linear_norms_and_gradient"
BIAS, LAYER_NORM = "vector_gradients.bias_gradients", "vector_gradients.layer_norm_gradients"
EMBEDDING, TIED = "embedding_norms.embedding_norms", "embedding_norms.tied_cross_term"
SKETCH, GRADIENT = "sketched_norms.sketched_norms", "weighted_gradient.weighted_gradient"
SKETCH_SIZE = 16
_EPS = 1e-12
_RATE = 0.15  # of the tied head's targets


def linear_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return a layer's inputs ``[N, d]``, the gradients at its outputs ``[N, p]``, and weights of the samples."""
    inputs = layout(device, shape["tokens"], shape["length"], shape.get("V", 30522))
    inputs.shape = shape
    inputs.length = min(shape["length"], shape["tokens"])
    inputs.segments = inputs.segments.flatten()
    if "d" in shape:
        inputs.inputs = normal(device, dtype, shape["tokens"], shape["d"])
    inputs.gradients = normal(device, dtype, shape["tokens"], shape["p"], scale=0.01, seed=1)
    inputs.weights = torch.linspace(0.5, 1.5, inputs.samples, device=device)
    return inputs


def by_sample(inputs: SimpleNamespace, values: torch.Tensor) -> torch.Tensor:
    """Return ``[S, T, ...]``: the samples are of one length, as plain torch and Opacus need them."""
    if len(values) % inputs.length:
        raise NotHere("samples of several lengths")
    return values.view(-1, inputs.length, *values.shape[1:])


def op(path: str) -> Callable:
    """Import ``module.function`` of ``fused_objectives``."""
    module, function = path.split(".")
    return getattr(import_module(f"fused_objectives.{module}"), function)


def ours(path: str, *arguments: str, **options):
    """Return a provider's function that calls an op on the named inputs, the segments and S."""

    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        function = op(path)
        tensors = [getattr(inputs, argument) for argument in arguments]
        longest = {"longest": inputs.length} if path == LINEAR else {}
        return lambda: function(*tensors, inputs.segments, inputs.samples, **longest, **options)

    return prepare


def linear_work(shape: Shape, mode: str, size: int) -> Work:
    """Of the cheaper of both ways, the Gram matrices' lower triangles or the gradient itself; activations are read."""
    tokens, width, height = shape["tokens"], shape["d"], shape["p"]
    gram = tokens * (min(shape["length"], tokens) + 1) * (width + height)
    return Work(min(gram, 2 * tokens * width * height), size * tokens * (width + height))


def gemm_work(shape: Shape, mode: str, size: int) -> Work:
    """The GEMM of a layer's weight gradient, which is written."""
    tokens, width, height = shape["tokens"], shape["d"], shape["p"]
    return Work(2 * tokens * width * height, size * (tokens * (width + height) + width * height))


def reading(arrays: int):
    """Return the work of reading so many arrays ``[N, p]``."""

    def work(shape: Shape, mode: str, size: int) -> Work:
        elements = arrays * shape["tokens"] * shape["p"]
        return Work(2 * elements, size * elements)

    return work


def sketch_work(shape: Shape, mode: str, size: int) -> Work:
    """Both operands are read and multiplied by 16 random signs a row."""
    tokens, widths = shape["tokens"], shape["d"] + shape["p"]
    return Work(2 * SKETCH_SIZE * tokens * (widths + SKETCH_SIZE), size * tokens * widths)


def _instantiated(inputs, gradients):
    return torch.einsum("std,stp->spd", inputs, gradients).float().square().sum((1, 2))


def instantiate_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = by_sample(inputs, inputs.inputs), by_sample(inputs, inputs.gradients)
    return lambda: _instantiated(*arguments)


def instantiate_with_compile(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = by_sample(inputs, inputs.inputs), by_sample(inputs, inputs.gradients)
    norms = compiled(_instantiated)
    return lambda: norms(*arguments)


def linear_with_opacus(inputs: SimpleNamespace, mode: str) -> Step:
    from opacus.grad_sample.linear import compute_linear_norm_sample

    layer = torch.nn.Linear(inputs.shape["d"], inputs.shape["p"], bias=False, device="meta")
    activations, gradients = [by_sample(inputs, inputs.inputs)], by_sample(inputs, inputs.gradients)
    return lambda: compute_linear_norm_sample(layer, activations, gradients)


def gradient_with_medley(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        arguments = inputs.inputs, inputs.gradients, inputs.segments, inputs.weights
        gradient = op(GRADIENT)
        return lambda: gradient(*arguments, impl=impl)

    return prepare


def _plain_gradient(inputs, gradients, segments, weights):
    return (gradients * weights[segments, None].to(gradients.dtype)).T @ inputs


def gradient_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    return lambda: _plain_gradient(inputs.inputs, inputs.gradients, inputs.segments, inputs.weights)


def gradient_with_compile(inputs: SimpleNamespace, mode: str) -> Step:
    gradient = compiled(_plain_gradient)
    return lambda: gradient(inputs.inputs, inputs.gradients, inputs.segments, inputs.weights)


def gradient_gemm(inputs: SimpleNamespace, mode: str) -> Step:
    """The same GEMM without weights or norms."""
    return lambda: inputs.gradients.T @ inputs.inputs


def layer_norm_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    return linear_inputs(device, dtype, d=shape["p"], **shape)


def _plain_layer_norm(inputs, gradients):
    normalised = F.layer_norm(inputs, inputs.shape[-1:], eps=_EPS)
    scale, shift = (gradients * normalised).sum(1, dtype=torch.float32), gradients.sum(1, dtype=torch.float32)
    return torch.stack([scale, shift])


def layer_norm_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = by_sample(inputs, inputs.inputs), by_sample(inputs, inputs.gradients)
    return lambda: _plain_layer_norm(*arguments)


def layer_norm_with_compile(inputs: SimpleNamespace, mode: str) -> Step:
    arguments = by_sample(inputs, inputs.inputs), by_sample(inputs, inputs.gradients)
    gradients = compiled(_plain_layer_norm)
    return lambda: gradients(*arguments)


def bias_with_torch(inputs: SimpleNamespace, mode: str) -> Step:
    gradients = by_sample(inputs, inputs.gradients)
    return lambda: gradients.sum(1, dtype=torch.float32)


def embedding_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    inputs = linear_inputs(device, dtype, **shape)
    inputs.tokens = inputs.tokens.flatten()
    return inputs


def embedding_with_opacus(inputs: SimpleNamespace, mode: str) -> Step:
    from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample

    layer = torch.nn.Embedding(30522, inputs.shape["p"], device="meta")
    ids, gradients = by_sample(inputs, inputs.tokens), by_sample(inputs, inputs.gradients)
    return lambda: compute_embedding_norm_sample(layer, [ids], gradients)


def tied_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return a tied head's hidden states at its targets, the shared weight, and the gradients at the embeddings."""
    inputs = embedding_inputs(device, dtype, **shape)
    tokens, width, vocabulary = shape["tokens"], shape["p"], shape["V"]
    targets = round(tokens * _RATE)
    places = torch.rand(tokens, device=device, generator=generator(device)).argsort()[:targets].sort().values
    inputs.hidden = normal(device, dtype, targets, width, seed=2)
    inputs.weight = normal(device, dtype, vocabulary, width, scale=0.02, seed=3)
    inputs.targets, inputs.target_segments = inputs.tokens[places], inputs.segments[places]
    rows = inputs.hidden.split(1024)
    inputs.log_normalizers = torch.cat([(row @ inputs.weight.T).float().logsumexp(-1) for row in rows])
    return inputs


def tied_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        cross_term = op(TIED)
        head = inputs.hidden, inputs.weight, inputs.targets, inputs.target_segments, inputs.log_normalizers
        embedding = inputs.tokens, inputs.gradients, inputs.segments, inputs.samples
        options = {"label_smoothing": 0.0, "z_loss": 0.0, "soft_cap": None, "impl": impl}
        return lambda: cross_term(*head, *embedding, **options)

    return prepare


def tied_work(shape: Shape, mode: str, size: int) -> Work:
    """For every pair of a target and a token of one sample, two inner products: of hidden state and gradient, and of
    hidden state and the token's weight, for the target's logit there."""
    tokens, width = shape["tokens"], shape["p"]
    targets = round(tokens * _RATE)
    read = targets * width + min(shape["V"], tokens) * width + tokens * width
    return Work(4 * targets * min(shape["length"], tokens) * width, size * read)


def gram_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.gram import gram_row_sums
        from fused_objectives.segments import spans

        starts, ends = (bound[inputs.segments] for bound in spans(inputs.segments, inputs.samples))
        side = inputs.inputs, inputs.gradients
        return lambda: gram_row_sums(*side, *side, starts, ends, symmetric=True, impl=impl)

    return prepare


def gram_work(shape: Shape, mode: str, size: int) -> Work:
    tokens, widths = shape["tokens"], shape["d"] + shape["p"]
    return Work(tokens * (min(shape["length"], tokens) + 1) * widths, size * tokens * widths)


def sum_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    inputs = layout(device, shape["tokens"], shape["length"], 30522)
    inputs.segments = inputs.segments.flatten()
    inputs.values = normal(device, torch.float32, shape["tokens"])
    return inputs


def sum_with(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step:
        from fused_objectives.segments import sum_per_sample

        return lambda: sum_per_sample(inputs.values, inputs.segments, inputs.samples, impl=impl)

    return prepare


def bert_inputs(device: str, dtype: torch.dtype, **shape) -> SimpleNamespace:
    """Return a BERT layer, rows of hidden states for it, and for each of its parts inputs and gradients as they are
    when its norms are computed. The parts' values are random: they do not bear on the time."""
    width, tokens = shape["d"], shape["tokens"]
    inputs = linear_inputs(device, dtype, **shape, p=width)
    heads = width // 64
    layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True)
    inputs.layer = layer.to(device, dtype).train()
    inputs.rows = by_sample(inputs, inputs.inputs).detach().requires_grad_()
    narrow, wide = inputs.inputs, normal(device, dtype, tokens, 4 * width, seed=4)
    small, large = inputs.gradients, normal(device, dtype, tokens, 4 * width, scale=0.01, seed=5)
    # query, key, value and output; then the two halves of the feed-forward part
    inputs.linears = [(narrow, small)] * 4 + [(narrow, large), (wide, small)]
    inputs.layer_norms = [(small, narrow)] * 2
    return inputs


def bert_with_torch(inputs: SimpleNamespace, mode: str) -> Step | None:
    if mode != TRAINING:
        return None
    parameters = [inputs.rows, *inputs.layer.parameters()]
    upstream = torch.ones_like(inputs.rows)
    return lambda: torch.autograd.grad(inputs.layer(inputs.rows), parameters, upstream)


def bert_with_medley(impl: str):
    def prepare(inputs: SimpleNamespace, mode: str) -> Step | None:
        if mode == TRAINING:
            return None
        linear_norms, sketched_norms, bias_gradients, layer_norm_gradients = map(op, (LINEAR, SKETCH, BIAS, LAYER_NORM))
        where = inputs.segments, inputs.samples

        def linear(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
            if mode == EXACT:
                return linear_norms(activations, gradients, *where, bias=True, longest=inputs.length, impl=impl)
            weight = sketched_norms(
                activations, gradients, *where, seed=SEED, stream=STREAM, size=SKETCH_SIZE, impl=impl
            )
            return weight + bias_gradients(gradients, *where, impl=impl).square().sum(1)

        def step() -> torch.Tensor:
            norms = [linear(*pair) for pair in inputs.linears]
            vectors = [layer_norm_gradients(*pair, *where, eps=_EPS, impl=impl) for pair in inputs.layer_norms]
            return torch.stack([*norms, *(each.square().sum((0, 2)) for each in vectors)]).sum(0)

        return step

    return prepare


def bert_with_opacus(inputs: SimpleNamespace, mode: str) -> Step | None:
    if mode != EXACT:
        return None
    from opacus.grad_sample.linear import compute_linear_norm_sample

    def layer_of(activations: torch.Tensor, gradients: torch.Tensor) -> torch.nn.Linear:
        return torch.nn.Linear(activations.shape[-1], gradients.shape[-1], device="meta")

    pairs = [
        (layer_of(*pair), [by_sample(inputs, pair[0])], by_sample(inputs, pair[1]))
        for pair in inputs.linears  # it has no norms of LayerNorm
    ]
    return lambda: [compute_linear_norm_sample(*pair) for pair in pairs]


def bert_work(shape: Shape, mode: str, size: int) -> Work:
    """Six linear layers, 24·d² FLOPs a token forward, and attention's two products; norms as of the linear layers."""
    tokens, width, length = shape["tokens"], shape["d"], min(shape["length"], shape["tokens"])
    if mode == TRAINING:
        return Work(3 * tokens * (24 * width**2 + 4 * length * width), 4 * size * tokens * width)
    pairs = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    work = linear_work if mode == EXACT else sketch_work
    works = [work({"tokens": tokens, "length": length, "d": d, "p": p}, mode, size) for d, p in pairs]
    return Work(sum(each.flops for each in works), sum(each.bytes for each in works))


def both(path: str, *arguments: str, waits: bool = True, **options) -> tuple[Provider, Provider]:
    """Return our op as it is used, and on a GPU its plain-torch twin there, which may make the host wait."""
    return (
        Provider("medley", ours(path, *arguments, impl="auto", **options)),
        twin(ours(path, *arguments, impl="torch", **options), waits=waits),
    )


def _linear(scale: Scale) -> list[Shape]:
    base = scale.base("tokens", "d", "length")
    shapes = [shape | {"p": shape["d"]} for shape in scale.sweep(base) if shape["tokens"] == scale.tokens]
    return shapes if scale.quick else [*shapes, base | {"p": 4 * base["d"]}]


def _wide(scale: Scale) -> list[Shape]:
    return [shape | {"p": shape.pop("d")} for shape in scale.sweep(scale.base("tokens", "d", "length"))]


def _tied(scale: Scale) -> list[Shape]:
    shapes = scale.sweep(scale.base("tokens", "V", "length", p=scale.width))
    return [shape for shape in shapes if shape["tokens"] == scale.tokens]


PAIR = "inputs", "gradients"
BENCHMARKS = [
    Benchmark(
        "linear_norms",
        "per-sample gradient norms of a linear layer, from Gram matrices or the gradients themselves",
        (LINEAR,),
        _linear,
        linear_inputs,
        linear_work,
        [
            *both(LINEAR, *PAIR),
            Provider("medley, method=gram", ours(LINEAR, *PAIR, method="gram")),
            Provider("medley, method=instantiate", ours(LINEAR, *PAIR, method="instantiate")),
            Provider("torch", instantiate_with_torch),
            Provider("torch.compile", instantiate_with_compile),
            Provider("Opacus", linear_with_opacus),
        ],
    ),
    Benchmark(
        "linear_norms_and_gradient",
        "those norms together with the gradient of the weighted loss",
        (WITH_GRADIENT,),
        _linear,
        linear_inputs,
        gemm_work,
        [*both(WITH_GRADIENT, *PAIR), Provider("its GEMM alone", gradient_gemm)],
    ),
    Benchmark(
        "weighted_gradient",
        "a linear layer's weight gradient with a weight for each sample",
        (GRADIENT,),
        _linear,
        linear_inputs,
        gemm_work,
        [
            Provider("medley", gradient_with_medley("auto")),
            twin(gradient_with_medley("torch"), waits=True),
            Provider("torch", gradient_with_torch),
            Provider("torch.compile", gradient_with_compile),
            Provider("its GEMM alone", gradient_gemm),
        ],
    ),
    Benchmark(
        "sketched_norms",
        "unbiased estimates of a linear layer's norms",
        (SKETCH,),
        _linear,
        linear_inputs,
        sketch_work,
        [*both(SKETCH, *PAIR, seed=SEED, stream=STREAM, size=SKETCH_SIZE)],
    ),
    Benchmark(
        "bias_gradients",
        "per-sample gradients of a bias",
        (BIAS,),
        _wide,
        linear_inputs,
        reading(1),
        [*both(BIAS, "gradients", waits=False), Provider("torch", bias_with_torch)],
    ),
    Benchmark(
        "layer_norm_gradients",
        "per-sample gradients of a LayerNorm",
        (LAYER_NORM,),
        _wide,
        layer_norm_inputs,
        reading(2),
        [
            *both(LAYER_NORM, "gradients", "inputs", waits=False, eps=_EPS),
            Provider("torch", layer_norm_with_torch),
            Provider("torch.compile", layer_norm_with_compile),
        ],
    ),
    Benchmark(
        "embedding_norms",
        "per-sample gradient norms of an embedding",
        (EMBEDDING,),
        _wide,
        embedding_inputs,
        reading(1),
        [
            *both(EMBEDDING, "gradients", "tokens"),
            Provider("Opacus", embedding_with_opacus, in_graph=False),
        ],
    ),
    Benchmark(
        "tied_cross_term",
        "what a shared weight of embedding and head adds to their norms",
        (TIED,),
        _tied,
        tied_inputs,
        tied_work,
        [
            Provider("medley", tied_with("auto")),
            twin(tied_with("torch"), waits=True),
        ],
    ),
    Benchmark(
        "gram",
        "the core of the exact norms: products of two Gram matrices, summed by row",
        ("gram.gram_row_sums",),
        _linear,
        linear_inputs,
        gram_work,
        [
            Provider("medley", gram_with("auto")),
            twin(gram_with("torch"), waits=True),
        ],
    ),
    Benchmark(
        "segment_sums",
        "sums over each sample's tokens",
        ("segments.sum_per_sample",),
        lambda scale: scale.sweep(scale.base("tokens", "length")),
        sum_inputs,
        lambda shape, mode, size: Work(shape["tokens"], 12 * shape["tokens"]),
        [
            Provider("medley", sum_with("auto")),
            twin(sum_with("torch"), waits=False),
        ],
    ),
    Benchmark(
        "bert_layer",
        "a BERT layer's forward and backward, and all norms of that layer beside it",
        (LINEAR, SKETCH, BIAS, LAYER_NORM),
        lambda scale: [
            shape
            for shape in scale.sweep(scale.base("tokens", "d", "length"))
            if shape["tokens"] == scale.tokens and shape["d"] == scale.width
        ],
        bert_inputs,
        bert_work,
        [
            Provider("torch", bert_with_torch),
            Provider("medley", bert_with_medley("auto")),
            twin(bert_with_medley("torch"), waits=True),
            Provider("Opacus", bert_with_opacus),
        ],
        (TRAINING, EXACT, SKETCHED),
    ),
]
