"""Runs of one initialisation are known by its fingerprint, whatever they train and however often they are resumed."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from pretrain.export import FACTS, export
from pretrain.model.encoder import Encoder
from pretrain.model.initialisation import fingerprint
from pretrain.recipe import recipe_from
from pretrain.training.build import build
from tests.training.runs import recipe, train, write_corpus

ALONE = {"mlm": {}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def begun(corpus, **changes) -> str:
    """Return the fingerprint of a run that is built and not trained."""
    document = recipe(corpus, corpus / "run", **{"objectives": ALONE, "sampler": {}, **changes})
    return build(recipe_from(document, "recipe"), dtype=torch.float32).initialisation


def tiny() -> BertForMaskedLM:
    torch.manual_seed(5)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=31, **config))


def test_every_parameter_of_the_backbone_counts_and_no_other():
    model = tiny()
    encoder = Encoder(model)
    before = fingerprint(encoder)
    model.cls.predictions.transform.dense.weight.data += 1
    assert fingerprint(encoder) == before
    for parameter in model.bert.parameters():
        flat, kept = parameter.data.view(-1), parameter.data.clone()
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert fingerprint(encoder) != before
        parameter.data.copy_(kept)
    assert fingerprint(encoder) == before == fingerprint(Encoder(tiny()))


@pytest.mark.parametrize(
    "objectives",
    [
        {"rtd": {}},
        {"rtd": {"generator": {"depth": 1.0, "embeddings": "separate"}}, "mlm": {}},
        {"std": {}, "rtd": {"generator": {"embeddings": "disentangled"}}},
        {"std": {}, "itd": {}, "sop": {}},
        {"cse": {"group_rows": 2}, "dtd": {}, "clm": {}},
    ],
    ids=lambda objectives: "+".join(objectives),
)
def test_objectives_heads_and_dropout_do_not_change_it(corpus, objectives):
    assert begun(corpus, objectives=objectives, model__dropout=0.3) == begun(corpus)


def test_another_seed_or_size_changes_it(corpus):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    assert len({begun(corpus), begun(corpus, seed=4), begun(corpus, model__overrides=sizes)}) == 3


def test_it_survives_resuming_and_goes_into_the_export_but_not_the_generators(corpus, tmp_path):
    document = recipe(corpus, tmp_path / "run", objectives={"mlm": {}, "rtd": {}}, sampler={}, training__steps=2)
    assert train(document)[0] == 0
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer.json"
    assert json.loads(state.read_text())["initialisation"] == begun(corpus)
    exported = {kind: export(tmp_path / "run", tmp_path / kind, kind) for kind in ("backbone", "generator")}
    said = {kind: json.loads((folder / FACTS).read_text())["initialisation"] for kind, folder in exported.items()}
    assert said == {"backbone": begun(corpus), "generator": None}
    going_on = {"checkpoint": str(exported["backbone"]), "dropout": 0.1}
    loaded = begun(corpus, model=going_on)
    assert loaded != begun(corpus) and loaded == begun(corpus, model=going_on, seed=4, objectives={"rtd": {}})


@pytest.mark.parametrize("recorded", ["a", None])
def test_a_resumed_run_keeps_what_its_checkpoint_says(corpus, tmp_path, monkeypatch, recorded):
    document = recipe(corpus, tmp_path / "run", objectives=ALONE, sampler={}, training__steps=1)
    for step, found in ((1, recorded), (2, "b"), (3, "c")):
        monkeypatch.setattr("pretrain.training.build.fingerprint", lambda encoder, found=found: found)
        document["training"]["steps"] = step
        assert train(document)[0] == 0
        state = tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "trainer.json"
        assert json.loads(state.read_text())["initialisation"] == recorded
