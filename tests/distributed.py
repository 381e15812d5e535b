"""Run a function on several ranks, cheaply: worker processes that live as long as the test session.

Importing torch and DeepSpeed costs seconds, so the workers are started once and get one call after another; each world
size has its own, so that all ranks have the same history (DeepSpeed numbers parameters over a process's life). A call
finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and a fresh MASTER_PORT in its environment, as under a launcher, and
makes its own process group (``pretrain.training.engine.init_distributed`` or plain
``torch.distributed.init_process_group("gloo")``); the worker takes the group down and restores the environment.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

TIME_LIMIT_SECONDS = 120.0
ENDING_SECONDS = 1.0
STACKS_SECONDS = 5.0  # how long hung ranks get to write down where they are
LOG_TAIL_CHARACTERS = 2000


class RanksFailed(AssertionError):
    """Ranks hung or died; the message holds every rank's state, traceback or stack, and the end of its output."""


class RankPool:
    """Worker processes, one a rank, started when first needed and again after a failure, a hang or a death."""

    def __init__(self):
        self._workers: dict[int, list[_Worker]] = {}  # by world size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._started = 0

    def run(
        self, function: Callable, *args, world_size: int = 2, time_limit_seconds: float = TIME_LIMIT_SECONDS
    ) -> list:
        """Call ``function(*args)`` on every rank and return the results in rank order.

        ``function`` is a module-level function; arguments and results must be picklable (tensors are copied).
        Raises the exception of the rank that failed first, with all tracebacks as notes, or RanksFailed if a rank hangs
        longer than ``time_limit_seconds`` or dies. The processes of a failed call are ended.
        """
        if world_size not in self._workers:
            self._workers[world_size] = [self._start() for _ in range(world_size)]
        workers, port = self._workers[world_size], _free_port()
        for rank, worker in enumerate(workers):
            worker.send((_environment(rank, world_size, port), function, args))
        deadline = time.monotonic() + time_limit_seconds
        replies: dict[int, tuple] = {}
        while len(replies) < world_size:
            waiting = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in replies}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._give_up(replies, workers, f"no answer within {time_limit_seconds:g} s")
            for connection in ready:
                try:
                    replies[waiting[connection]] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    raise self._give_up(replies, workers, f"rank {waiting[connection]} died") from None
        if any(not reply[0] for reply in replies.values()):
            error = _first_failure(replies, workers)
            self._end(world_size)
            raise error
        return [replies[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End all workers and wait for them."""
        for world_size in list(self._workers):
            self._end(world_size)
        self._folder.cleanup()

    def _start(self) -> "_Worker":
        self._started += 1
        return _Worker(Path(self._folder.name) / f"worker-{self._started}")

    def _end(self, world_size: int) -> None:
        for worker in self._workers.pop(world_size):
            worker.end()

    def _give_up(self, replies: dict[int, tuple], workers: list["_Worker"], reason: str) -> RanksFailed:
        """Collect what every rank was doing, end the workers, and return the error to raise."""
        lines = [reason]
        for rank, worker in enumerate(workers):
            if rank not in replies:
                lines += [f"--- rank {rank} was at:", worker.stacks(), worker.log_tail()]
            else:
                outcome, value = replies[rank][:2]
                lines += [f"--- rank {rank} had {'returned' if outcome else f'failed: {value!r}'}", *replies[rank][2:]]
        self._end(len(workers))
        return RanksFailed("\n".join(lines))


class _Worker:
    """One process of the pool and the parent's end of its pipe."""

    def __init__(self, base: Path):
        context = multiprocessing.get_context("spawn")
        self._log, self._stacks = base.with_suffix(".log"), base.with_suffix(".stacks")
        self.connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, self._log, self._stacks), daemon=True)
        self._process.start()
        child.close()

    def send(self, call: tuple) -> None:
        self.connection.send_bytes(pickle.dumps(call))

    def stacks(self) -> str:
        """Return the stacks of all threads of a hung worker, or say how it ended."""
        self._process.join(timeout=ENDING_SECONDS)  # a dying process closes its pipe before it is gone
        if self._process.exitcode is not None:
            return f"ended with exit code {self._process.exitcode}"
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline:
            text = self._stacks.read_text(errors="replace") if self._stacks.exists() else ""
            if "most recent call first" in text and text.endswith("\n"):
                return text
            self._process.join(timeout=0.05)
        return "it wrote no stack"

    def log_tail(self) -> str:
        """Return the end of what the worker printed."""
        return self._log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:] if self._log.exists() else ""

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, log: Path, stacks: Path) -> None:
    """The worker's life: one call after another until the parent's end of the pipe closes."""
    with log.open("w") as output, stacks.open("w") as stacks_file:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
        import torch

        torch.set_num_threads(1)
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            reply = _answer(message)
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(reply)


def _answer(message: bytes) -> bytes:
    """Do one call; return the pickled ``(True, result)`` or ``(False, exception, traceback)``."""
    before = dict(os.environ)
    try:
        environment, function, args = pickle.loads(message)
        os.environ.update(environment)
        reply = pickle.dumps((True, function(*args)))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            reply = pickle.dumps((False, error, text))
            pickle.loads(reply)  # some exceptions pickle but do not unpickle
        except Exception:
            reply = pickle.dumps((False, RanksFailed(repr(error)), text))
    finally:
        _take_down_process_group()
        os.environ.clear()
        os.environ.update(before)
    gc.collect()
    gc.freeze()  # modules stay: the next collections need not go through them, which takes most of a short call
    return reply


def _take_down_process_group() -> None:
    engine = sys.modules.get("pretrain.training.engine")
    if engine is not None:
        engine.shutdown_distributed()  # also makes DeepSpeed forget its groups
    elif "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()


def _first_failure(replies: dict[int, tuple], workers: list[_Worker]) -> BaseException:
    """Return the exception that came first (later ones are often its echo), with every failed rank's traceback."""
    failed = [rank for rank in replies if not replies[rank][0]]
    error = replies[failed[0]][1]
    for rank in failed:
        error.add_note(f"--- rank {rank}:\n{replies[rank][2]}{workers[rank].log_tail()}")
    return error


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
