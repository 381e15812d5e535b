"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are defined, so before anything of ours is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.distributed import RankPool


def pytest_configure() -> None:
    """Take SIGINT back where the suite was started in the background, so that tests of Ctrl-C mean the same there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST_FILES = ("test_readme.py", "test_launch.py", "test_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one of them when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The session's pool of rank processes, for fixtures that outlive a test; tests take ``ranks``."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(rank_pool: RankPool) -> Callable[..., list]:
    """``ranks(function, *args, world_size=2) -> [result of rank 0, …]``; see tests/distributed.py."""
    return rank_pool.run
