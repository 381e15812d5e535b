import numpy as np
import pytest
import torch
from torch import nn

from pretrain.data.tasks import Split
from pretrain.errors import UserError
from pretrain.evaluation.finetune import EncodedSplit, Finetuner, Settings, batches, encode, fine_tune
from pretrain.evaluation.metrics import Scores


def encoded(samples: int) -> EncodedSplit:
    return EncodedSplit([{"input_ids": [1]}] * samples, torch.zeros(samples, dtype=torch.int64), 0)


class Scripted(Finetuner):
    """Epoch e sets the weight to e; dev scores come from a script; test scores are the weight."""

    def __init__(self, dev_data, script):
        self.model = nn.Linear(1, 1, bias=False)
        self.settings = Settings(epochs=len(script))
        self.dev_data, self.script, self.epoch, self.tested_with, self.draws = dev_data, script, 0, [], []

    def train_epoch(self, *_):
        self.epoch += 1
        self.draws.append(torch.rand(()).item())
        with torch.no_grad():
            self.model.weight.fill_(self.epoch)
        return 1 / self.epoch

    def score(self, data):
        if data is self.dev_data:
            return Scores({"accuracy": self.script[self.epoch - 1]})
        self.tested_with.append(self.model.weight.item())
        return Scores({"accuracy": 0.5})


@pytest.mark.parametrize(("script", "best"), [([0.2, 0.9, 0.9], 2), ([0.9, 0.2, 0.1], 1), ([0.0], 1), ([0.1, 0.2], 2)])
def test_test_is_scored_once_with_the_weights_of_the_first_epoch_best_on_dev(script, best):
    splits = {"train": encoded(5), "dev": encoded(3), "test": encoded(3)}
    tuner = Scripted(splits["dev"], script)
    result = fine_tune(tuner, splits, "accuracy", seed=0, log=lambda line: None)
    assert tuner.tested_with == [best]
    assert (result.epoch, result.dev.values["accuracy"], result.dev_by_epoch) == (best, max(script), script)


@pytest.mark.parametrize(
    ("script", "patience", "epochs"),
    [([0.5, 0.4, 0.5, 0.9], 2, 3), ([0.5, 0.4, 0.6, 0.5, 0.6, 0.9], 3, 6), ([0.5, 0.6], 1, 2), ([0.5, 0.5], 1, 2)],
)
def test_training_ends_after_epochs_without_improvement_on_dev(script, patience, epochs):
    splits = {"train": encoded(5), "dev": encoded(3), "test": encoded(3)}
    tuner = Scripted(splits["dev"], script)
    tuner.settings = Settings(epochs=len(script), patience=patience)
    result = fine_tune(tuner, splits, "accuracy", seed=0, log=lambda line: None)
    assert result.dev_by_epoch == script[:epochs] and len(result.loss_by_epoch) == epochs
    assert tuner.tested_with == [script.index(max(script[:epochs])) + 1]


def test_dropout_depends_on_the_seed_alone():
    splits = {"train": encoded(5), "dev": encoded(3), "test": encoded(3)}
    draws = []
    for seed in (0, 0, 1):
        torch.rand(7)  # whatever was drawn before, loading the weights for one
        tuner = Scripted(splits["dev"], [0.1, 0.2])
        fine_tune(tuner, splits, "accuracy", seed, log=lambda line: None)
        draws.append(tuner.draws)
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("samples", [1, 7, 513])
def test_batches_hold_every_sample_once_and_depend_on_the_generator_alone(samples):
    lengths = np.random.default_rng(0).integers(1, 90, samples)
    dealt, again, other = (batches(lengths, 5, np.random.default_rng((seed, 1))) for seed in (3, 3, 4))
    assert sorted(np.concatenate(dealt)) == list(range(samples))
    assert sorted(map(len, dealt), reverse=True)[0] <= 5
    assert np.array_equal(np.concatenate(dealt), np.concatenate(again))
    assert samples < 7 or not np.array_equal(np.concatenate(dealt), np.concatenate(other))


def test_batches_bring_like_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 90, 201)
    padded = sum(lengths[part].max() * len(part) for part in batches(lengths, 4, np.random.default_rng(0)))
    assert padded < 1.1 * lengths.sum()


def test_encoding_keeps_the_limit_and_counts_what_it_cut(tokenizer):
    split = Split(["the old man", "", "the man was very old"], ["a road", "river", "a long road"], [0, 1, 0])
    data = encode(split, tokenizer, ["input_ids", "attention_mask", "token_type_ids"], 8, regression=False)
    assert data.cut == 1  # [CLS] 5 [SEP] 3 [SEP] is 11; the first is exactly 8
    assert data.lengths.tolist() == [8, 4, 8]
    assert data.inputs[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert data.inputs[2]["input_ids"][0] == tokenizer.cls_token_id
    assert data.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"seeds": 0}, {"max_length": 1}, {"lr": 5.0}, {"patience": 0}]
)
def test_settings_out_of_range_name_the_option(wrong):
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        Settings(**wrong)
