"""Encoder–decoders under DeepSpeed: whole runs, resumed ones, and what is exported of them."""

import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pretrain.errors import UserError
from pretrain.export import export, load_model
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import load_recipe
from pretrain.training.build import build
from tests.builders import TINY_PAIRED
from tests.training.runs import metrics, recipe, states, train, write_corpus

RUNS = [
    ("t5", "span_corruption", "zero2.json"),
    ("bart", "span_corruption", "zero2.json"),
    ("t5", "denoise", "zero3.json"),
    ("bart", "denoise", "zero3.json"),
]
LAST = "step-00000003"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), sentinels=7)


def paired(corpus, run, family: str, *names: str, **changes) -> dict:
    overrides = {key: value for key, value in TINY_PAIRED[family].items() if not key.startswith("init")}
    model = {"family": family, "size": None, "dropout": 0.1, "overrides": overrides}
    keys = {"model": model, "objectives": {name: {} for name in names}, "sampler": {}, "training__steps": 3}
    keys |= {"data__packing": False, "data__row_length": None, "checkpoint__interval_steps": 2}
    return recipe(corpus, run, **(keys | changes))


def trained(document, ds):
    return train(document, ds=ds)


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def whole(request, corpus, tmp_path_factory, rank_pool):
    """A run of three steps on two ranks, saved after two and three; its family, objective and configuration."""
    family, name, ds = request.param
    run = tmp_path_factory.mktemp(family) / "run"
    outcomes = rank_pool.run(trained, paired(corpus, run, family, name), ds)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    return run, family, name, ds


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(whole, corpus, tmp_path, ranks):
    run, family, name, ds = whole
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / LAST)
    outcomes = ranks(trained, paired(corpus, resumed, family, name), ds)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "going on from" in outcomes[0][1] and "step-00000002" in outcomes[0][1]
    assert states(resumed / "checkpoints" / LAST) == states(run / "checkpoints" / LAST)
    volatile = {"seconds", "tokens_per_second"}
    for first, second in zip(metrics(run), metrics(resumed), strict=True):
        assert {k: v for k, v in first.items() if k not in volatile} == {
            k: v for k, v in second.items() if k not in volatile
        }


@torch.no_grad()
def test_the_export_has_the_held_out_loss_of_the_run(whole, tmp_path):
    run, _, name, _ = whole
    out = export(run, tmp_path / "export")
    model, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    folder = run / "checkpoints" / LAST
    loaded = load_recipe(folder / "config.yaml")
    parts = build(loaded, dtype=torch.float32)
    batches = [
        batch for rank in range(2) for batch in parts.heldout_loader(rank=rank, world_size=2).next().micro_batches
    ]
    ours = load_model(folder, loaded, Vocabulary.of(AutoTokenizer.from_pretrained(folder / "model")))
    views = [ours.objectives[name].corrupt(batch, 0.0) for batch in batches]
    total = count = 0
    for view in views:
        loss = model.eval()(input_ids=view.tokens, attention_mask=view.real.long(), labels=view.labels).loss
        targets = int(view.counts[name].sum())
        total, count = total + (loss.item() * targets if targets else 0.0), count + targets
    assert total / count == pytest.approx(metrics(run)[-1]["heldout"][name], rel=1e-5)
    assert type(model).__name__ in (out / "README.md").read_text()
    written = model.generate(views[0].tokens, attention_mask=views[0].real.long(), max_new_tokens=3, do_sample=False)
    assert written.shape[0] == len(views[0].tokens) and (written[:, 0] == model.config.decoder_start_token_id).all()


def test_an_encoder_decoder_exports_as_nothing_else(whole, tmp_path):
    for kind in ("masked-lm", "causal-lm", "backbone"):
        with pytest.raises(UserError, match=rf"^--as {kind}: the run trained none"):
            export(whole[0], tmp_path / "export", kind)


def test_ranks_and_micro_batches_do_not_change_what_is_trained(corpus, tmp_path, ranks):
    names = ("span_corruption", "denoise")
    for run, rows in (("one", 8), ("two", 2)):
        document = paired(corpus, tmp_path / run, "t5", *names, training__micro_batch_rows=rows, model__dropout=0.0)
        outcomes = [train(document)] if run == "one" else ranks(train, document)
        assert [outcome[0] for outcome in outcomes] == [0] * len(outcomes), outcomes
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for exact in ("sample_ids_sha256", "targets", "tallies"):
            assert alone[exact] == together[exact]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_the_loss_falls(corpus, tmp_path):
    changes = {"training__steps": 60, "model__dropout": 0.0, "checkpoint__interval_steps": 100}
    code, _, err = train(paired(corpus, tmp_path / "run", "t5", "span_corruption", **changes))
    assert (code, err) == (0, "")
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert sum(losses[-10:]) < sum(losses[:10]) - 5


def test_a_dry_run_says_what_the_run_takes(corpus, tmp_path):
    code, out, err = train(paired(corpus, tmp_path / "run", "bart", "denoise"), "--dry-run")
    assert (code, err) == (0, "") and "sdpa" in out and "backbone" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__packing": True}, ["data.packing", "'t5'", "off"]),
        ({"objectives": {"mlm": {}}}, ["objectives.mlm", "encoder–decoder", "denoise, span_corruption"]),
        ({"model__attention": "varlen"}, ["model.attention", "auto"]),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(corpus, tmp_path, changes, words):
    document = paired(corpus, tmp_path / "run", "t5", "denoise")
    for key, value in changes.items():
        group, _, name = key.partition("__")
        document[group] = {**document[group], name: value} if name else value
    code, _, err = train(document)
    assert code == 2 and len(err.splitlines()) == 1
    assert all(word in err for word in words), err
