"""Where the kernels run in these tests: through Triton's interpreter on the CPU, or on a GPU if there is one."""

from typing import NamedTuple

import pytest
import torch

from fused_objectives.backend import INTERPRETED, triton
from tests.builders import one_thread  # noqa: F401  (a fixture)


class Place(NamedTuple):
    """A device and the dtype of floating-point inputs there."""

    device: str
    dtype: torch.dtype


FP32 = [
    pytest.param(("cpu", torch.float32), id="interpreter"),
    pytest.param(("cuda", torch.float32), id="cuda-fp32", marks=pytest.mark.gpu),
]
BF16 = pytest.param(("cuda", torch.bfloat16), id="cuda-bf16", marks=pytest.mark.gpu)


@pytest.fixture(params=[*FP32, BF16])
def place(request) -> Place:
    """Where a kernel is tested; the interpreter cannot compute in 16 bits."""
    return _place(*request.param)


@pytest.fixture(params=FP32)
def device(request) -> str:
    """The device of a place, for tests of float32 alone."""
    return _place(*request.param).device


def _place(device: str, dtype: torch.dtype) -> Place:
    if triton is None:
        pytest.skip("Triton is not installed")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the interpreter is off where there is a GPU; set TRITON_INTERPRET=1")
    if device == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("no GPU, or TRITON_INTERPRET is set")
    return Place(device, dtype)
