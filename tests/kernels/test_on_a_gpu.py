"""What only a GPU shows: that no op makes the host wait, and that each can stand in a CUDA graph."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fused_objectives.backend import INTERPRETED
from pretrain import bench

BENCHMARKS = bench._script().load()
EVERY_OP = pytest.mark.parametrize("op", BENCHMARKS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ONE_LAUNCH = ("mask", "swap", "replace")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU, or TRITON_INTERPRET is set"),
]


def steps(op: str, dtype: torch.dtype, device: str = "cuda") -> Iterator[Callable]:
    """Yield calls of an op's kernels in every mode, as it is measured but smaller."""
    from cases import Scale

    benchmark = BENCHMARKS[op]
    shape = next(iter(benchmark.shapes(Scale(full=False, quick=True))))
    inputs = benchmark.inputs(device, dtype, **shape)
    for provider in benchmark.providers:
        if provider.name.startswith("medley") and "impl=torch" not in provider.name:
            made = (provider.prepare(inputs, mode) for mode in benchmark.modes)
            yield from (step for step in made if step is not None)


def tensors(result) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def activities(step: Callable) -> list[str]:
    """Return what the GPU did in a step, kernels and copies by name."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@EVERY_OP
@DTYPES
def test_the_host_never_waits(op, dtype):
    for step in steps(op, dtype):
        step()  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY_OP
@DTYPES
def test_a_cuda_graph_gives_the_same_results(op, dtype):
    for step in steps(op, dtype):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = tensors(step())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        graph.replay()
        for mine, theirs in zip(tensors(result), expected, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


@EVERY_OP
def test_nothing_travels_between_host_and_gpu(op):
    for step in steps(op, torch.bfloat16):
        step()
        seen = activities(step)
        assert seen and not [name for name in seen if "HtoD" in name or "DtoH" in name]


@pytest.mark.parametrize("op", ONE_LAUNCH)
def test_a_corruption_is_one_launch(op):
    for step in steps(op, torch.float32):
        step()
        seen = activities(step)
        assert len(seen) == 1, seen
