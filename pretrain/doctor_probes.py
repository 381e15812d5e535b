"""The doctor's probes: small processes that try what training will do, all within one time limit."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# without the last line, gloo's threads abort about every fourth process at its exit (torch 2.13)
ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
print("imported", flush=True)
rank, store = int(sys.argv[1]), sys.argv[2]
limit = datetime.timedelta(seconds=8)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
value = torch.tensor([rank + 1.0])
dist.all_reduce(value)
assert value.item() == 3.0, f"1 + 2 gave {value.item()}"
dist.barrier()
print("two processes agree")
dist.destroy_process_group()
"""
IMPORT_DEEPSPEED = """
import deepspeed
print("accelerator", deepspeed.accelerator.get_accelerator().device_name())
"""


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    answer: str
    """The last line it printed."""
    failure: str
    """What went wrong in one line; empty if nothing did."""
    slow: bool = False
    """Whether time ran out before it printed anything, in the imports: the machine is busy, or its disk slow."""


@contextlib.contextmanager
def probes(seconds: float) -> Iterator[list[Outcome]]:
    """Run the probes while the body runs; at its end the list holds the outcomes of gloo's all-reduce and DeepSpeed.

    Processes still running ``seconds`` after the start are killed with all their children.
    """
    outcomes = []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="medley-doctor-") as folder:
        ranks = [start(ALL_REDUCE, str(rank), str(Path(folder) / "store")) for rank in range(2)]
        deepspeed = start(IMPORT_DEEPSPEED)
        try:
            yield outcomes
        finally:
            first, second, imported = [finish(process, deadline) for process in (*ranks, deepspeed)]
            outcomes += [first if first.failure else second, imported]


def start(code: str, *args: str) -> subprocess.Popen:
    """Start Python on ``code`` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, deadline: float) -> Outcome:
    """Wait until ``deadline`` (of ``time.monotonic``), then kill the process's whole session."""
    try:
        out, error = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        answer = process.communicate()[0].strip()
        return Outcome(answer, "hangs: killed when its time was up" if answer else "imports too slow", slow=not answer)
    failure = [*error.strip().splitlines(), f"exit code {process.returncode}"] if process.returncode else [""]
    return Outcome((out.strip().splitlines() or [""])[-1], failure[-2] if len(failure) > 1 else failure[-1])
