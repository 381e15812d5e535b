"""The training command as a user starts it: under the deepspeed launcher, in its own processes."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.training.runs import DS, metrics, recipe, states, write_corpus

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240


def start(document: dict, *arguments: str) -> subprocess.Popen:
    """Start a run on two ranks; its output comes through one pipe."""
    path = Path(document["run"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    port = ["--master_port", str(29600 + os.getpid() % 400)]
    train = ["launch/train.py", "--ds_config", str(DS / "cpu.json"), "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*launcher, *port, *train, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen) -> str:
    """Return all of a run's output once it has ended."""
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    return output


def wait_for(process: subprocess.Popen, word: str) -> str:
    """Read a run's output until a line holds ``word``; return what was read."""
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"the run ended without '{word}':\n{seen}")


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the ranks of a run, in rank order."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        local_rank = next((word for word in words if word.startswith("--local_rank=")), None)
        if local_rank is not None and "deepspeed.launcher.launch" not in words:
            ranks[int(local_rank.partition("=")[2])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def shared_memory() -> set[str]:
    """Return the files that DeepSpeed's shared-memory collectives would leave."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("*") if not path.name.startswith("sem.")} if folder.is_dir() else set()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """An uninterrupted run of twelve steps, saved at every fourth."""
    run = tmp_path_factory.mktemp("whole") / "run"
    before = shared_memory()
    process = start(long_recipe(corpus, run))
    output = finish(process)
    assert process.returncode == 0, output
    assert shared_memory() <= before
    return run


def long_recipe(corpus: Path, run: Path) -> dict:
    return recipe(corpus, run, training__steps=12, checkpoint__interval_steps=4, checkpoint__keep=9)


@pytest.mark.slow
def test_a_run_killed_with_sigkill_goes_on_bit_identically_with_the_same_command(corpus, whole_run, tmp_path):
    document = long_recipe(corpus, tmp_path / "run")
    process = start(document)
    wait_for(process, "step 7/12")
    rank_processes(process)[1].kill()
    finish(process)
    assert process.returncode != 0
    process = start(document)
    output = finish(process)
    assert process.returncode == 0, output
    assert "going on from" in output and "step-00000004" in output
    last = "checkpoints/step-00000012"
    assert states(tmp_path / "run" / last) == states(whole_run / last)
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_a_save_and_leaves_no_process(corpus, tmp_path):
    process = start(long_recipe(corpus, tmp_path / "run"))
    output = wait_for(process, "step 2/12")
    ranks = rank_processes(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGINT)
    output += finish(process)
    assert process.returncode == 0, output
    assert "stopped on request after step" in output
    steps = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_user_error_reaches_the_shell_as_exit_code_two_and_one_line(corpus, tmp_path):
    process = start(recipe(corpus, tmp_path / "run"), "training.stepz=3")
    output = finish(process)
    assert process.returncode == 2
    ours = [line for line in output.splitlines() if line.startswith("train:")]
    assert len(ours) == 1 and "training.stepz" in ours[0] and "did you mean 'steps'" in ours[0]
    assert "Traceback" not in output


@pytest.mark.parametrize("result", ["2", "sys.exit(2)"])
def test_a_script_leaves_word_of_a_users_mistake_and_the_first_rank_of_a_machine_time_to_tell(tmp_path, result):
    program = f"""
import sys, time
from pretrain.training.script import leave
time.sleep = lambda seconds: print(f"waits {{seconds:.0f}} s", flush=True)
leave(lambda: {result})
"""
    mark = tmp_path / "mistake"
    outputs = []
    for rank in ("0", "1"):
        environment = os.environ | {"LOCAL_RANK": rank, "MEDLEY_MISTAKE": str(mark)}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 2 and mark.exists()
        outputs.append(done.stdout)
        mark.unlink()
    assert outputs == ["", "waits 10 s\n"]
