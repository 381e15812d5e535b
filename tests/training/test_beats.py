"""What the ranks' beats say: who hangs, who is gone, who is only slow."""

import threading
import time

import pytest

from pretrain.training.beats import PATIENCE, Beat, Progress, Pulse, judge, laggard

LIMIT = 8.0
NOW = dict.fromkeys(range(3), 0.5)


def beat(calls: int = 7, *, waiting=False, still=0.0, busy=0.0, standstill=LIMIT, ended=False) -> Beat:
    return Beat(5, calls, f"in place_{calls}", waiting, still, max(still, busy), standstill, 80.0, ended)


WAITING, COMPUTING = beat(waiting=True, still=9.0), beat()


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        ({0: COMPUTING, 1: COMPUTING, 2: COMPUTING}, None),
        ({0: WAITING, 1: COMPUTING, 2: WAITING}, None),
        ({0: WAITING, 1: beat(6, still=8.1), 2: WAITING}, "rank 1 is hanging for 8 s in place_6"),
        ({0: WAITING, 1: beat(6, still=7.9), 2: WAITING}, None),
        ({0: WAITING, 1: beat(6, still=70.0, standstill=80.0), 2: WAITING}, None),
        ({0: WAITING, 1: WAITING, 2: beat(busy=81.0)}, "rank 2 is hanging for 81 s"),
        ({0: WAITING, 1: WAITING, 2: beat(busy=79.0)}, None),
        ({0: beat(9, still=9.0), 1: beat(4, still=30.0), 2: beat(4, still=30.0)}, "ranks 1, 2 are hanging for 30 s"),
        ({0: WAITING, 1: WAITING, 2: WAITING}, "wait for each other: rank 0 in place_7; rank 1 in place_7"),
        ({0: WAITING, 1: WAITING, 2: beat(waiting=True, still=1.0)}, None),
        ({0: beat(still=30.0, ended=True), 1: COMPUTING, 2: COMPUTING}, None),
        ({0: beat(still=30.0, ended=True), 1: WAITING, 2: WAITING}, "wait for each other"),
        ({}, None),
    ],
)
def test_who_keeps_the_others_from_going_on_is_named(beats, words):
    line = judge(beats, NOW, LIMIT)
    assert line is None if words is None else words in line


def test_a_silent_rank_is_named_before_those_that_wait_for_it():
    silent = {0: 0.2, 1: 8.2, 2: 0.2}
    assert judge({0: WAITING, 1: COMPUTING, 2: WAITING}, silent, LIMIT).startswith("rank 1 is silent for 8 s")
    assert judge({0: COMPUTING, 1: beat(ended=True), 2: COMPUTING}, silent, LIMIT) is None


def test_a_slow_rank_is_named_and_not_ended():
    beats = {0: beat(waiting=True, still=4.5), 1: beat(6), 2: COMPUTING}
    assert judge(beats, NOW, LIMIT) is None
    assert laggard(beats, LIMIT) == "others have waited 4 s for rank 1, which is in place_6"
    assert laggard({0: beat(waiting=True, still=3.5), 1: beat(6)}, LIMIT) is None
    assert laggard({0: WAITING, 1: WAITING}, LIMIT) is None


def test_patience_with_a_rank_that_computes_follows_the_steps_but_for_what_takes_long():
    progress = Progress()

    def step(seconds: float) -> None:
        progress.begin_step()
        progress.since -= seconds  # as if the forward pass had taken so long
        progress.end_step()

    for _ in range(3):
        assert progress.patience_seconds(LIMIT) == PATIENCE * LIMIT
        step(0.4)
    assert progress.patience_seconds(LIMIT) == LIMIT
    assert progress.standstill_seconds(LIMIT) == LIMIT
    progress.expect_long()
    assert progress.patience_seconds(LIMIT) == progress.standstill_seconds(LIMIT) == PATIENCE * LIMIT
    progress.since -= 50.0
    step(3.0)
    assert progress.patience_seconds(LIMIT) == pytest.approx(30, abs=1)
    step(100.0)
    assert progress.patience_seconds(LIMIT) == PATIENCE * LIMIT


def watched(body) -> tuple[Pulse, threading.Thread, threading.Event]:
    """Run ``body(event)`` in a thread and return its pulse once it has begun."""
    made, begun, event = [], threading.Event(), threading.Event()

    def run() -> None:
        made.append(Pulse(LIMIT, Progress()))
        begun.set()
        body(event)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun.wait()
    return made[0], thread, event


def test_a_thread_that_stands_still_is_told_from_one_that_computes():
    pulse, thread, event = watched(lambda event: event.wait())
    before = pulse.beat()
    while (after := pulse.beat()).still_seconds == 0:
        time.sleep(0.01)
    assert "wait" in after.place and after.number > before.number and not after.waiting
    while pulse.beat().still_seconds < 0.5:
        time.sleep(0.01)
    pulse.restart()
    assert pulse.beat().still_seconds < 0.5
    event.set()
    thread.join()

    pulse, thread, event = watched(lambda event: [None for _ in iter(event.is_set, True)])
    assert any(pulse.beat().still_seconds == 0 for _ in range(500) if not time.sleep(0.01))  # it may wait for its turn
    event.set()
    thread.join()
