"""What the device can do at best, measured in the same run: no op can be faster than the bytes that it must move at the
bandwidth of a copy, nor than its FLOPs at the rate of a large matrix product."""

from typing import NamedTuple

import torch
from cases import Work
from timing import Clock


class Floors(NamedTuple):
    """Measured rates of a device."""

    bytes_per_second: float
    """Of a copy, bytes read and bytes written together."""
    flops_per_second: float
    """Of a square matrix product in ``dtype``."""
    dtype: torch.dtype

    def milliseconds(self, work: Work) -> float:
        """Return the least time that ``work`` can take."""
        return 1000 * max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"a copy moves {self.bytes_per_second / 1e9:,.0f} GB/s, "
            f"a {name} matrix product does {self.flops_per_second / 1e12:,.2f} TFLOP/s"
        )


def measure(clock: Clock, dtype: torch.dtype) -> Floors:
    """Measure both rates, with arrays far larger than any cache."""
    size, side = (1 << 30, 8192) if clock.device == "cuda" else (1 << 28, 1024)
    copying, multiplying = _copy(clock, size), _multiply(clock, side, dtype)
    return Floors(2 * size / copying * 1000, 2 * side**3 / multiplying * 1000, dtype)


def _copy(clock: Clock, size: int) -> float:
    source = torch.ones(size, dtype=torch.int8, device=clock.device)  # zeros would be one page of memory on a CPU
    target = torch.empty_like(source)
    return clock.milliseconds(lambda: target.copy_(source)).p50


def _multiply(clock: Clock, side: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    return clock.milliseconds(lambda: left @ right).p50
