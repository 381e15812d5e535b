"""An export is the training model: the same logits, the same losses, loadable with transformers alone."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
)

from fused_objectives.targets import IGNORED, compact
from pretrain.errors import UserError
from pretrain.export import export, load_model
from pretrain.model.attention import Layout
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import load_recipe, recipe_from
from pretrain.training.build import build
from tests.training.runs import metrics, recipe, train, write_corpus

LAST = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def heldout_views(run, objective):
    """Return the training model of a run's last checkpoint, and its views of the held-out batch."""
    folder = run / LAST
    loaded = load_recipe(folder / "config.yaml")
    parts = build(loaded, dtype=torch.float32)
    batches = parts.heldout_loader(rank=0, world_size=2).next().micro_batches
    batches += parts.heldout_loader(rank=1, world_size=2).next().micro_batches
    model = load_model(folder, loaded, Vocabulary.of(AutoTokenizer.from_pretrained(folder / "model")))
    return model, [model.objectives[objective].corrupt(batch, 0.0) for batch in batches]


def rows_of(view, *tensors):
    """Yield every sample of a view on its own: each tensor's part as ``[1, length]``."""
    for sample in range(len(view.batch.sample_ids)):
        place = view.batch.segment_ids == sample
        yield tuple(tensor[place][None] for tensor in tensors)


def masked_lm_loss(model, views) -> float:
    """Return the mean cross entropy of transformers' model, one sample at a time."""
    total = count = 0
    for view in views:
        for tokens, labels in rows_of(view, view.tokens, view.labels):
            logits = model(input_ids=tokens).logits
            total += F.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
    return total / count


@pytest.mark.parametrize("ds", ["zero1.json", "zero2.json", "zero3.json"])
@torch.no_grad()
def test_the_export_has_the_loss_that_the_ranks_measured_at_every_stage(corpus, tmp_path, ranks, ds):
    document = recipe(corpus, tmp_path / "run", objectives={"mlm": {}}, sampler={})
    assert [outcome[0] for outcome in ranks(_train, document, ds)] == [0, 0]
    out = export(tmp_path / "run", tmp_path / "export")
    model, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embeddings, decoder = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embeddings, decoder)
    _, views = heldout_views(tmp_path / "run", "mlm")
    measured = metrics(tmp_path / "run")[-1]["heldout"]["mlm"]
    assert masked_lm_loss(model.eval(), views) == pytest.approx(measured, rel=1e-5)


def _train(document, ds):
    return train(document, ds=ds)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert"])
@torch.no_grad()
def test_masked_lm_exports_give_the_training_models_logits(corpus, tmp_path, family):
    document = recipe(corpus, tmp_path / "run", objectives={"mlm": {}}, sampler={}, training__steps=2)
    document["model"] |= {"family": family, "dropout": None}
    if family == "electra":
        document["model"]["overrides"]["embedding_size"] = 32
    document["checkpoint"]["interval_steps"] = 1
    assert train(document)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-00000002").rename(tmp_path / "run" / LAST)
    training, views = heldout_views(tmp_path / "run", "mlm")
    exported = AutoModelForMaskedLM.from_pretrained(export(tmp_path / "run" / LAST, tmp_path / "export")).eval()
    view = views[0]
    logits = training.heads["vocabulary"](training.encoder(view.tokens, Layout(view.batch)))
    for (expected,), (tokens,) in zip(rows_of(view, logits), rows_of(view, view.tokens), strict=True):
        torch.testing.assert_close(exported(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def electra(corpus, run, **changes) -> dict:
    """Return the recipe of a small ELECTRA whose embeddings are narrower than its hidden states."""
    document = recipe(corpus, run, sampler={}, training__steps=3, heldout={"rows": 4}, **changes)
    document["model"] |= {"family": "electra"}
    document["model"]["overrides"]["embedding_size"] = 24
    return document


GENERATORS = [
    {"depth": 0.5, "embeddings": "shared"},
    {"width": 0.5, "embeddings": "shared"},
    {"width": 0.5, "embeddings": "separate"},
    {"depth": 0.5, "embeddings": "disentangled"},
    {"width": 0.5, "depth": 1.0, "embeddings": "disentangled"},
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda keys: "-".join(map(str, keys.values())))
@torch.no_grad()
def test_electra_exports_as_discriminator_generator_and_backbone(corpus, tmp_path, generator):
    run = tmp_path / "run"
    document = electra(corpus, run, objectives={"rtd": {"generator": generator}})
    document["training"]["optimizer"]["learning_rate"] = 0.03  # so that what is trained apart comes apart
    assert train(document)[0] == 0
    run.joinpath("checkpoints", "step-00000003").rename(run / LAST)
    classes = {None: ElectraForPreTraining, "generator": AutoModelForMaskedLM, "backbone": AutoModel}
    exported = {}
    for kind, auto in classes.items():
        folder = export(run, tmp_path / str(kind), kind)
        exported[kind], info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        exported[kind].eval()
    assert type(exported["generator"]) is ElectraForMaskedLM
    training, views = heldout_views(run, "rtd")
    embeddings = [
        each.backbone.get_input_embeddings() for each in (training.encoder, training.heads["generator"].encoder)
    ]
    if generator["embeddings"] == "disentangled":
        assert embeddings[0].common is embeddings[1] and embeddings[0].delta.weight.abs().max() > 0.01
    view = views[0]
    layout, everywhere = Layout(view.batch), compact(torch.ones(view.tokens.numel(), dtype=torch.bool))
    hidden = training.encoder(view.tokens, layout)
    detection = training.heads["detection"](hidden)[..., 0]
    logits = training.heads["generator"](view.tokens, layout, everywhere).view(*view.tokens.shape, -1)
    backbone = AutoModel.from_pretrained(tmp_path / "None").eval()  # the discriminator's folder
    for tokens, states, detected, guesses in rows_of(view, view.tokens, hidden, detection, logits):
        same = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(exported[None](input_ids=tokens).logits, detected, **same)
        torch.testing.assert_close(exported["generator"](input_ids=tokens).logits, guesses, **same)
        for each in (exported["backbone"], backbone):
            torch.testing.assert_close(each(input_ids=tokens).last_hidden_state, states, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_electras_exports_have_the_losses_that_were_measured(corpus, tmp_path):
    objectives = {"rtd": {"generator": {"embeddings": "disentangled"}}}
    assert train(electra(corpus, tmp_path / "run", objectives=objectives))[0] == 0
    tmp_path.joinpath("run", "checkpoints", "step-00000003").rename(tmp_path / "run" / LAST)
    folders = {kind: export(tmp_path / "run", tmp_path / kind, kind) for kind in ("discriminator", "generator")}
    discriminator = ElectraForPreTraining.from_pretrained(folders["discriminator"]).eval()
    generator = AutoModelForMaskedLM.from_pretrained(folders["generator"]).eval()
    training, views = heldout_views(tmp_path / "run", "rtd")
    read = []  # what the discriminator reads: originals with the generator's samples
    training.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    generator_loss, detection_loss, targets, places = 0.0, 0.0, 0, 0
    for view in views:
        training.objectives["rtd"].loss(training, view)
        for tokens, original, labels, replaced in rows_of(view, view.tokens, view.batch.tokens, view.labels, read[-1]):
            masked = labels[0] != IGNORED
            logits = generator(input_ids=tokens).logits[0][masked]
            generator_loss += F.cross_entropy(logits, labels[0][masked], reduction="sum").item()
            detection = discriminator(input_ids=replaced).logits
            target = (replaced != original).float()
            detection_loss += F.binary_cross_entropy_with_logits(detection, target, reduction="sum").item()
            targets, places = targets + int(masked.sum()), places + target.numel()
    measured = metrics(tmp_path / "run")[-1]["heldout"]["rtd"]
    assert generator_loss / targets + 50 * detection_loss / places == pytest.approx(measured, rel=1e-4)


def test_a_run_goes_on_from_an_exported_discriminator_with_disentangled_embeddings(corpus, tmp_path):
    objectives = {"rtd": {"generator": {"embeddings": "disentangled"}}}
    assert train(electra(corpus, tmp_path / "run", objectives=objectives))[0] == 0
    folder = export(tmp_path / "run", tmp_path / "export", "discriminator")
    weights = AutoModel.from_pretrained(folder).get_input_embeddings().weight
    document = electra(corpus, tmp_path / "next", objectives=objectives)
    document["model"] = {"checkpoint": str(folder)}
    assert train(document)[0] == 0
    again = recipe_from(document, "test")
    embedding = build(again, dtype=torch.float32).model.encoder.backbone.get_input_embeddings()
    assert torch.equal(embedding.common.weight, weights) and not embedding.delta.weight.any()


def test_a_discriminator_without_its_head_or_family_is_refused(corpus, tmp_path):
    assert train(electra(corpus, tmp_path / "std", objectives={"std": {}, "itd": {}}))[0] == 0
    reason = r"--as discriminator: its head is that of 'rtd', which the run did not train \(std, itd\)"
    with pytest.raises(UserError, match=reason):
        export(tmp_path / "std", tmp_path / "out", "discriminator")
    assert type(AutoModel.from_pretrained(export(tmp_path / "std", tmp_path / "out"))) is ElectraModel
    document = recipe(corpus, tmp_path / "bert", objectives={"rtd": {}}, sampler={}, training__steps=1)
    assert train(document)[0] == 0
    with pytest.raises(UserError, match=r"--as discriminator: .*'electra' alone; the run is of 'bert'"):
        export(tmp_path / "bert", tmp_path / "other", "discriminator")


@torch.no_grad()
def test_a_decoder_exports_as_causal_lm(corpus, tmp_path):
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = {"family": "llama", "size": None, "overrides": overrides}
    assert train(recipe(corpus, tmp_path / "run", model=model, objectives={"clm": {}}, sampler={}))[0] == 0
    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "export")).eval()
    _, views = heldout_views(tmp_path / "run", "clm")
    total = count = 0
    for view in views:
        for (tokens,) in rows_of(view, view.tokens):
            length = tokens.shape[1] - 1
            total, count = total + exported(input_ids=tokens, labels=tokens).loss.item() * length, count + length
    assert total / count == pytest.approx(metrics(tmp_path / "run")[-1]["heldout"]["clm"], rel=1e-5)


def test_the_tokenizer_and_a_card_with_the_provenance_come_along(corpus, tmp_path):
    document = recipe(corpus, tmp_path / "run", objectives={"mlm": {}}, sampler={}, training__steps=1)
    assert train(document)[0] == 0
    out = export(tmp_path / "run", tmp_path / "export")
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [6, 7]
    card = (out / "README.md").read_text()
    fingerprint = json.loads((corpus / "train" / "meta.json").read_text())["fingerprint"]
    assert fingerprint in card and "learning_rate: 0.003" in card and "BertForMaskedLM" in card
    assert sorted(path.name for path in tmp_path.iterdir() if ".partial" in path.name) == []
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", out)
    with pytest.raises(UserError, match="the run trained none"):
        export(tmp_path / "run", tmp_path / "other", "generator")
    with pytest.raises(UserError, match="neither a checkpoint"):
        export(corpus, tmp_path / "other")


def test_overwriting_never_deletes_a_folder_that_is_no_export(corpus, tmp_path):
    run, precious = tmp_path / "run", tmp_path / "precious"
    assert train(recipe(corpus, run, objectives={"mlm": {}}, sampler={}, training__steps=1))[0] == 0
    precious.mkdir()
    (precious / "thesis.txt").write_text("…")
    for out, reason in (
        (precious, "not a folder this command made"),
        (run, "holds the checkpoint"),
        (tmp_path, "holds"),
    ):
        with pytest.raises(UserError, match=reason):
            export(run, out, overwrite=True)
    assert (precious / "thesis.txt").exists() and (run / "checkpoints").is_dir()
    first = export(run, tmp_path / "export")
    assert export(run, first, overwrite=True) == first
