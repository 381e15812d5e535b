"""A run on many objectives at once, with heads of their own, shared ones, and one that is borrowed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.annotations import NO_UNIT
from pretrain.data.store import Store
from pretrain.export import export
from tests.training.runs import metrics, recipe, states, train, write_corpus

STEPS = 3
SHARED = {"mlm": {}, "guided_mlm": {}, "std": {}, "dtd": {}, "sop": {}}
WITH_GENERATOR = {
    "correction": {},
    "itd": {"source": "generator"},
    **SHARED,
    "std": {"generator_weight": 0.5},
    "rtd": {},
}
WITHOUT = {"itd": {}, **SHARED, "rtd": {"source": "unigram"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus whose samples have units of two tokens, but for every fourth sample."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    for split in ("train", "heldout"):
        store = Store(folder / split)
        units = []
        for number, length in enumerate(store.lengths[:]):
            places = np.arange(length)
            units.append(np.where((places % 5 > 2) & (number % 4 > 0), places // 5, NO_UNIT))
        annotation = folder / split / "annotations" / "salient"
        annotation.mkdir(parents=True)
        (annotation / "units.bin").write_bytes(np.concatenate(units).astype("<u2").tobytes())
        meta = {"format_version": 1, "kind": "spans", "store": store.fingerprint}
        (annotation / "meta.json").write_text(json.dumps(meta))
    return folder


def document(corpus: Path, run: Path, objectives: dict, **changes) -> dict:
    changes = {"training__steps": STEPS, "checkpoint__interval_steps": 2, **changes}
    return recipe(corpus, run, objectives=objectives, sampler={}, **changes)


@pytest.mark.parametrize("objectives", [WITH_GENERATOR, WITHOUT], ids=["generator", "unigram"])
def test_all_objectives_train_together_and_a_resumed_run_is_bit_identical(corpus, tmp_path, objectives):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, _, error = train(document(corpus, whole, objectives))
    assert (code, error) == (0, "")
    records = metrics(whole)
    assert len(records) == STEPS
    for record in records:
        assert set(record["losses"]) == set(objectives)
        assert all(math.isfinite(loss) and loss > 0 for loss in record["losses"].values())
        assert all(record["targets"][term] > 0 for term in record["terms"])
    for name in ("std", "itd", "dtd", "sop"):
        share = records[0]["tallies"][f"{name}/positives"] / records[0]["targets"][name]
        assert 0.05 < share < (0.95 if name == "sop" else 0.25), name
    assert records[0]["tallies"]["guided_mlm/masked_at_random"] > 0
    assert records[0]["tallies"]["itd/dropped_tokens"] == 0
    assert set(records[-1]["heldout"]) == set(objectives)
    assert all(math.isfinite(loss) for loss in records[-1]["heldout"].values())

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000003")
    code, out, error = train(document(corpus, resumed, objectives))
    assert (code, error) == (0, "") and "step-00000002" in out
    last = "checkpoints/step-00000003"
    assert states(resumed / last) == states(whole / last)
    assert [record["losses"] for record in metrics(resumed)] == [record["losses"] for record in records]


@pytest.mark.parametrize("name", ["fixed", "round_robin"])
def test_a_borrowed_generator_whose_weights_are_spread_over_the_ranks_can_be_read(corpus, tmp_path, name):
    objectives = {"itd": {"source": "generator"}, "rtd": {}}
    run = document(corpus, tmp_path / "run", objectives, training__micro_batch_rows=8)
    code, _, error = train(run | {"sampler": {"name": name}}, ds="zero3.json")
    assert (code, error) == (0, "")
    plans = [list(record["plan"]) for record in metrics(tmp_path / "run")]
    assert plans == ([["itd", "rtd"]] * 3 if name == "fixed" else [["itd"], ["rtd"], ["itd"]])
    assert all(math.isfinite(loss) for loss in metrics(tmp_path / "run")[-1]["heldout"].values())


def test_a_run_without_a_generator_exports_its_discriminator(corpus, tmp_path):
    model = {"family": "electra", "size": None, "overrides": {"hidden_size": 32, "embedding_size": 32}}
    model["overrides"] |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    changes = {"model": model, "training__steps": 1}
    code, _, error = train(document(corpus, tmp_path / "run", {"rtd": {"source": "unigram"}, "std": {}}, **changes))
    assert (code, error) == (0, "")
    config = json.loads((export(tmp_path / "run", tmp_path / "export") / "config.json").read_text())
    assert config["architectures"] == ["ElectraForPreTraining"]


def test_dry_run_takes_all_objectives(corpus, tmp_path):
    code, out, error = train(document(corpus, tmp_path / "run", WITH_GENERATOR), "--dry-run")
    assert (code, error) == (0, "") and "head/itd_detection" in out
