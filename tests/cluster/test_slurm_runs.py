"""Runs under a real SLURM: submitted, warned, requeued, resumed; see slurm.py for the cluster."""

import contextlib
import io
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml

from pretrain.cli import main
from pretrain.slurm import TEMPLATE
from tests.cluster.slurm import Slurm, missing
from tests.training.runs import DS, metrics, recipe, states, write_corpus

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


def job_script(folder: Path, corpus: Path, *overrides: str, nodes: int = 2, options: tuple[str, ...] = ()) -> Path:
    """Write a recipe and the script that the command prints for it, with one rank a node."""
    folder.mkdir()
    document = recipe(corpus, folder / "run", training__steps=STEPS, checkpoint__interval_steps=STEPS)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    asked = ["--nodes", str(nodes), "--gpus", "0", "--cpus-per-task", "1", "--time", "120", *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["slurm", *asked, str(folder / "recipe.yaml"), *overrides]) == 0
    (folder / "job.sbatch").write_text(printed.getvalue())
    return folder / "job.sbatch"


# Node names of one machine lead to one network device.
VARIABLES = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def start(slurm: Slurm, script: Path) -> int:
    return slurm.submit(script, **VARIABLES)


def trained_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def whole(slurm, corpus, tmp_path_factory) -> Path:
    """The run of a job that nothing happens to."""
    script = job_script(tmp_path_factory.mktemp("whole") / "job", corpus)
    job = start(slurm, script)
    ended = slurm.ended(job, LIMIT_SECONDS)
    output = (script.parent / f"{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), output
    return script.parent / "run"


def assert_the_same(run: Path, whole: Path) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    assert states(run / last) == states(whole / last) != {}
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))


def test_a_requeued_job_ends_with_the_weights_of_an_uninterrupted_one_bit_for_bit(slurm, corpus, whole, tmp_path):
    script = job_script(tmp_path / "broken", corpus)
    job = start(slurm, script)
    slurm.wait(lambda: trained_steps(script.parent / "run") >= 3, LIMIT_SECONDS)
    slurm.run("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", str(job))
    ended = slurm.ended(job, LIMIT_SECONDS)
    text = (script.parent / f"{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert "2 ranks" in text and "stopped on request after step" in text and "going on from" in text
    assert_the_same(script.parent / "run", whole)


def test_a_job_whose_rank_is_killed_goes_back_into_the_queue_and_on_by_itself(slurm, corpus, whole, tmp_path):
    script = job_script(tmp_path / "killed", corpus, "checkpoint.interval_steps=2")
    job = start(slurm, script)
    slurm.wait(lambda: trained_steps(script.parent / "run") >= 3, LIMIT_SECONDS)
    recipe_file = str(script.parent / "recipe.yaml")
    ranks = [each for each in psutil.process_iter(["cmdline", "name"]) if recipe_file in (each.info["cmdline"] or ())]
    next(each for each in ranks if each.info["name"].startswith("python")).kill()
    ended = slurm.ended(job, LIMIT_SECONDS)
    text = (script.parent / f"{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert "back into the queue; last checkpoint: step-" in text and "going on from" in text
    assert_the_same(script.parent / "run", whole)


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


def test_seeds_of_an_array_run_apart_and_links_of_a_chain_one_after_another(slurm, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where jobs that the script itself submits leave their output
    script = job_script(
        tmp_path / "seeds", corpus, "training.steps=4", nodes=1, options=("--array", "0-1", "--chain", "2")
    )
    assert len(slurm.run("bash", str(script), **VARIABLES).split()) == 2
    slurm.wait(lambda: slurm.run("squeue", "-h") == "", LIMIT_SECONDS)
    outputs = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    records = [metrics(script.parent / "run" / f"seed-{seed}") for seed in range(2)]
    assert [[record["step"] for record in each] for each in records] == [[1, 2, 3, 4]] * 2, outputs
    assert records[0][0]["sample_ids_sha256"] != records[1][0]["sample_ids_sha256"]
    assert sorted(text.count("step-00000004\n") for text in outputs if "going on from" in text) == [1, 1], outputs


def test_the_deepspeed_launcher_runs_on_all_nodes_of_an_allocation(slurm, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = job_script(tmp_path / "job", corpus, "training.steps=4")
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    allocation = ["salloc", "--nodes=2", "--ntasks-per-node=1", str(TEMPLATE.with_name("launch.sh"))]
    train = ["--ds_config", str(DS / "cpu.json"), "--config", str(script.parent / "recipe.yaml"), "training.steps=4"]
    output = slurm.run(*allocation, *train, limit_seconds=LIMIT_SECONDS, SLOTS="1", PATH=path, **VARIABLES)
    assert "2 ranks" in output and trained_steps(script.parent / "run") == 4, output
    assert not list(tmp_path.glob("hostfile-*"))
