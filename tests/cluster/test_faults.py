"""What goes wrong in one rank ends all of them soon, is told in one line, and costs nothing but time."""

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cluster.launched import finish, start
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
    process = start(document(corpus, run))
    output = finish(process)
    assert process.returncode == 0, output
    return run


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
        ("full:1:6", "rank 1: metrics.jsonl: No space left on device"),
        ("crash:1:6", None),
    ],
)
def test_a_fault_in_a_rank_is_told_by_name_and_the_run_goes_on_by_itself(corpus, whole, tmp_path, fault, told):
    kind, rank, _ = fault.split(":")
    shared_before = set(Path("/dev/shm").iterdir())
    process = start(document(corpus, tmp_path / "run"), restarts=1, MEDLEY_FAULT=fault)
    output = finish(process)
    failed = [line for line in output.splitlines() if line.startswith("train: failed:")]
    assert process.returncode == 0, output
    if told is None:
        assert failed == [] and output.count("ZeroDivisionError: a defect") == output.count("Traceback") == 1
    else:
        assert len(failed) == 1 and told in failed[0] and "Traceback" not in output, output
    assert "starting again (1 of 1)" in output and "going on from" in output
    assert_the_same(tmp_path / "run", whole)
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]
    assert set(Path("/dev/shm").iterdir()) <= shared_before
    if kind in ("hang", "spin"):
        stacks = (tmp_path / "run" / "stacks" / f"rank-{int(rank):05d}.txt").read_text()
        assert f"in {kind}" in stacks


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(corpus, whole, disk):
    run = disk / "run"
    process = start(document(corpus, run), "training.steps=5")
    assert "done" in finish(process)
    with open(disk / "ballast", "wb") as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(1 << 12))
            ballast.flush()
    process = start(document(corpus, run))
    output = finish(process)
    failed = [line for line in output.splitlines() if line.startswith("train: failed:")]
    assert process.returncode == 1 and len(failed) == 1 and "No space left on device" in failed[0], output
    assert "Traceback" not in output
    (disk / "ballast").unlink()
    output = finish(start(document(corpus, run)))
    assert "going on from" in output and "step-00000005" in output
    assert_the_same(run, whole)


def test_a_folder_that_becomes_read_only_ends_the_run_with_one_line(corpus, whole, disk):
    run = disk / "run"
    process = start(document(corpus, run), MEDLEY_FAULT="readonly:0:6")
    output = finish(process)
    failed = [line for line in output.splitlines() if line.startswith("train: failed:")]
    assert process.returncode == 1 and len(failed) == 1 and "Read-only file system" in failed[0], output
    assert "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    finish(start(document(corpus, run)))
    assert_the_same(run, whole)


def test_tokens_that_disappear_end_the_run_with_one_line_that_names_the_file(whole, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    process = start(document(corpus, run), MEDLEY_FAULT="truncate:1:6")
    output = finish(process)
    failed = [line for line in output.splitlines() if line.startswith("train: failed:")]
    assert process.returncode == 1 and len(failed) == 1 and str(corpus / "train") in failed[0], output
    assert "Traceback" not in output
    write_corpus(tmp_path / "again")
    (tmp_path / "again" / "train").replace(corpus / "train2")
    for file in (corpus / "train2").iterdir():
        file.replace(corpus / "train" / file.name)
    finish(start(document(corpus, run)))
    assert_the_same(run, whole)
