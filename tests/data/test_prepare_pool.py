"""Work shared out over processes. Workers import this file, so it imports little."""

import os
import signal
import threading

import pytest

from pretrain.data.pool import in_order


def work_or_die():
    """A worker's start: squares numbers, dies of 13, fails at 17."""

    def work(number):
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 17:
            raise ValueError("seventeen")
        return number * number

    return work


def test_work_shared_out_comes_back_in_order():
    for workers in (1, 3):
        assert list(in_order(work_or_die, iter(range(10)), workers)) == [i * i for i in range(10)]
    assert list(in_order(work_or_die, [], 2)) == []


def test_the_death_of_a_worker_is_an_error_at_once_and_leaves_no_process():
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="a worker process died"):
        for _ in in_order(work_or_die, (number % 14 for number in range(10_000)), 2):
            pass
    with pytest.raises(ValueError, match="seventeen"):
        list(in_order(work_or_die, [1, 17, 2], 2))
    assert threading.active_count() == threads
