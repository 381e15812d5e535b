"""Runs over two nodes that a network joins, and what becomes of one when the network fails; see netns.py."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from pretrain.training.start import free_port
from tests.cluster.netns import ROOT, Nodes, missing, traffic
from tests.training.runs import DS, metrics, recipe, states, write_corpus

STEPS, INTERVAL_STEPS = 30, 6
TIMEOUT_SECONDS = 15
LIMIT_SECONDS = 600  # a start imports much, and CI may be busy; a run that waits for a lost link waits longer
POLL_SECONDS = 0.05

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes():
    """Two nodes for the module's tests, or a skip that says what is missing; nothing is left of them."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="nodes-") as folder:
        with Nodes(Path(folder)) as pair:
            yield pair
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert not set(pair.names) & set(left.split())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def arguments(folder: Path, corpus: Path) -> list[str]:
    """Write a recipe; return what trains it."""
    folder.mkdir(exist_ok=True)
    changes = {"objectives": {"mlm": {}, "rtd": {}}, "sampler": {"name": "proportional"}, "heldout__rows": 0}
    document = recipe(
        corpus, folder / "run", training__steps=STEPS, checkpoint__interval_steps=INTERVAL_STEPS, **changes
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    config, path = DS / "cpu.json", folder / "recipe.yaml"
    return ["--ds_config", str(config), "--config", str(path), "--timeout", str(TIMEOUT_SECONDS)]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The same run by two ranks of one machine, without a network."""
    folder = tmp_path_factory.mktemp("whole")
    ours = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ours |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "launch/train.py", *arguments(folder, corpus)]
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **ours, "RANK": rank, "LOCAL_RANK": rank}
        with open(folder / f"rank-{rank}.txt", "w") as file:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    assert ended(ranks) == [0, 0], outputs(folder)
    return folder / "run"


def ended(ranks: list[subprocess.Popen]) -> list[int]:
    """Wait for both ranks; return their exit codes."""
    return [rank.wait(LIMIT_SECONDS) for rank in ranks]


def outputs(folder: Path) -> list[str]:
    """Return what each rank has printed."""
    return [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)]


def wait_for_steps(run: Path, steps: int, ranks: list[subprocess.Popen]) -> None:
    """Wait until a run that goes on has done so many steps."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < steps:
        assert all(rank.poll() is None for rank in ranks), outputs(run.parent)
        assert time.monotonic() < deadline, outputs(run.parent)
        time.sleep(POLL_SECONDS)


def assert_the_same(run: Path, whole: Path) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    assert states(run / last) == states(whole / last) != {}
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))


def test_two_nodes_end_with_the_weights_of_one_machine_bit_for_bit(nodes, corpus, whole, tmp_path):
    before = traffic(nodes.names[1])
    ranks = nodes.train(tmp_path, *arguments(tmp_path, corpus))
    assert ended(ranks) == [0, 0], outputs(tmp_path)
    assert_the_same(tmp_path / "run", whole)
    told = [record["losses"] for record in metrics(tmp_path / "run")]
    assert told == [record["losses"] for record in metrics(whole)]
    assert (traffic(nodes.names[1]) - before).sent > 100_000 * STEPS  # it went through the cable


def test_a_cut_link_ends_both_ranks_and_the_run_goes_on_when_it_is_mended(nodes, corpus, whole, tmp_path):
    command = arguments(tmp_path, corpus)
    ranks = nodes.train(tmp_path, *command)
    wait_for_steps(tmp_path / "run", INTERVAL_STEPS + 3, ranks)
    nodes.cut()
    try:
        assert ended(ranks) == [1, 1], outputs(tmp_path)
    finally:
        nodes.mend()
    assert len(metrics(tmp_path / "run")) < STEPS
    for rank, text in enumerate(outputs(tmp_path)):  # each node has one that tells: they cannot agree on who does
        failed = [line for line in text.splitlines() if line.startswith("train: failed:")]
        assert len(failed) == 1 and f"rank {1 - rank}" in failed[0] and "Traceback" not in text, text
    assert ended(nodes.train(tmp_path, *command)) == [0, 0], outputs(tmp_path)
    assert f"going on from {tmp_path}/run/checkpoints/step-" in outputs(tmp_path)[0]
    assert_the_same(tmp_path / "run", whole)
