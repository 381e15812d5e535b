"""Triton where it is installed, and the choice between a kernel and its plain-torch twin.

Every op has both: the twin is the specification and the path of the CPU, the kernel that of the GPU. With
``TRITON_INTERPRET=1``, set before this package is imported, the kernels run on the CPU as well, slowly, for tests.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton; the twins do without
    triton = None

    class _Nothing:
        """What kernels name in their annotations."""

        def __getattr__(self, name: str) -> None:
            return None

    tl = _Nothing()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ("auto", "triton", "torch")


def jit(kernel=None, **options):
    """``triton.jit``, or without Triton a decorator that leaves the function alone."""
    if kernel is None:
        return lambda function: jit(function, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


def why_no_triton(device: str) -> str | None:
    """Return why kernels cannot run on tensors of ``device`` ("cpu" or "cuda"), or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if device != "cuda" and not INTERPRETED:
        return f"Triton kernels do not run on '{device}' (but for tests, with TRITON_INTERPRET=1)"
    return None


def uses_triton(impl: str, tensor: torch.Tensor) -> bool:
    """Decide whether an op on ``tensor`` runs its kernel.

    Args:
        impl: ``auto`` (the kernel on a GPU, the twin elsewhere), ``triton`` or ``torch``.

    Raises:
        ValueError: for another word, or if ``triton`` is asked for where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: '{impl}' is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "torch" or (impl == "auto" and (triton is None or not tensor.is_cuda)):
        return False
    reason = why_no_triton(tensor.device.type)
    if reason:
        raise ValueError(f"impl: {reason}")
    return True


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context in which products on the tensor's device are of their operands' dtypes."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def not_differentiable(op: Callable) -> Callable:
    """Decorate an op whose results carry no gradient, and whose arithmetic autocast must not change."""

    @wraps(op)
    def run(*arguments, **options):
        first = next(x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
        with torch.no_grad(), without_autocast(first):
            return op(*arguments, **options)

    return run


class Configuration(NamedTuple):
    """One way a kernel is compiled: what it takes to compile it without a GPU."""

    kernel: Any
    signature: Mapping[str, str]
    """Run-time argument → Triton type (``*fp32``, ``i64``, …), in the kernel's order."""
    constants: Mapping[str, Any]
    """``tl.constexpr`` argument → value."""
    num_warps: int = 4
