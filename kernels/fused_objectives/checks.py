"""What ops ask of their arguments before they launch anything: shapes, dtypes and one device, all known to the host."""

from collections.abc import Mapping

import torch

from fused_objectives.backend import uses_triton

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8)
INT64 = (torch.int64,)
BOOL = (torch.bool,)


Argument = tuple[torch.Tensor | None, str, tuple[torch.dtype, ...]]
"""A tensor; its shape, a letter for each dimension: "Nd" is ``[N, d]``; the dtypes that it may have."""


def check(arguments: Mapping[str, Argument], impl: str, samples: int | None = None) -> None:
    """Check an op's tensors.

    Args:
        arguments: by name. What a letter stands for is found where it comes first. None is not checked.
        impl: which implementation is asked for.
        samples: S, if it is not found in a tensor.

    Raises:
        ValueError: if a tensor has another shape or dtype or is on another device than the first, ``samples`` is no
            number, or ``impl`` cannot run there.
    """
    check_count("samples", samples)
    sizes = {"1": 1} if samples is None else {"1": 1, "S": samples}
    device = None
    for name, (tensor, letters, dtypes) in arguments.items():
        if tensor is None:
            continue
        shape = tensor.shape
        if len(shape) != len(letters) or tuple(map(sizes.setdefault, letters, shape)) != shape:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter != "1")
            raise ValueError(f"{name}: {list(shape)} is not [{', '.join(letters)}], with {known}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: {tensor.dtype} is not {' or '.join(map(str, dtypes))}")
        if device is None:
            device = tensor.device
            uses_triton(impl, tensor)
        elif tensor.device != device:
            raise ValueError(f"{name}: it is on {tensor.device}, {next(iter(arguments))} on {device}")


def check_count(name: str, number: int | None) -> None:
    """Check that a number, if it is given, is an integer from 0.

    Raises:
        ValueError: if not.
    """
    if number is not None and not (isinstance(number, int) and number >= 0):
        raise ValueError(f"{name}: {number} is not an integer from 0")


def layout(tokens: torch.Tensor) -> str:
    """Return the letters of tokens that may be flat or in rows, ``[L]`` or ``[R, L]``."""
    return "RL"[-tokens.ndim :]
