"""What a benchmark is: an op, its shapes and inputs, the work it must do, and who provides it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
from timing import Step

from fused_objectives.backend import jit, why_no_triton

Shape = dict[str, int | float | str]
FORWARD, TRAINING = "forward", "forward+backward"
SEED, STREAM = 1234, "benchmark"
SPECIAL, CLS, SEP, MASK = 5, 2, 3, 4  # number of special ids, which are the lowest, and three of them


class Work(NamedTuple):
    """What an op must do at least, however it is written."""

    flops: float = 0.0
    bytes: float = 0.0


class NotHere(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One implementation of an op."""

    name: str
    prepare: Callable[[SimpleNamespace, str], Step | None]
    """(inputs, mode) → the step to measure, or None if it has no such mode. What it cannot import it raises."""
    gpu_only: bool = False
    """Left out on a CPU, where it would be the same as another one or means nothing."""
    in_graph: bool = True
    """False for what makes the host wait at some shape, which no CUDA graph can hold, or does not run on the GPU."""
    works: bool = True
    """False for what does nothing of the op's work, so that it has no rates."""


@dataclass(frozen=True)
class Scale:
    """How large the shapes are: those that count, or on a CPU smaller ones."""

    full: bool = True
    quick: bool = False

    @property
    def tokens(self) -> int:
        return 65536 if self.full else 2048

    @property
    def width(self) -> int:
        return 768 if self.full else 256

    @property
    def vocabulary(self) -> int:
        return 30522 if self.full else 8192

    def base(self, *names: str, **others: int | float | str) -> Shape:
        """Return the shape of the given names: tokens, d, V, rate, length; and others."""
        sizes = {"tokens": self.tokens, "d": self.width, "V": self.vocabulary, "rate": 0.15, "length": 512}
        return {name: sizes[name] for name in names} | others

    def sweep(self, base: Shape) -> list[Shape]:
        """Return the base shape, and unless in a hurry those that differ from it in one number."""
        scales = {
            "tokens": (4096, 16384) if self.full else (512, 1024),
            "d": (1024,) if self.full else (384,),
            "V": (50368, 128256) if self.full else (2048, 4096),
            "rate": (0.3, 0.4),
            "length": (128, 2048),
        }
        values = {} if self.quick else {name: scales[name] for name in base if name in scales}
        return [base] + [base | {name: value} for name, several in values.items() for value in several]


@dataclass(frozen=True)
class Benchmark:
    """All there is to measure of one op."""

    name: str
    about: str
    functions: tuple[str, ...]
    """Public functions of ``fused_objectives`` that it runs, as ``module.function``."""
    shapes: Callable[[Scale], Iterable[Shape]]
    inputs: Callable[..., SimpleNamespace]
    """(device, dtype, **shape) → inputs; their attribute ``shape`` is the shape."""
    work: Callable[[Shape, str, int], Work]
    """(shape, mode, bytes of a floating-point number) → work."""
    providers: Sequence[Provider]
    modes: tuple[str, ...] = (FORWARD,)
    optional: bool = field(default=False)
    """Not among the ops of a run on a CPU unless it is asked for."""


def text_of(shape: Mapping) -> str:
    """Return a shape as in the results: ``tokens=65536 d=768``."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def generator(device: str) -> torch.Generator:
    """Return torch's generator with the benchmarks' seed, so that every run has the same inputs."""
    return torch.Generator(device).manual_seed(SEED)


def layout(device: str, tokens: int, length: int, vocabulary: int) -> SimpleNamespace:
    """Return rows of 2,048 places (or one sample, or all tokens) full of samples of ``length`` tokens.

    Each sample begins and ends with a special token. ``tokens``, ``segments`` and ``positions`` are
    ``[rows, length]`` int64; ``samples`` is their number; ids count from 0 and all visits are 0.
    """
    length = min(length, tokens)
    row = max(length, min(2048, tokens))
    places = torch.arange(tokens, device=device)
    positions = places % length
    ids = torch.randint(SPECIAL, vocabulary, (tokens,), device=device, generator=generator(device))
    ids = torch.where(positions == 0, CLS, torch.where(positions == length - 1, SEP, ids))
    samples = math.ceil(tokens / length)
    is_ordinary = torch.arange(vocabulary, device=device) >= SPECIAL
    return SimpleNamespace(
        tokens=ids.view(-1, row),
        segments=(places // length).view(-1, row),
        positions=positions.view(-1, row),
        samples=samples,
        sample_ids=torch.arange(samples, device=device),
        visits=torch.zeros(samples, dtype=torch.int64, device=device),
        is_ordinary=is_ordinary,
        ordinary_ids=torch.arange(SPECIAL, vocabulary, device=device),
    )


def normal(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Return reproducible normal numbers."""
    numbers = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(SEED + seed))
    return (numbers * scale).to(dtype)


def compiled(function: Callable) -> Callable:
    """Compile with torch.compile for exactly the shapes to come, forgetting what was compiled before."""
    torch._dynamo.reset()  # or its limit of recompilations would silently fall back to eager
    return torch.compile(function, dynamic=False, fullgraph=True)


@jit
def _nothing_kernel():
    pass


def empty_launch(inputs: SimpleNamespace, mode: str) -> Step:
    """One launch of a kernel that does nothing: what a launch costs."""
    device = inputs.tokens.device.type
    reason = why_no_triton(device)
    if reason:
        raise NotHere(reason)
    return lambda: _nothing_kernel[(1,)]()


def twin(prepare: Callable[[SimpleNamespace, str], Step | None], waits: bool) -> Provider:
    """Return the plain-torch twin of one of our ops, to be measured on a GPU beside the kernel.

    Args:
        waits: it makes the host wait at some shape.
    """
    return Provider("medley, impl=torch", prepare, gpu_only=True, in_graph=not waits)


EMPTY_LAUNCH = Provider("empty launch", empty_launch, gpu_only=True, works=False)
