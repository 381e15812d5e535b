"""Runs under a real SLURM: submitted, warned, requeued, resumed; see slurm.py for the cluster."""

import contextlib
import io
import signal
import tempfile
from pathlib import Path

import pytest
import yaml

from pretrain.cli import main
from tests.cluster.slurm import Slurm, missing
from tests.training.runs import metrics, recipe, states, write_corpus

LIMIT_SECONDS = 1800  # a start imports much, and CI may be busy
STEPS = 40

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm():
    """A cluster of two nodes for the module's tests, or a skip that says what is missing."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # pytest's own paths are too long for a socket
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def job_script(folder: Path, corpus: Path, *options: str) -> Path:
    """Write a recipe and the script that the command prints for it: two nodes with one rank each."""
    folder.mkdir()
    document = recipe(corpus, folder / "run", training__steps=STEPS, checkpoint__interval_steps=STEPS)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    asked = ["--nodes", "2", "--gpus", "0", "--cpus-per-task", "1", "--time", "120", *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["slurm", *asked, str(folder / "recipe.yaml")]) == 0
    (folder / "job.sbatch").write_text(printed.getvalue())
    return folder / "job.sbatch"


def start(slurm: Slurm, script: Path) -> int:
    # Node names of one machine lead to one network device.
    return slurm.submit(script, DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")


def trained_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def test_a_requeued_job_ends_with_the_weights_of_an_uninterrupted_one_bit_for_bit(slurm, corpus, tmp_path):
    whole, broken = job_script(tmp_path / "whole", corpus), job_script(tmp_path / "broken", corpus)
    job = start(slurm, broken)
    output = broken.parent / f"{job}.out"
    slurm.wait(lambda: trained_steps(broken.parent / "run") >= 3, LIMIT_SECONDS)
    slurm.run("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", str(job))
    ended = slurm.ended(job, LIMIT_SECONDS)
    text = output.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert "2 ranks" in text and "stopped on request after step" in text and "going on from" in text
    job = start(slurm, whole)
    ended = slurm.ended(job, LIMIT_SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), (whole.parent / f"{job}.out").read_text()
    last = f"run/checkpoints/step-{STEPS:08d}"
    assert states(broken.parent / last) == states(whole.parent / last) != {}
    assert [record["step"] for record in metrics(broken.parent / "run")] == list(range(1, STEPS + 1))


def test_a_users_mistake_and_a_cancelled_job_stay_out_of_the_queue(slurm, corpus, tmp_path):
    wrong, cancelled = job_script(tmp_path / "wrong", corpus), job_script(tmp_path / "cancelled", corpus)
    (wrong.parent / "recipe.yaml").write_text("run: run\n")
    job = start(slurm, wrong)
    ended = slurm.ended(job, LIMIT_SECONDS)
    text = (wrong.parent / f"{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text
    assert "train: error:" in text and "Traceback" not in text
    job = start(slurm, cancelled)
    slurm.wait(lambda: slurm.job(job)["JobState"] == "RUNNING")
    slurm.run("scancel", str(job))
    ended = slurm.ended(job, LIMIT_SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
