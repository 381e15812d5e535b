"""Work shared out over processes, with results in order and the death of a process seen at once."""

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Start = Callable[[], Callable[[Item], Result]]

HELD_PER_WORKER = 3  # items handed out whose results are not yet taken: one at work, one waiting, one done


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(start: Start, items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield the result of each item, in the order of the items, worked out by ``workers`` processes.

    Each process calls ``start`` once and what that returns with each item; all three must be picklable. With one
    worker the work is done in this process. At most ``HELD_PER_WORKER`` items a worker are held at a time.

    Raises:
        RuntimeError: if a worker process dies.
        Exception: whatever the work raises.
    """
    if workers == 1:
        with _one_thread():
            yield from map(start(), items)
        return
    with _pool(start, workers) as submit:
        held: deque = deque()
        for item in items:
            held.append(submit(item))
            if len(held) == HELD_PER_WORKER * workers:
                yield held.popleft().result()
        while held:
            yield held.popleft().result()


@contextmanager
def _pool(start: Start, workers: int) -> Iterator[Callable]:
    """Give a function that hands an item to the next idle worker and returns a future of its result.

    Each worker has a pipe of its own and shares nothing, so that its death is seen as the end of its pipe, and the
    death of this process likewise by the workers. A thread waits at each pipe.
    """
    processes = []
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def call(item):
        connection = idle.get()
        try:
            connection.send(item)
            succeeded, answer = connection.recv()
        except (EOFError, OSError):
            raise RuntimeError("a worker process died; if memory ran out, fewer --workers need less") from None
        finally:
            idle.put(connection)
        if not succeeded:
            raise answer
        return answer

    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            with theirs:
                processes.append(_worker(theirs.fileno()))
            ours.send(start)
            idle.put(ours)
        yield lambda item: threads.submit(call, item)
    finally:
        for process in processes:
            process.kill()  # done or to be stopped at once: either way there is nothing for it to tidy up
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
        while not idle.empty():
            idle.get().close()


def _worker(descriptor: int) -> subprocess.Popen:
    """Start a worker with its end of a pipe.

    It is a process from scratch: a forked one would inherit the locks of other threads, and multiprocessing's spawned
    one would import the main script again, with all that imports. In a session of its own Ctrl-C does not reach it.
    """
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import pretrain.data.pool as pool; "
    command = [sys.executable, "-c", code + "pool.serve(int(sys.argv[1]))", str(descriptor), json.dumps(sys.path)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, pass_fds=[descriptor], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )


def serve(descriptor: int) -> None:
    """Be a worker: answer items with (whether it went well, result or exception) until the pipe ends."""
    connection = Connection(descriptor)
    work = connection.recv()()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = True, work(item)
        except Exception as error:  # told to the parent, which raises it
            answer = False, error
        try:
            connection.send(answer)
        except OSError:  # the parent has ended
            return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep tokenizers to this one thread, as in a worker."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
