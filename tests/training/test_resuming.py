"""A checkpoint's hashes are made, and checked before a run goes on from it, by its ranks together."""

import errno
import json
import os
import re
import shutil
from functools import partial
from unittest.mock import patch

import pytest

from pretrain.training import checkpoint, saving
from tests.training.runs import metrics, recipe, train, write_corpus


def document(corpus, run) -> dict:
    return recipe(corpus, run, training__steps=4, checkpoint__interval_steps=2, objectives={"mlm": {}}, sampler={})


def go_on(document: dict, *arguments: str, ds: str = "zero2.json"):
    """Train, with no file so small that every rank reads it; return the outcome and the files that were read."""
    read, describe = [], checkpoint.describe

    def told(path):
        read.append(f"{path.parent.name}/{path.name}")
        return describe(path)

    with patch.multiple(checkpoint, _SMALL_BYTES=-1, describe=told):
        return train(document, *arguments, ds=ds), read


def train_noting_syncs(document: dict):
    """Train; return the outcome and the names of the files that a save has synced before they were published."""
    with patch.object(saving, "sync", side_effect=saving.sync) as synced:
        outcome = train(document)
    return outcome, [call.args[0].name for call in synced.call_args_list]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rank_pool):
    """A corpus, and a finished run of two ranks with checkpoints after 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("resuming")
    corpus = write_corpus(folder / "corpus")
    outcomes = rank_pool.run(train, document(corpus, folder / "run"))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    return corpus, folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    return tmp_path / "run"


def test_each_file_is_read_by_one_rank(trained, run, ranks):
    manifest = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    (one, first), (other, second) = ranks(go_on, document(trained[0], run))
    assert (one[0], other[0]) == (0, 0) and "step-00000004" in one[1]
    assert len(first + second) == len(set(first + second)) == len(manifest["files"])
    assert "engine/states-00000.safetensors" in first and "engine/states-00001.safetensors" in second


@pytest.mark.parametrize(("ds", "own"), [("zero2.json", ["engine/states-00001.safetensors"]), ("zero0.json", [])])
def test_what_a_rank_has_written_it_describes_itself(trained, tmp_path, ranks, ds, own):
    (one, first), (other, second) = ranks(partial(go_on, ds=ds), document(trained[0], tmp_path / "run"))
    assert (one[0], other[0]) == (0, 0)
    assert second == own * 2 and not set(own) & set(first)  # two checkpoints
    assert first.count("engine/states-00000.safetensors") == 2
    assert all(checkpoint.verify(folder) for folder in checkpoint.candidates(tmp_path / "run"))


def test_what_a_rank_has_written_it_syncs_itself(trained, tmp_path, ranks):
    for rank, (outcome, synced) in enumerate(ranks(train_noting_syncs, document(trained[0], tmp_path / "run"))):
        assert outcome[0] == 0 and synced == [f"states-0000{rank}.safetensors"] * 2


@pytest.mark.parametrize("number", [0, 1])
def test_what_one_rank_finds_damaged_all_pass_over(trained, run, ranks, number):
    spoil(run / "checkpoints" / "step-00000004", number)
    outcomes = [outcome for outcome, _ in ranks(go_on, document(trained[0], run))]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    said = outcomes[0][1]
    assert said.count("warning: passing over a checkpoint") == 1 and f"states-0000{number}.safetensors: content" in said
    assert "going on from" in said and "step-00000002" in said
    assert [entry["losses"] for entry in metrics(run)] == [entry["losses"] for entry in metrics(trained[1])]


def test_a_damaged_recipe_is_a_damaged_checkpoint(trained, run, ranks):
    config = run / "checkpoints" / "step-00000004" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: {"))
    outcomes = ranks(train, document(trained[0], run))
    assert [code for code, _, _ in outcomes] == [0, 0] and "step-00000002" in outcomes[0][1]
    assert outcomes[0][1].count("warning: passing over a checkpoint") == 1 and "config.yaml: content" in outcomes[0][1]


def test_an_older_checkpoint_has_to_be_of_the_same_recipe_as_well(trained, run, ranks):
    older = run / "checkpoints" / "step-00000002"
    config, manifest = older / "config.yaml", json.loads((older / "manifest.json").read_text())
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    manifest["files"]["config.yaml"] = checkpoint.describe(config)
    (older / "manifest.json").write_text(json.dumps(manifest))
    spoil(run / "checkpoints" / "step-00000004", 0)
    outcomes = [outcome for outcome, _ in ranks(go_on, document(trained[0], run))]
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "seed: differs from that of" in outcomes[0][2] + outcomes[1][2]


def test_a_checkpoint_that_cannot_be_read_now_is_neither_passed_over_nor_the_users_mistake(trained, run, ranks):
    outcomes = ranks(go_on_without_a_disk, document(trained[0], run))
    told = outcomes[0][2] + outcomes[1][2]
    assert [code for code, _, _ in outcomes] == [1, 1]
    assert len(told.splitlines()) == 1 and "failed: rank 1: " in told and "Stale file handle" in told
    assert (run / "checkpoints" / "step-00000004").is_dir()


def go_on_without_a_disk(document: dict):
    def read(path):
        if path.name == "states-00001.safetensors":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return describe(path)

    describe = checkpoint.describe
    with patch.multiple(checkpoint, _SMALL_BYTES=-1, describe=read):
        return train(document)


def test_a_damaged_checkpoint_that_was_named_is_the_users_mistake(trained, run, ranks):
    named = spoil(run / "checkpoints" / "step-00000002", 1)
    outcomes = [outcome for outcome, _ in ranks(go_on, document(trained[0], run), "--resume", str(named))]
    told = outcomes[0][2] + outcomes[1][2]
    assert [code for code, _, _ in outcomes] == [2, 2] and len(told.splitlines()) == 1
    assert "states-00001.safetensors: content differs from the manifest's sha256" in told


def test_without_a_good_checkpoint_the_run_ends(trained, run, ranks):
    for step in (2, 4):
        spoil(run / "checkpoints" / f"step-0000000{step}", 0)
    outcomes = [outcome for outcome, _ in ranks(go_on, document(trained[0], run))]
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "none of its checkpoints verifies" in outcomes[0][2] + outcomes[1][2]


def test_ranks_that_see_different_checkpoints_do_not_go_on(trained, run, tmp_path, ranks):
    elsewhere = shutil.copytree(run, tmp_path / "elsewhere")
    shutil.rmtree(elsewhere / "checkpoints" / "step-00000004")
    outcomes = ranks(train_apart, [document(trained[0], folder) for folder in (run, elsewhere)])
    told = outcomes[0][2] + outcomes[1][2]
    assert [code for code, _, _ in outcomes] == [1, 1] and len(told.splitlines()) == 1
    assert re.search(r"the ranks see different checkpoints \(step-00000002, \w{8}; step-00000004, \w{8}\)", told)


def train_apart(documents: list[dict]):
    return train(documents[int(os.environ["RANK"])])


def spoil(folder, number: int):
    """Turn over a byte of one rank's states; return the checkpoint."""
    path = folder / "engine" / f"states-{number:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder
