"""Fixtures shared by all tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed import RankPool


@pytest.fixture(scope="session")
def _rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(_rank_pool: RankPool) -> Callable[..., list]:
    """``ranks(function, *args, world_size=2) -> [result of rank 0, …]``; see tests/distributed.py."""
    return _rank_pool.run
