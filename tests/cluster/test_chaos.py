"""A run that is killed again and again ends as one that is not."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from pretrain.training.checkpoint import candidates, verify
from tests.cluster.launched import LIMIT_SECONDS, Launched
from tests.training.runs import metrics, recipe, states, write_corpus

STEPS, KILLS = 200, 20
MOMENTS = {"starting": 2, "training": 10, "saving": 8}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Life:
    """One start of a run's ranks, after others."""

    def __init__(self, launched: Launched, run: Path, former_pids: set[int]):
        self.launched, self.metrics, self.saves = launched, run / "metrics.jsonl", run / "checkpoints"
        self.file = self._inode()  # a run that goes on writes the steps it keeps to a new file
        self.wait(lambda: len(self._ranks(former_pids)) == 2)
        self.ranks = self._ranks(former_pids)

    def wait_for(self, moment: str, steps: int) -> None:
        """Wait until the ranks are starting, have trained some steps, or are writing a checkpoint."""
        if moment == "starting":
            return
        self.wait(lambda: self._inode() != self.file)
        done = self._steps()
        self.wait(lambda: self._steps() >= done + steps)
        if moment == "saving":
            self.wait(lambda: any(self.saves.glob("*.partial")))

    def wait(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition() and self.launched.process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _ranks(self, former_pids: set[int]) -> dict:
        return {rank: each for rank, each in self.launched.ranks().items() if each.pid not in former_pids}

    def _inode(self) -> int:
        return self.metrics.stat().st_ino if self.metrics.exists() else 0

    def _steps(self) -> int:
        return self.metrics.read_bytes().count(b"\n")


def test_a_run_killed_twenty_times_loses_no_sample_and_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    changes = {"objectives": {"mlm": {}, "rtd": {}}, "sampler": {"name": "proportional"}, "heldout__rows": 0}
    changes |= {"training__steps": STEPS, "checkpoint__interval_steps": 7, "log__interval_steps": 10}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Launched(recipe(corpus, whole, **changes)).finish()[0] == 0

    dice, pids = random.Random(11), set()
    moments = dice.sample(list(MOMENTS), counts=list(MOMENTS.values()), k=KILLS)
    launched = Launched(recipe(corpus, run, **changes), restarts=KILLS)
    for moment in moments:
        life = Life(launched, run, pids)
        life.wait_for(moment, dice.randint(1, 16))
        assert launched.process.poll() is None, launched.finish()
        life.ranks[dice.randrange(2)].kill()
        pids |= {each.pid for each in life.ranks.values()}
    code, output = launched.finish()
    assert code == 0, output
    assert output.count("was killed by SIGKILL; starting again") == KILLS

    last = f"checkpoints/step-{STEPS:08d}"
    assert states(run / last) == states(whole / last) != {}
    seen, expected = metrics(run), metrics(whole)
    assert [record["step"] for record in seen] == list(range(1, STEPS + 1))
    for name in ("sample_ids_sha256", "tokens_seen", "plan", "losses", "grad_norm"):
        assert [record[name] for record in seen] == [record[name] for record in expected], name
    assert not list((run / "checkpoints").glob("*.partial")) and all(verify(each) for each in candidates(run))
    print(f"killed: {Counter(moments)}")
