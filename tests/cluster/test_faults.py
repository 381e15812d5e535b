"""What goes wrong in one rank ends all of them soon, is told in one line, and costs nothing but time.

With ``-s`` it prints how long a fault took to be told, and from there to the next step (docs/reliability.md).
"""

import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cluster.launched import Launched
from tests.training.runs import metrics, recipe, states, write_corpus

STEPS = 12
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def document(corpus: Path, run: Path) -> dict:
    changes = {"objectives": {"mlm": {}, "rtd": {}}, "sampler": {"name": "proportional"}, "heldout__rows": 0}
    return recipe(corpus, run, training__steps=STEPS, checkpoint__interval_steps=4, **changes)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = Launched(document(corpus, run)).finish()
    assert code == 0, output
    return run


def failures(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("train: failed:")]


def shared_memory() -> set[str]:
    """Return what lies in shared memory, but for the locks of other programs' processes."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def assert_the_same(run: Path, whole: Path) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    assert states(run / last) == states(whole / last) != {}
    ids = [[record["step"], record["sample_ids_sha256"]] for record in metrics(run)]
    assert ids == [[record["step"], record["sample_ids_sha256"]] for record in metrics(whole)]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hang:1:6", "rank 1 is hanging for"),
        ("hang:0:6", "rank 0 is hanging for"),
        ("spin:1:6", "rank 1 is hanging for"),
        ("freeze:1:6", "rank 1 is silent for"),
        ("freeze:0:6", "rank 0 is silent for"),
        ("die:1:6", "rank 1 is gone"),
        ("die:0:6", "rank 0 is gone"),
        ("vanish:1:7", "rank 1 is gone"),  # while a checkpoint is saved
        ("full:1:6", "rank 1: metrics.jsonl: No space left on device"),
        ("crash:1:6", None),
    ],
)
def test_a_fault_in_a_rank_is_told_by_name_and_the_run_goes_on_by_itself(corpus, whole, tmp_path, fault, told):
    kind, rank, _ = fault.split(":")
    shared_before = shared_memory()
    launched = Launched(document(corpus, tmp_path / "run"), restarts=1, MEDLEY_FAULT=fault)
    code, output = launched.finish()
    failed = failures(output)
    assert code == 0, output
    if told is None:
        assert failed == [] and output.count("ZeroDivisionError: a defect") == output.count("Traceback") == 1
    else:
        assert len(failed) == 1 and told in failed[0] and "Traceback" not in output, output
    assert "starting again (1 of 1)" in output and "going on from" in output
    assert_the_same(tmp_path / "run", whole)
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]
    assert shared_memory() <= shared_before
    print_times(fault, (tmp_path / "run" / f"fault-{kind}").stat().st_mtime, launched.lines)
    if kind in ("hang", "spin"):
        stacks = (tmp_path / "run" / "stacks" / f"rank-{int(rank):05d}.txt").read_text()
        assert f"in {kind}" in stacks


def print_times(fault: str, met: float, lines: list[tuple[float, str]]) -> None:
    ended = next(when for when, line in lines if "starting again" in line)
    told = next((when for when, line in lines if line.startswith("train: failed:")), ended)
    on = next(when for when, line in lines if when > ended and line.startswith("step "))
    print(f"\n{fault}: told after {told - met:.1f} s, all ranks ended {ended - met:.1f} s, next step {on - met:.1f} s")


def test_a_slow_rank_is_named_and_waited_for(corpus, whole, tmp_path):
    code, output = Launched(document(corpus, tmp_path / "run"), MEDLEY_FAULT="lag:1:6").finish()
    assert code == 0 and "others have waited" in output and "for rank 1, which is in lag" in output
    assert_the_same(tmp_path / "run", whole)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 9 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def assert_fails(document: dict, told: str, **variables: str) -> None:
    """Run what fails, with one line that says why."""
    code, output = Launched(document, **variables).finish()
    assert code == 1 and "Traceback" not in output, output
    assert [told in line for line in failures(output)] == [True], output


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(corpus, whole, disk):
    run = disk / "run"
    assert_fails(document(corpus, run), "No space left on device", MEDLEY_FAULT="fill:0:6")
    (disk / "ballast").unlink()
    code, output = Launched(document(corpus, run)).finish()
    assert code == 0 and "step-00000004" in output, output
    assert_the_same(run, whole)


def test_a_checkpoint_folder_that_becomes_read_only_ends_the_run_with_one_line(corpus, whole, disk):
    run = disk / "run"
    try:
        assert_fails(document(corpus, run), "Read-only file system", MEDLEY_FAULT="readonly:0:6")
    finally:
        subprocess.run(["umount", "-l", run / "checkpoints"], check=True)
    assert Launched(document(corpus, run)).finish()[0] == 0
    assert_the_same(run, whole)


def test_tokens_that_disappear_end_the_run_with_one_line_that_names_the_file(whole, tmp_path):
    corpus, run = write_corpus(tmp_path / "corpus"), tmp_path / "run"
    assert_fails(document(corpus, run), str(corpus / "train" / "tokens"), MEDLEY_FAULT="truncate:1:6")
    shutil.rmtree(corpus)
    write_corpus(corpus)
    assert Launched(document(corpus, run)).finish()[0] == 0
    assert_the_same(run, whole)
