"""A checkpoint is whole and verified, or it does not count."""

import json
import shutil

import pytest

from pretrain.errors import UserError
from pretrain.training import checkpoint


def write(run, step, content=b"weights"):
    """Write and publish a small checkpoint."""
    partial = checkpoint.partial_folder(run, step)
    (partial / "engine").mkdir(parents=True)
    (partial / "engine" / "states").write_bytes(content)
    (partial / "empty").write_bytes(b"")
    return checkpoint.publish(run, step, {"world_size": 3}, {})


def test_a_published_checkpoint_verifies_and_is_what_latest_names(tmp_path):
    folder = write(tmp_path, 7)
    manifest = checkpoint.verify(folder)
    assert (manifest["step"], manifest["world_size"]) == (7, 3)
    assert set(manifest["files"]) == {"engine/states", "empty"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007\n"
    assert checkpoint.newest(tmp_path) == folder


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: (folder / "engine" / "states").write_bytes(b"weightz"), "sha256"),
        (lambda folder: (folder / "engine" / "states").write_bytes(b"weight"), "6 bytes"),
        (lambda folder: (folder / "empty").unlink(), "missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 9, "fi'), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged"),
    ],
)
def test_any_damage_is_named_and_the_one_before_is_taken(tmp_path, damage, word):
    before, after = write(tmp_path, 5), write(tmp_path, 9)
    damage(after)
    with pytest.raises(UserError, match=word):
        checkpoint.verify(after)
    warnings = []
    assert checkpoint.newest(tmp_path, warn=warnings.append) == before
    assert len(warnings) == 1 and word in warnings[0] and str(after) in warnings[0]


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared_away_by_the_next(tmp_path):
    before = write(tmp_path, 5)
    checkpoint.partial_folder(tmp_path, 9).mkdir()
    assert checkpoint.newest(tmp_path) == before
    checkpoint.prune(tmp_path, keep=3)
    assert not checkpoint.partial_folder(tmp_path, 9).exists()


def test_pruning_keeps_the_newest(tmp_path):
    folders = [write(tmp_path, step) for step in (1, 20, 300, 4000)]
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.candidates(tmp_path) == [folders[3], folders[2]]


def test_publishing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    folder = write(tmp_path, 5, b"other")
    assert (folder / "engine" / "states").read_bytes() == b"other"
    assert json.loads((folder / "manifest.json").read_text())["files"]["engine/states"]["bytes"] == 5
    checkpoint.verify(folder)


def test_a_file_that_is_not_as_long_as_was_written_is_never_published(tmp_path):
    before, partial = write(tmp_path, 5), checkpoint.partial_folder(tmp_path, 9)
    partial.mkdir()
    (partial / "states").write_bytes(b"weig")  # what another machine's disk has of it
    with pytest.raises(OSError, match="4 bytes, where 7 were written"):
        checkpoint.publish(tmp_path, 9, {}, {"states": {"bytes": 7, "sha256": ""}})
    assert checkpoint.candidates(tmp_path) == [before]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"


def test_a_copy_of_a_checkpoint_under_another_name_is_no_checkpoint(tmp_path):
    folder = write(tmp_path, 5)
    shutil.copytree(folder, folder.with_name("step-00000009.bak"))
    shutil.copytree(folder, folder.with_name("step-9"))
    assert checkpoint.candidates(tmp_path) == [folder]


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    older, newer = write(tmp_path, 5), write(tmp_path, 9)
    checkpoint.set_aside(tmp_path, after=5)
    assert checkpoint.newest(tmp_path) == older
    assert not newer.exists() and (tmp_path / "checkpoints" / "abandoned-step-00000009" / "manifest.json").is_file()
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.newest(tmp_path) == older
