"""The work of one process of ``medley prepare``: a batch of text to samples; and the pool that shares it out."""

import os
import queue
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
from tokenizers import Tokenizer

from pretrain.data.splitting import cut_tokens

BATCHES_PER_WORKER = 3  # handed out and not yet written: one at work, one waiting, one done


@dataclass(frozen=True)
class Samples:
    """``tokens [sum of lengths]`` uint32, ``lengths [samples]`` int64, and how many texts were too short for one."""

    tokens: np.ndarray
    lengths: np.ndarray
    too_short: int


@dataclass(frozen=True)
class SampleMaker:
    """Turns text into samples. Plain data, so that it can be sent to a process.

    Args:
        tokenizer_file: path of a ``tokenizer.json``.
        before, after: special ids at a sample's start and end.
        barred: ids that text must not become; they turn into ``unknown``, or into nothing where that is None.
        capacity, minimum: the most and the fewest tokens of text in a sample.
    """

    tokenizer_file: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    barred: frozenset[int]
    unknown: int | None
    capacity: int
    minimum: int

    def load(self) -> Tokenizer:
        """Return the tokenizer, set to take literal special tokens in text ("[MASK]") for text."""
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def samples(self, tokenizer: Tokenizer, texts: list[str]) -> Samples:
        """Tokenise ``texts``, each for itself, and divide them into samples."""
        before, after = list(self.before), list(self.after)
        ids: list[int] = []
        lengths: list[int] = []
        too_short = 0
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens = encoding.ids
            clean = self.barred.isdisjoint(tokens)
            spans = cut_tokens(text, encoding, self.capacity, self.minimum)
            too_short += not spans
            for start, end in spans:
                sample = before + (tokens[start:end] if clean else self._without_barred(tokens[start:end])) + after
                ids += sample
                lengths.append(len(sample))
        return Samples(np.array(ids, np.uint32), np.array(lengths, np.int64), too_short)

    def _without_barred(self, tokens: list[int]) -> list[int]:
        if self.unknown is None:
            return [token for token in tokens if token not in self.barred]
        return [self.unknown if token in self.barred else token for token in tokens]


def in_order(
    maker: SampleMaker, batches: Iterable[tuple[list[str], str]], workers: int
) -> Iterator[tuple[Samples, str]]:
    """Yield (samples, tag) for each (texts, tag) of ``batches``, in order, made by ``workers`` processes.

    With one worker the work is done in this process. At most ``BATCHES_PER_WORKER`` batches a worker are held.

    Raises:
        RuntimeError: if a worker process dies.
    """
    if workers == 1:
        with _single_threaded():
            tokenizer = maker.load()
            for texts, tag in batches:
                yield maker.samples(tokenizer, texts), tag
        return
    with _pool(maker, workers) as submit:
        held: deque = deque()
        for texts, tag in batches:
            held.append((submit(texts), tag))
            if len(held) == BATCHES_PER_WORKER * workers:
                future, first = held.popleft()
                yield future.result(), first
        for future, tag in held:
            yield future.result(), tag


@contextmanager
def _pool(maker: SampleMaker, workers: int) -> Iterator:
    """Give a function that hands texts to the next idle worker and returns a future of its samples.

    Each worker has a pipe of its own and nothing shared, so that the death of one is seen as the end of its pipe,
    at once; and the death of this process likewise, by the workers. A thread waits at each pipe.
    """
    context = get_context("spawn")  # a forked child would inherit other threads' locks
    processes = []
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def call(texts: list[str]) -> Samples:
        connection = idle.get()
        try:
            connection.send(texts)
            answer = connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(
                "a worker process died (was it killed for want of memory?); fewer --workers need less"
            ) from None
        finally:
            idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(maker, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            idle.put(ours)
        yield lambda texts: threads.submit(call, texts)
    finally:
        for process in processes:
            process.kill()  # done or to be stopped at once: either way there is nothing for it to tidy up
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _serve(maker: SampleMaker, connection: Connection) -> None:
    """Answer texts with samples until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent sees to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = maker.load()
    while True:
        try:
            texts = connection.recv()
        except EOFError:
            return
        try:
            answer = maker.samples(tokenizer, texts)
        except Exception as error:  # told to the parent, which raises it
            answer = error
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


@contextmanager
def _single_threaded() -> Iterator[None]:
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
