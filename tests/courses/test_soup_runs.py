"""Runs of one seed that train different courses make a soup, which can be trained on."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, ElectraForPreTraining

from pretrain.courses.command import make_soup
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.recipe import recipe_from
from pretrain.training.build import build
from tests.training.runs import recipe, train, write_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name: two of one seed on other courses, one of another seed."""
    place = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(place / "corpus")
    courses = {"rtd": {"rtd": {}}, "mixed": {"std": {}, "rtd": {}}, "seed": {"rtd": {}}}
    for name, objectives in courses.items():
        document = recipe(corpus, place / name, objectives=objectives, sampler={}, training__steps=2)
        document["model"] |= {"family": "electra"}
        document |= {"seed": 4 if name == "seed" else 3, "checkpoint": {"interval_steps": 1}}
        assert train(document)[0] == 0
    return place


def silent(line: str) -> None:
    """Take the lines of progress and drop them."""


@torch.no_grad()
def test_runs_checkpoints_and_exports_are_mixed_and_the_soup_is_trained_on(runs, tmp_path):
    exported = export(runs / "rtd", tmp_path / "export")
    early = runs / "mixed" / "checkpoints" / "step-00000001"
    record = make_soup([runs / "mixed", exported, early], tmp_path / "soup", say=silent)
    assert [each["folder"] for each in record["ingredients"]] == [
        str(runs / "mixed" / "checkpoints" / "step-00000002"), str(exported), str(early)]  # fmt: skip
    parts = [
        load_file(export(run, tmp_path / str(n)) / "model.safetensors") for n, run in enumerate((runs / "mixed", early))
    ]
    parts.append(load_file(exported / "model.safetensors"))
    for name, values in load_file(tmp_path / "soup" / "model.safetensors").items():
        assert torch.equal(values, (sum(part[name].double() for part in parts) / 3).float())
    model, info = ElectraForPreTraining.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "soup" / "medley.json").read_text())["initialisation"] == record["initialisation"]
    document = recipe(runs / "corpus", tmp_path / "run", objectives={"rtd": {}}, sampler={})
    document["model"] = {"checkpoint": str(tmp_path / "soup")}
    built = build(recipe_from(document, "recipe"), dtype=torch.float32).model.encoder.backbone
    for name, values in model.electra.state_dict().items():
        assert torch.equal(values, built.state_dict()[name])


def test_the_courses_of_one_run_may_differ_but_not_its_seed(runs, tmp_path):
    made = make_soup([runs / "rtd", runs / "mixed"], tmp_path / "soup", kind="backbone", say=silent)
    assert made["architectures"] == ["ElectraModel"]
    _, info = AutoModel.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(UserError, match="began with other weights"):
        make_soup([runs / "rtd", runs / "seed"], tmp_path / "other", say=silent)
    newest = runs / "rtd" / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match="are the same folder"):
        make_soup([runs / "rtd", newest], tmp_path / "other", say=silent)
    with pytest.raises(UserError, match="neither a checkpoint"):
        make_soup([runs / "rtd", runs / "corpus"], tmp_path / "other", say=silent)


def test_generators_do_not_pass_for_their_backbones(runs, tmp_path):
    pair = [runs / "rtd", runs / "mixed"]
    exported = [export(run, tmp_path / run.name, "generator") for run in pair]
    for ingredients, kind in ((pair, "generator"), (exported, None)):
        with pytest.raises(UserError, match="does not say which weights it began with"):
            make_soup(ingredients, tmp_path / "soup", kind=kind, say=silent)
    made = make_soup(pair, tmp_path / "soup", kind="generator", any_start=True, say=silent)
    assert made["architectures"] == ["ElectraForMaskedLM"] and made["initialisation"] is None
