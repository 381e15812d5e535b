"""How a step is measured: its time, its time within a CUDA graph, and its peak memory.

A step is a function without arguments. On a GPU the L2 cache is overwritten before every repetition, so that a step
finds its inputs in memory as it does within training; while that runs, the host gets ahead, so that a step is timed by
the GPU's own clock from its first kernel to its last. On a CPU it is the process's CPU time, which other processes on
the machine hardly bear on.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

Step = Callable[[], object]
GRAPH_BELOW_MS = 0.5
"""Steps faster than that are measured in a CUDA graph too: between their kernels the GPU waits for the host."""
_LEAST, _MOST = 5, 300  # repetitions


class Quantiles(NamedTuple):
    """20th, 50th and 80th percentile over the repetitions."""

    p20: float
    p50: float
    p80: float


class Clock:
    """Measures steps on one device.

    Args:
        device: ``cpu`` or ``cuda``.
        seconds: how long to repeat a step (at least 5 and at most 300 times).
    """

    def __init__(self, device: str, seconds: float):
        self.device, self.seconds = device, seconds
        if device == "cuda":
            size = 4 * torch.cuda.get_device_properties().L2_cache_size
            self._cache = torch.empty(size, dtype=torch.int8, device=device)

    def milliseconds(self, step: Step) -> Quantiles:
        """Time ``step`` as it is called, after two calls to warm up."""
        for _ in range(2):
            step()
        first = self._repeat(step, 1)[0]
        return _quantiles(self._repeat(step, self._repetitions(first)))

    def graph_milliseconds(self, step: Step) -> Quantiles:
        """Time the replay of a CUDA graph of ``step``: the launch of a graph and the kernels, without the host."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a step does once, it must not do while it is captured
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        first = self._repeat(graph.replay, 2)[-1]
        return _quantiles(self._repeat(graph.replay, self._repetitions(first)))

    def peak_bytes(self, step: Step) -> int:
        """Return how much one call allocates at most at a time, its results included and its inputs not."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        with _silent(), torch.profiler.profile(profile_memory=True) as profile:
            step()
        events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    def _repetitions(self, milliseconds: float) -> int:
        return int(min(max(self.seconds * 1000 / max(milliseconds, 1e-3), _LEAST), _MOST))

    def _repeat(self, step: Step, repetitions: int) -> list[float]:
        if self.device != "cuda":
            return [_clocked(step) for _ in range(repetitions)]
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for start, end in pairs:
            self._cache.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def _clocked(step: Step) -> float:
    start = time.process_time()
    step()
    return (time.process_time() - start) * 1000


def _quantiles(times: list[float]) -> Quantiles:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(times), fifths[-1])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what torch's profiler prints to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
