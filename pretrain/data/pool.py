"""Work shared out over processes, with results in order and the death of a process seen at once."""

import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
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
    context = get_context("spawn")  # a forked child would inherit the locks of other threads
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
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(start, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            idle.put(ours)
        yield lambda item: threads.submit(call, item)
    finally:
        for process in processes:
            process.kill()  # done or to be stopped at once: either way there is nothing for it to tidy up
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _serve(start: Start, connection: Connection) -> None:
    """Answer items with (whether it went well, result or exception) until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent sees to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = start()
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
        except BrokenPipeError:
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
