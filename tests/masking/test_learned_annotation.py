"""``medley annotate CORPUS learned``: an extractor chooses the spans of every sample of a corpus."""

import hashlib
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch

from pretrain.cli import main
from pretrain.data import annotate as annotate_module
from pretrain.data.annotations import NO_UNIT, Annotation
from pretrain.data.batch import collate
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig
from pretrain.masking.learning.annotate import annotate_learned, learned_units
from pretrain.masking.learning.extractor import Card, Extractor
from pretrain.masking.masker import Masker
from pretrain.model.vocabulary import Vocabulary
from tests.masking.extraction import context, tiny_bert, toy_tokenizer, wordpiece
from tests.training.runs import metrics, recipe, train

SPLITS = {"train": 83, "heldout": 9}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An extractor with random outputs."""
    folder = tmp_path_factory.mktemp("models")
    tiny_bert(folder / "bert")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        extractor, _ = Extractor.on(str(folder / "bert"))
    extractor.save(folder / "extractor", Card("supervised", 64, 6, 3))
    return folder / "extractor"


def write_corpus(folder, tokenizer, most=25):
    """Write a prepared corpus of the toy's contexts; one sample has no text."""
    tokenizer.save_pretrained(folder / "tokenizer")
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    rng = random.Random(9)
    for split, count in SPLITS.items():
        writer = StoreWriter(folder / split, len(tokenizer))
        samples = [tokenizer(context(rng, most)["context"])["input_ids"] for _ in range(count)]
        samples[count // 2] = [2, 3]
        writer.append(np.concatenate(samples), np.array([len(sample) for sample in samples]))
        writer.close(tokenizer={"path": "../tokenizer", "sha256": digest, "vocabulary_size": len(tokenizer)})
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", toy_tokenizer())


def units(corpus, split="train", name="learned") -> bytes:
    return (corpus / split / "annotations" / name / "units.bin").read_bytes()


def test_every_sample_has_the_spans_that_its_own_logits_rank_best(model, corpus):
    extractor, _ = Extractor.load(model)
    annotate_learned(corpus, model, top_k=3, max_span=4)
    words = 0
    for split in SPLITS:
        store = Store(corpus / split)
        annotation = Annotation(store, "learned", "spans")
        for sample in range(len(store)):
            ids = torch.from_numpy(store[sample].astype(np.int64))
            with torch.no_grad():
                out = extractor.model(ids[None])  # alone: no padding, no batch
            start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            tokens = extractor.tokenizer.convert_ids_to_tokens(ids)
            inner = [token.startswith("##") for token in tokens] + [False]
            spans = [
                (start[i] + end[j], i, j)
                for i in range(1, len(ids) - 1)
                for j in range(i, min(i + 4, len(ids) - 1))
                if not inner[i] and not inner[j + 1]
            ]
            chosen = []
            for _, i, j in sorted(spans, reverse=True):
                if len(chosen) < 3 and all(j < a or i > b for a, b in chosen):
                    chosen.append((i, j))
            expected = np.full(len(ids), NO_UNIT)
            for number, (i, j) in enumerate(sorted(chosen)):
                expected[i : j + 1] = number
            begin = store.offsets[sample]
            assert np.array_equal(annotation.units[begin : begin + len(ids)], expected)
            words += len(chosen)
    assert words > 200


def test_the_annotation_says_what_made_it(model, corpus):
    summary = annotate_learned(corpus, model)
    meta = json.loads((corpus / "train" / "annotations" / "learned" / "meta.json").read_text())
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    made_by = {"annotation": "learned", "method": "supervised", "model_sha256": digest, "top_k": 3, "max_span": 6}
    assert meta["made_by"] == made_by and meta["kind"] == "spans"
    assert (meta["samples"], meta["samples_without"]) == (83, 1)
    assert meta["units"] == summary["splits"]["train"]["units"] <= 3 * 83
    assert summary["tokens"] == sum(Store(corpus / split).meta["tokens"] for split in SPLITS)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_an_annotation_that_was_interrupted_comes_out_as_if_it_had_not_been(stop, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_module, "BATCH_TOKENS", 200)
    whole = shutil.copytree(corpus, tmp_path / "whole")
    annotate_learned(whole, model)
    choose, calls = Extractor.spans, []

    def interrupted(self, tokens, *arguments):
        calls.append(len(tokens))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return choose(self, tokens, *arguments)

    monkeypatch.setattr(Extractor, "spans", interrupted)
    with pytest.raises(KeyboardInterrupt):
        annotate_learned(corpus, model)
    done = sum(calls[:-1])
    assert not (corpus / "train" / "annotations" / "learned").exists()
    annotate_learned(corpus, model)
    assert sum(calls[stop:]) == sum(SPLITS.values()) - done and done
    for split in SPLITS:
        assert units(corpus, split) == units(whole, split)


def test_units_do_not_depend_on_the_batches(model, corpus):
    extractor, _ = Extractor.load(model)
    store = Store(corpus / "train")
    made = []
    for budget in (1, 50, 1 << 20):
        parts = list(learned_units(extractor, store, 0, 3, 6, budget))
        assert np.array_equal(np.concatenate([lengths for _, lengths in parts]), store.lengths[:])
        made.append(np.concatenate([found for found, _ in parts]))
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])
    assert len(made[0]) == store.meta["tokens"]


def test_an_empty_store_is_annotated_with_nothing(model, tmp_path):
    toy_tokenizer().save_pretrained(tmp_path / "corpus" / "tokenizer")
    for split in SPLITS:
        StoreWriter(tmp_path / "corpus" / split, 60).close()
    assert annotate_learned(tmp_path / "corpus", model)["splits"]["train"]["units"] == 0
    assert units(tmp_path / "corpus") == b""


def test_a_tokenizer_is_the_same_if_its_ids_mean_the_same(model, tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 77  # saved in another file, and the tokenizer's own file may differ in form
    corpus = write_corpus(tmp_path / "corpus", tokenizer)
    file = corpus / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    annotate_learned(corpus, model)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (lambda words: words[:-1], "58 entries against 57"),
        (lambda words: [*words[:3], words[4], words[3], *words[5:]], "id 8 is 'w3' against 'w4'"),
    ],
)
def test_an_extractor_of_another_tokenizer_is_refused_with_the_command_that_mends_it(words, told, model, tmp_path):
    vocabulary = toy_tokenizer().get_vocab()
    corpus = write_corpus(tmp_path / "corpus", wordpiece(words(sorted(vocabulary, key=vocabulary.get)[5:])))
    with pytest.raises(UserError) as error:
        annotate_learned(corpus, model)
    assert str(error.value) == (
        f"--model {model}: its tokenizer is not that of {corpus} ({told}); prepare the corpus with it: "
        f"medley prepare … --tokenizer {model} --out {corpus} --overwrite"
    )
    assert not (corpus / "train" / "annotations").exists()


def test_samples_longer_than_the_extractor_reads_are_refused(model, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", toy_tokenizer(), most=90)
    with pytest.raises(UserError, match=r"reads 64 tokens, but .* has samples of \d+; .*--max-length 64"):
        annotate_learned(corpus, model)


def test_logits_that_are_not_finite_are_told(model, corpus, monkeypatch):
    monkeypatch.setattr(Extractor, "logits", lambda self, tokens, real: 2 * [tokens * math.nan])
    with pytest.raises(UserError, match="not finite"):
        annotate_learned(corpus, model)


def test_the_command_prints_its_counts_and_takes_a_name(model, corpus, capsys):
    arguments = ["annotate", str(corpus), "learned", "--model", str(model), "--name", "other", "--top-k", "1"]
    assert main([*arguments, "--max-span", "2"]) == 0
    printed = capsys.readouterr().out
    assert "without one" in printed and "tokens/s" in printed
    annotation = Annotation(Store(corpus / "train"), "other", "spans")
    assert set(np.unique(annotation.units[:])) == {0, NO_UNIT}
    assert main(arguments) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["learned"], "--model: name the extractor; make one with 'medley learn-mask supervised'"),
        (["learned", "--model", "{model}", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["learned", "--model", "{model}", "--name", "a/b"], "--name a/b: must be of letters"),
        (["learned", "--model", "{corpus}"], "no span extractor"),
        (["learned", "--model", "{model}", "--workers", "2"], "--workers is for annotations of text"),
        (["salient", "--model", "{model}"], "--model goes with 'learned', not with 'salient'"),
        (["salient", "--name", "x"], "--name goes with 'learned', not with 'salient'"),
        (["learnt"], "unknown annotation 'learnt'; did you mean 'learned'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(arguments, told, model, corpus, capsys):
    filled = [word.format(model=model, corpus=corpus) for word in arguments]
    assert main(["annotate", str(corpus), *filled]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (corpus / "train" / "annotations").exists()


def test_the_learned_policy_masks_inside_the_spans(model, corpus):
    annotate_learned(corpus, model)
    store = Store(corpus / "train")
    annotation = {"learned": Annotation(store, "learned", "spans")}
    rows = [np.arange(at, min(at + 4, len(store))) for at in range(0, len(store), 4)]
    batch = collate(store, rows, [row * 0 for row in rows], 0, 256, 0, annotation)
    vocabulary = Vocabulary.of(toy_tokenizer())
    masked = Masker(MaskingConfig(policy="learned", rate=0.1), vocabulary, 1, "mlm")(batch, 0.0)
    chosen, inside = masked.labels >= 0, batch.units["learned"] != NO_UNIT
    assert chosen.any() and not (chosen & ~inside).any()
    assert masked.fallbacks == 0  # the one sample without a span has no text


def test_a_run_trains_on_the_learned_policy(model, corpus, tmp_path):
    annotate_learned(corpus, model)
    objectives = {"mlm": {"masking": {"policy": "learned", "rate": 0.2}}}
    keys = {"objectives": objectives, "sampler": {"name": "fixed"}, "training__steps": 2}
    code, _, err = train(recipe(corpus, tmp_path / "run", heldout={"rows": 4}, **keys))
    assert code == 0, err
    assert all(math.isfinite(record["loss"]) for record in metrics(tmp_path / "run"))


def test_spans_computed_live_are_those_of_the_annotation_and_their_cost_is_told(model, corpus, tmp_path):
    annotate_learned(corpus, model)
    runs = {}
    for name, more in (("stored", {}), ("live", {"live": str(model)})):
        objectives = {"mlm": {"masking": {"policy": "learned", "rate": 0.2, **more}}}
        keys = {"objectives": objectives, "sampler": {}, "training__steps": 2, "heldout": {"rows": 4}}
        code, runs[name], err = train(recipe(corpus, tmp_path / name, **keys))
        assert code == 0, err
    for stored, live in zip(metrics(tmp_path / "stored"), metrics(tmp_path / "live"), strict=True):
        assert all(stored[key] == live[key] for key in ("losses", "targets", "tallies", "grad_norm"))
    assert "note" not in runs["stored"] and "computed live, at " in runs["live"]
    assert f"'medley annotate {corpus} learned --model {model}'" in runs["live"]


def test_an_extractor_that_cannot_be_used_live_is_one_line(model, corpus, tmp_path):
    def told(**masking) -> str:
        document = recipe(corpus, tmp_path / "run", objectives={"mlm": {"masking": masking}}, sampler={})
        code, _, err = train(document)
        assert code == 2 and len(err.splitlines()) == 1
        return err

    assert "nowhere: no span extractor" in told(policy="learned", live=str(tmp_path / "nowhere"))
    assert "'live' goes with policy learned" in told(policy="random", live=str(model))
    assert "'live' computes what 'annotation' would hold" in told(policy="learned", live=str(model), annotation="x")
    write_corpus(tmp_path / "other", wordpiece("ab"))
    corpus = tmp_path / "other"
    assert "masking.live" in told(policy="learned", live=str(model))
