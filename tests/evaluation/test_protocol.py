import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pretrain.data.tasks import load_task
from pretrain.errors import UserError
from pretrain.evaluation import Settings, evaluate
from pretrain.evaluation.model import load_classifier
from pretrain.evaluation.protocol import dev_score
from tests.evaluation.conftest import BAD, GOOD, make_tokenizer, sentence, write_task

QUICK = Settings(epochs=5, lr=5e-3, batch=16, max_length=24, seeds=2)


def quiet(line: str) -> None:
    """Take the status lines and drop them."""


@pytest.fixture(scope="module")
def learnt(tiny_bert, sentiment) -> dict:
    return evaluate(tiny_bert, sentiment, QUICK, quiet)


def without_time(runs: list[dict]) -> list[dict]:
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]


def test_a_separable_task_is_learnt_far_beyond_the_majority(learnt):
    assert learnt["baseline"]["values"]["accuracy"] < 0.8
    assert learnt["mean"]["test"]["accuracy"] > 0.95
    assert learnt["mean"]["test"]["matthews"] > 0.9
    assert [run["seed"] for run in learnt["runs"]] == [0, 1]
    assert learnt["samples"] == {"train": 203, "dev": 41, "test": 43}


def test_the_same_seeds_give_identical_numbers_and_leave_the_callers_random_state(tiny_bert, sentiment, learnt):
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    again = evaluate(tiny_bert, sentiment, QUICK, quiet)
    assert without_time(again["runs"]) == without_time(learnt["runs"])
    assert torch.equal(torch.rand(3), expected)
    assert learnt["runs"][0]["loss_by_epoch"] != learnt["runs"][1]["loss_by_epoch"]


def test_the_test_labels_influence_nothing_but_the_test_scores(tiny_bert, sentiment, learnt):
    task = load_task(sentiment)
    test = task.splits["test"]
    flipped = dataclasses.replace(test, labels=[1 - label for label in test.labels])
    task = dataclasses.replace(task, splits={**task.splits, "test": flipped})
    result = evaluate(tiny_bert, task, QUICK, quiet)
    for run, before in zip(result["runs"], learnt["runs"], strict=True):
        assert {key: run[key] for key in ("epoch", "dev", "dev_by_epoch", "loss_by_epoch")} == {
            key: before[key] for key in ("epoch", "dev", "dev_by_epoch", "loss_by_epoch")
        }
        assert run["test"]["values"]["accuracy"] == pytest.approx(1 - before["test"]["values"]["accuracy"])


def test_the_dev_score_is_that_of_the_evaluation_and_test_is_not_read(tiny_bert, sentiment, learnt):
    task = load_task(sentiment)
    blind = dataclasses.replace(task, splits={**task.splits, "test": None})
    assert dev_score(tiny_bert, blind, QUICK, quiet) == pytest.approx(learnt["mean"]["dev"]["accuracy"], abs=1e-12)


def test_the_second_text_of_a_pair_is_read(tiny_bert, tmp_path):
    def row(rng: random.Random) -> dict:
        good = rng.random() < 0.5
        return {"text_a": sentence(rng), "text_b": sentence(rng, rng.choice(GOOD if good else BAD)), "label": int(good)}

    result = evaluate(tiny_bert, write_task(tmp_path / "pairs", row), dataclasses.replace(QUICK, seeds=1), quiet)
    assert result["label_names"] == ["0", "1"]
    assert result["mean"]["test"]["accuracy"] > 0.9


def test_regression_learns_a_number_of_any_scale(tiny_bert, tmp_path):
    def row(rng: random.Random) -> dict:
        good = rng.choices(GOOD, k=rng.randint(0, 4))
        return {"text": sentence(rng, *good), "label": 1000.5 + 100 * len(good)}

    task = load_task(write_task(tmp_path / "counts", row))
    assert task.regression
    result = evaluate(tiny_bert, task, dataclasses.replace(QUICK, seeds=1), quiet)
    assert result["metric"] == "spearman"
    assert result["mean"]["test"]["spearman"] > 0.8
    assert result["baseline"]["undefined"] == ("spearman", "pearson")
    assert result["sd"]["test"]["spearman"] is None


def test_the_untrained_control_does_not_read_the_weights(tiny_bert, sentiment, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_bert.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    settings = dataclasses.replace(QUICK, untrained=True, seeds=1, epochs=1, max_train=31)
    result = evaluate(broken, sentiment, settings, quiet)
    assert result["samples"]["train"] == 31
    assert result["settings"]["untrained"]
    with pytest.raises(UserError, match="the model cannot be loaded"):
        evaluate(broken, sentiment, dataclasses.replace(settings, untrained=False), quiet)


def test_weights_missing_from_the_export_are_reported(tiny_bert, sentiment, tmp_path):
    settings = dataclasses.replace(QUICK, seeds=1, epochs=1, max_train=17)
    assert not any("start at random" in note for note in evaluate(tiny_bert, sentiment, settings, quiet)["notes"])
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in tiny_bert.iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    weights = load_file(partial / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    lines = []
    result = evaluate(partial, sentiment, settings, lines.append)
    notes = [note for note in result["notes"] if "start at random" in note]
    assert len(notes) == 1
    assert notes[0].startswith("1 weights of the encoder")
    assert "bert.encoder.layer.0.output.dense.weight" in notes[0]
    assert f"note: {notes[0]}" in lines


def test_a_decoder_without_a_pad_token_pads_with_its_end_token(sentiment, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = dataclasses.replace(QUICK, seeds=1, epochs=1, max_train=33)
    assert evaluate(tmp_path / "gpt2", sentiment, settings, quiet)["mean"]["test"]["accuracy"] > 0


def test_a_sample_beyond_the_models_positions_is_cut_and_told(tiny_bert, tmp_path):
    def row(rng: random.Random) -> dict:
        return {"text": "road " * rng.choice([3, 40]), "label": rng.randint(0, 1)}

    task = write_task(tmp_path / "long", row, (17, 5, 5))
    settings = dataclasses.replace(QUICK, seeds=1, epochs=1, max_length=128)
    notes = evaluate(tiny_bert, task, settings, quiet)["notes"]
    assert "the model takes 24 tokens, fewer than --max-length 128" in notes
    assert any(note.startswith("train: ") and note.endswith("longer than 24 tokens and were cut") for note in notes)


@pytest.mark.parametrize(
    ("metric", "hint"), [("acuracy", "did you mean 'accuracy'"), ("spearman", "unknown metric 'spearman'")]
)
def test_a_metric_of_another_kind_of_task_is_refused(tiny_bert, sentiment, metric, hint):
    with pytest.raises(UserError, match=hint):
        evaluate(tiny_bert, sentiment, dataclasses.replace(QUICK, metric=metric), quiet)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_bert, sentiment, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in tiny_bert.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["brook"])
    tokenizer.save_pretrained(mixed)
    with pytest.raises(UserError, match="tokens, the model"):
        evaluate(mixed, sentiment, QUICK, quiet)


@pytest.fixture(scope="module")
def classifier(tiny_bert, tmp_path_factory):
    """Folder of a sequence classifier for the labels bad and good, as an export would be."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        names = {0: "bad", 1: "good"}
        model = BertForSequenceClassification.from_pretrained(
            tiny_bert, id2label=names, label2id={name: i for i, name in names.items()}
        )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def head_of(source, tokenizer, **keys) -> torch.Tensor:
    return load_classifier(str(source), tokenizer, 2, **keys)[0].classifier.weight


def test_a_head_for_the_tasks_labels_in_their_order_is_kept_and_any_other_gives_way(
    classifier, tiny_bert, tokenizer, sentiment
):
    kept = BertForSequenceClassification.from_pretrained(classifier)
    assert torch.equal(head_of(classifier, tokenizer, new_head=False), kept.classifier.weight)
    drawn, random = load_classifier(str(classifier), tokenizer, 2)
    assert not torch.equal(drawn.classifier.weight, kept.classifier.weight) and not random
    state = kept.base_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in drawn.base_model.state_dict().items())
    untouched = Settings(epochs=1, lr=1e-9, max_length=24, seeds=2)  # the scores are those of the head it begins with
    task, notes = load_task(sentiment), []
    runs = evaluate(classifier, task, untouched, notes.append)["runs"]
    assert runs[0]["dev"] == runs[1]["dev"] and not any("head" in note for note in notes)
    flip = {"good": "bad", "bad": "worse"}
    renamed = dataclasses.replace(task, label_names=[flip[name] for name in reversed(task.label_names)])
    result = evaluate(classifier, renamed, untouched, notes.append)
    assert [run["loss_by_epoch"] for run in result["runs"]] != [run["loss_by_epoch"] for run in runs]
    assert any("a head for bad, good, which is not this task's: a new one is trained" in n for n in result["notes"])


def test_runs_begin_with_the_first_seed(tiny_bert, sentiment, learnt):
    (run,) = evaluate(tiny_bert, sentiment, dataclasses.replace(QUICK, seeds=1, first_seed=1), quiet)["runs"]
    assert without_time([run]) == without_time(learnt["runs"][1:])
