"""The watch ends ranks that cannot go on, and one of them says why; here without a model, of processes that wait."""

import datetime
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.errors import RunError, UserError
from pretrain.training.ending import Ending
from pretrain.training.start import free_port
from pretrain.training.watch import Watch

RANKS, LIMIT_SECONDS = 3, 120
WATCH_SECONDS = 4.0  # what a busy machine may let a rank wait for its turn is less
# Processes that have imported everything already, without the threads that this one may have by now.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@pytest.fixture(scope="module", autouse=True)
def quiet_store():
    """Have those processes start as launch/train.py does: torch's store is wordy where rank 0 has gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        yield


def wait_for_others(fault: str, rank: int, port: int, folder: Path) -> None:
    """Be one of three ranks that wait for each other, of which one has a ``fault``; end with the code of a run."""
    log = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w")
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=LIMIT_SECONDS))
    ending = Ending("test")

    def run() -> None:
        ending.watch = Watch(WATCH_SECONDS, ending.tell, folder)
        torch.distributed.barrier()
        faulty, kind = fault.split(":")
        if rank == int(faulty):
            meet(kind, folder)
        if kind == "apart":  # all wait, each for something else
            torch.distributed.recv(torch.zeros(1), (rank + 1) % RANKS)
        torch.distributed.barrier()
        if fault == f"{rank}:outlast":
            ended = time.monotonic() + 1.5 * WATCH_SECONDS
            while time.monotonic() < ended:
                pass

    try:
        code = ending.of(run)
    except ZeroDivisionError:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def meet(kind: str, folder: Path) -> None:
    """Have a fault."""
    if kind == "mute":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    if kind in ("hang", "mute"):
        threading.Event().wait()
    elif kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "mistake":
        raise UserError("a mistake")
    elif kind == "fail":
        raise RunError("a failure")
    elif kind == "crash":
        raise ZeroDivisionError("a defect")
    elif kind == "compute":
        (folder / "met").touch()
        while not (folder / "enough").exists():
            pass


def outcomes(
    fault: str, folder: Path, meanwhile: Callable[[list], None] = lambda ranks: None
) -> tuple[list[int], list[str]]:
    """Run three ranks; return the exit codes of those that end, and all lines they print."""
    port = free_port()
    ranks = [CONTEXT.Process(target=wait_for_others, args=(fault, rank, port, folder)) for rank in range(RANKS)]
    for each in ranks:
        each.start()
    meanwhile(ranks)
    ending = [each for rank, each in enumerate(ranks) if fault != f"{rank}:freeze"]
    for each in ending:
        each.join(LIMIT_SECONDS)
    codes = [each.exitcode for each in ending]
    for each in ranks:
        each.kill()
        each.join()
    lines = [line for rank in range(RANKS) for line in (folder / f"{rank}.err").read_text().splitlines()]
    return codes, [line for line in lines if not line.startswith("[")]  # what torch says of lost connections


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        ("1:hang", [1, 1, 1], r"test: failed: rank 1 is hanging for \d s in wait \(.*threading.py"),
        ("0:hang", [1, 1, 1], r"test: failed: rank 0 is hanging for \d s"),
        ("0:mute", [1, 1, 1], None),  # it hangs, and cannot say so: the disk that has its output is full
        ("1:freeze", [1, 1], r"test: failed: rank 1 is silent for \d s: stopped, or cut off; last seen "),
        ("0:freeze", [1, 1], r"test: failed: rank 0 is silent for \d s: stopped, or cut off from rank 1"),
        ("2:die", [1, 1, -9], r"test: failed: rank 2 is gone \("),
        ("0:die", [-9, 1, 1], r"test: failed: rank 0 is gone \("),
        ("2:mistake", [2, 2, 2], "test: error: a mistake"),
        ("0:fail", [1, 1, 1], "test: failed: a failure"),
        ("2:fail", [1, 1, 1], "test: failed: a failure"),
        ("0:apart", [1, 1, 1], "test: failed: the ranks wait for each other: rank 0 in recv"),
        ("0:none", [0, 0, 0], None),
        ("0:outlast", [0, 0, 0], None),  # it misses none of those that are done
    ],
)
def test_all_ranks_end_and_one_line_says_why(tmp_path, fault, codes, told):
    found, lines = outcomes(fault, tmp_path)
    assert found == codes, lines
    assert len(lines) == (told is not None) and all(re.match(told, line) for line in lines), lines
    stacks = tmp_path / "stacks" / f"rank-0000{fault[0]}.txt"
    assert stacks.exists() == (fault.endswith(("hang", "mute", "apart")))


def test_ranks_that_were_all_stopped_for_longer_than_the_limit_go_on(tmp_path):
    """Rank 0 first and last, as a scheduler that suspends a job may do it: the others then stop while they ask it."""

    def stop_and_go_on(ranks: list) -> None:
        while not (tmp_path / "met").exists():
            time.sleep(0.01)
        for each in ranks:
            os.kill(each.pid, signal.SIGSTOP)
            time.sleep(0.5)
        time.sleep(WATCH_SECONDS)
        for each in reversed(ranks):
            os.kill(each.pid, signal.SIGCONT)
            time.sleep(0.5)
        (tmp_path / "enough").touch()

    assert outcomes("0:compute", tmp_path, stop_and_go_on) == ([0, 0, 0], [])


def test_a_defect_is_raised_by_the_rank_that_has_it_and_the_others_are_silent(tmp_path):
    codes, lines = outcomes("1:crash", tmp_path)
    assert codes == [1, 1, 1]
    assert lines[0].startswith("Traceback") and lines[-1] == "ZeroDivisionError: a defect"
