"""Kinds of layers whose gradient can be told apart by the rows they see, and what each makes of those rows.

With inputs A ``[N, d]`` and gradients G ``[N, p]`` at the outputs a linear layer's gradient is Σ_n g_n a_nᵀ, a sum over
rows; the others' are such sums too. So a sample's is the sum over its rows, and one with weights scales them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fused_objectives.embedding_norms import embedding_norms
from fused_objectives.linear_norms import linear_norms
from fused_objectives.segments import per_token
from fused_objectives.sketched_norms import sketched_norms
from fused_objectives.vector_gradients import bias_gradients, layer_norm_gradients
from fused_objectives.weighted_gradient import weighted_gradient
from pretrain.model.rows import Rows


class Use(NamedTuple):
    """What is kept of a call of a layer, or of several."""

    inputs: torch.Tensor
    """``[N, d]`` floating, or ``[N]`` int64: what was looked up."""
    gradients: torch.Tensor
    """``[N, p]`` floating, at the outputs."""
    segments: torch.Tensor
    """``[N]`` int64: which sample a row belongs to, −1 for none."""
    vectors: tuple[torch.Tensor, ...] = ()
    """Each sample's gradient of a bias, a scale, a shift, ``[S, p]`` float32 each."""

    @staticmethod
    def joined(uses: list["Use"]) -> "Use":
        """Return all uses as one, in which each sample's rows are one run."""
        parts = [torch.cat(each) for each in zip(*(use[:3] for use in uses), strict=True)]
        order = parts[-1].argsort(stable=True)
        vectors = zip(*(use.vectors for use in uses), strict=True)
        return Use(*(part[order] for part in parts), tuple(sum(each) for each in vectors))


@dataclass(frozen=True)
class Measure:
    """How norms are found."""

    score: Literal["gram", "sketch"]
    samples: int
    impl: str
    sketch_size: int = 16
    seed: int = 0
    stream: str = ""
    longest: int | None = None
    """Tokens of the longest sample, or a bound on it."""


class Layer(ABC):
    """A module, ``name`` in the model, whose trained parameters are ``parameters``, its matrix or scale first."""

    method: ClassVar[str] = "forward"
    """What calls it."""
    normalises: ClassVar[bool] = False

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]

    @staticmethod
    @abstractmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what ``module``, this one or its copy with other parameters, makes of the arguments of a call."""
        return getattr(type(self.module), self.method)(module, *args, **kwargs)

    def detached(self) -> nn.Module:
        """Return a copy of the module whose parameters need no gradient."""
        return with_parameters(self.module, lambda parameter: parameter.detach())

    def inputs(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the inputs among the arguments of a call, ``[…, d]`` or as of a table ``[…]``."""
        return args[0] if args else next(iter(kwargs.values()))

    def spread(
        self, outputs: torch.Tensor, inputs: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs, spread over the rows if they are the same for all, and the samples of the inputs' vectors
        ``[N]``, or None if these are no rows of samples."""
        return outputs, rows.of(inputs.shape[:-1])

    def use(self, inputs: torch.Tensor, gradients: torch.Tensor, segments: torch.Tensor) -> Use:
        """Return what came to a call, by rows."""
        gradients = gradients.flatten(0, -2)
        return Use(inputs.detach().flatten(0, -2).to(gradients.dtype), gradients, segments)

    def kept(self, use: Use, measure: Measure) -> Use:
        """Return what is to be kept of a use whose samples' rows are runs: with each sample's gradients of vectors."""
        return use

    @abstractmethod
    def squared_norms(self, use: Use, measure: Measure) -> torch.Tensor:
        """Return each sample's squared norm of the gradient of all the parameters, ``[S]`` float32."""

    @abstractmethod
    def gradients(self, use: Use, weights: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's Σ_s w_s · gradient of sample s, with weights ``[S]`` float32."""


class LinearLayer(Layer):
    """``nn.Linear``, or transformers' ``Conv1D``, whose matrix is transposed."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return type(module).forward in (nn.Linear.forward, Conv1D.forward)

    def kept(self, use: Use, measure: Measure) -> Use:
        biases = self.parameters[1:]
        return use._replace(
            vectors=tuple(bias_gradients(*use[1:3], measure.samples, impl=measure.impl) for _ in biases)
        )

    def squared_norms(self, use: Use, measure: Measure) -> torch.Tensor:
        operands, impl = (*use[:3], measure.samples), measure.impl
        if measure.score == "gram":
            norms = linear_norms(*operands, longest=measure.longest, impl=impl)
        else:
            stream = f"{measure.stream}/{self.name}"
            norms = sketched_norms(*operands, seed=measure.seed, stream=stream, size=measure.sketch_size, impl=impl)
        return sum(map(_squares, use.vectors), norms)

    def gradients(self, use: Use, weights: torch.Tensor) -> list[torch.Tensor]:
        operands = use[:2] if isinstance(self.module, nn.Linear) else (use.gradients, use.inputs)
        matrix = weighted_gradient(*operands, use.segments, weights, dtype=self.parameters[0].dtype)
        return [matrix, *_weighted(use.vectors, weights, self.parameters[1:])]


class NormLayer(Layer):
    """``nn.LayerNorm``, or an RMSNorm of PyTorch or transformers."""

    normalises = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        if isinstance(module, nn.LayerNorm):
            return len(module.normalized_shape) == 1
        named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
        weight = getattr(module, "weight", None)
        return named and weight is not None and weight.ndim == 1 and len(list(module.parameters())) == 1

    def kept(self, use: Use, measure: Measure) -> Use:
        """Keep no rows: of vectors alone nothing else is needed."""
        rms = not isinstance(self.module, nn.LayerNorm)
        eps = getattr(self.module, "eps", None) or getattr(self.module, "variance_epsilon", None)
        eps = torch.finfo(use.inputs.dtype).eps if eps is None else eps
        operands, shift = (use.gradients, use.inputs, use.segments, measure.samples), len(self.parameters) > 1
        vectors = layer_norm_gradients(*operands, eps=eps, rms=rms, shift=shift, impl=measure.impl)
        return Use(*(part.new_empty(0, *part.shape[1:]) for part in use[:3]), vectors.unbind())

    def squared_norms(self, use: Use, measure: Measure) -> torch.Tensor:
        return sum(map(_squares, use.vectors))

    def gradients(self, use: Use, weights: torch.Tensor) -> list[torch.Tensor]:
        return _weighted(use.vectors, weights, self.parameters)


class TableLayer(Layer):
    """``nn.Embedding`` and its kin, which look up rows of their matrix and scale them at most."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq

    @property
    def plain(self) -> bool:
        """Whether the ids are the argument, and nothing is scaled."""
        return type(self.module).forward is nn.Embedding.forward

    def inputs(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.plain:
            return super().inputs(*args, **kwargs)
        numbers = torch.arange(len(self.module.weight), dtype=torch.float64, device=self.module.weight.device)
        found, scale = (self.run_on_a_column(each, *args, **kwargs) for each in (numbers, torch.ones_like(numbers)))
        return (found / scale)[..., 0].round().long()

    @torch.no_grad()
    def run_on_a_column(self, column: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what comes out with ``column`` as the matrix."""
        return self.run(with_parameters(self.module, lambda _: column[:, None]), *args, **kwargs)

    def spread(self, outputs, inputs, rows):
        if len(inputs) == 1 != len(rows.segments):  # one row of positions or types for all
            outputs = outputs.expand(len(rows.segments), *outputs.shape[1:])
        return outputs, rows.of(outputs.shape[:-1])

    def use(self, inputs: torch.Tensor, gradients: torch.Tensor, segments: torch.Tensor) -> Use:
        tokens, gradients = inputs.expand(gradients.shape[:-1]).reshape(-1), gradients.flatten(0, -2)
        gradients = gradients * getattr(self.module, "embed_scale", 1.0)
        if self.module.padding_idx is not None:  # whose row has no gradient
            gradients = gradients.masked_fill((tokens == self.module.padding_idx)[:, None], 0)
        return Use(tokens, gradients, segments)

    def squared_norms(self, use: Use, measure: Measure) -> torch.Tensor:
        operands = use.gradients, use.inputs, use.segments, measure.samples
        return embedding_norms(*operands, impl=measure.impl)

    def gradients(self, use: Use, weights: torch.Tensor) -> list[torch.Tensor]:
        (table,) = self.parameters
        rows = (use.gradients * per_token(weights, use.segments)[:, None]).to(use.gradients.dtype)
        return [torch.ops.aten.embedding_dense_backward(rows, use.inputs, len(table), -1, False).to(table.dtype)]


class DistanceLayer(TableLayer):
    """The embedding of distances that T5's attention adds to its scores, the same for all rows."""

    method = "compute_bias"

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.parameters = list(module.relative_attention_bias.parameters())

    @staticmethod
    def fits(module: nn.Module) -> bool:
        table = getattr(module, "relative_attention_bias", None)
        return isinstance(table, nn.Embedding) and hasattr(module, "compute_bias") and table.weight.requires_grad

    def inputs(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        numbers = torch.arange(len(self.parameters[0]), dtype=torch.float64, device=self.parameters[0].device)
        return self.run_on_a_column(numbers, *args, **kwargs)[0, 0].long()

    def spread(self, outputs, inputs, rows):
        return outputs.expand(len(rows.segments), -1, -1, -1), rows.segments.amax(1)

    def use(self, inputs: torch.Tensor, gradients: torch.Tensor, segments: torch.Tensor) -> Use:
        """Add up the pairs of equal distance, of which there are more than numbers in a sample's gradient."""
        rows, heads, distances = len(gradients), gradients.shape[1], len(self.parameters[0])
        row = torch.arange(rows, device=inputs.device)[:, None, None]
        places = (row * distances + inputs).reshape(-1)
        sums = gradients.new_zeros(rows * distances, heads, dtype=torch.float32)
        sums.index_add_(0, places, gradients.movedim(1, -1).reshape(-1, heads).float())
        return Use(
            torch.arange(distances, device=inputs.device).repeat(rows), sums, segments.repeat_interleave(distances)
        )


KINDS: tuple[type[Layer], ...] = (LinearLayer, NormLayer, TableLayer, DistanceLayer)


def with_parameters(module: nn.Module, change: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """Return a copy of a module with other tensors in the place of its and its children's parameters; all else is
    shared."""
    twin = copy.copy(module)
    parameters = {name: None if each is None else change(each) for name, each in module._parameters.items()}
    children = {name: None if each is None else with_parameters(each, change) for name, each in module._modules.items()}
    twin.__dict__.update(_parameters=parameters, _modules=children)
    return twin


def _squares(vectors: torch.Tensor) -> torch.Tensor:
    """Return each sample's squared norm of ``[S, p]``."""
    return vectors.square().sum(1)


def _weighted(
    vectors: tuple[torch.Tensor, ...], weights: torch.Tensor, parameters: list[nn.Parameter]
) -> list[torch.Tensor]:
    """Return Σ_s w_s · gradient of sample s of each parameter."""
    return [(weights @ each).to(parameter.dtype) for each, parameter in zip(vectors, parameters, strict=True)]
