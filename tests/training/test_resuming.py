"""A checkpoint's hashes are made, and checked before a run goes on from it, by its ranks together."""

import json
import os
import shutil
from unittest.mock import patch

import pytest

from pretrain.training import checkpoint
from tests.training.runs import metrics, recipe, train, write_corpus


def document(corpus, run) -> dict:
    return recipe(corpus, run, training__steps=4, checkpoint__interval_steps=2, objectives={"mlm": {}}, sampler={})


def go_on(document: dict, *arguments: str):
    """Train, with no file so small that every rank reads it; return the outcome and the files that were read."""
    read, describe = [], checkpoint.describe

    def told(path):
        read.append(f"{path.parent.name}/{path.name}")
        return describe(path)

    with patch.multiple(checkpoint, _SMALL_BYTES=-1, describe=told):
        return train(document, *arguments), read


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
    assert [sum("states" in name for name in names) for names in (first, second)] == [1, 1]


def test_what_a_rank_has_written_it_describes_itself(trained, tmp_path, ranks):
    (one, first), (other, second) = ranks(go_on, document(trained[0], tmp_path / "run"))
    assert (one[0], other[0]) == (0, 0)
    assert second == ["engine/states-00001.safetensors"] * 2 and second[0] not in first  # two checkpoints
    assert all(checkpoint.verify(folder) for folder in checkpoint.candidates(tmp_path / "run"))


@pytest.mark.parametrize("number", [0, 1])
def test_what_one_rank_finds_damaged_all_pass_over(trained, run, ranks, number):
    spoil(run / "checkpoints" / "step-00000004", number)
    outcomes = [outcome for outcome, _ in ranks(go_on, document(trained[0], run))]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    said = outcomes[0][1]
    assert said.count("warning: passing over a checkpoint") == 1 and f"states-0000{number}.safetensors: content" in said
    assert "going on from" in said and "step-00000002" in said
    assert [entry["losses"] for entry in metrics(run)] == [entry["losses"] for entry in metrics(trained[1])]


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
    assert "the ranks see different checkpoints (step-00000002, step-00000004)" in told


def train_apart(documents: list[dict]):
    return train(documents[int(os.environ["RANK"])])


def spoil(folder, number: int):
    """Turn over a byte of one rank's states; return the checkpoint."""
    path = folder / "engine" / f"states-{number:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder
