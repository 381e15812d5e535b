"""The pool of ranks that other tests stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankPool, RanksFailed


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    dist.init_process_group("gloo")
    value = torch.tensor([dist.get_rank() + offset], dtype=torch.float64)
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.getpid()


def _fail_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise KeyError("rank one's own error")
    dist.destroy_process_group()


def _hang_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(3600)


def _die() -> None:
    os._exit(7)


def test_results_come_in_rank_order_and_workers_are_kept(ranks):
    first, second = ranks(_sum_of_ranks, 10), ranks(_sum_of_ranks, 20)
    assert [result[:2] for result in first] == [(0, 21.0), (1, 21.0)]
    assert [result[:2] for result in second] == [(0, 41.0), (1, 41.0)]
    assert [result[2] for result in first] == [result[2] for result in second]


def test_one_rank_alone_works(ranks):
    assert ranks(_sum_of_ranks, 5, world_size=1)[0][:2] == (0, 5.0)


def test_an_exception_of_a_rank_is_raised_with_its_traceback(ranks):
    with pytest.raises(KeyError, match="rank one's own error") as caught:
        ranks(_fail_on_rank_one)
    assert "_fail_on_rank_one" in "".join(caught.value.__notes__)


def test_a_hang_and_a_death_are_failures_that_name_the_place_and_leave_no_process():
    pool = RankPool()
    try:
        with pytest.raises(RanksFailed, match="_hang_on_rank_zero"):
            pool.run(_sum_of_ranks, 0)  # the workers are up before the short limit below counts
            pool.run(_hang_on_rank_zero, time_limit_seconds=1.0)
        with pytest.raises(RanksFailed, match="exit code 7"):
            pool.run(_die, world_size=1)
        (_, _, pid) = pool.run(_sum_of_ranks, 0, world_size=1)[0]
    finally:
        pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
