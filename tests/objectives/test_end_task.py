"""The end task: draws by a plain loop, losses by transformers' own classifiers, mistakes in one line."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from transformers import BertForSequenceClassification, RobertaForSequenceClassification

from fused_objectives.philox import philox
from pretrain.errors import UserError
from pretrain.evaluation.end_task import task_scores
from pretrain.model.classifier import sequence_classifier
from pretrain.objectives.end_task import EndTask
from tests.builders import PAD, VOCABULARY, lay_out, random_samples, word_tokenizer
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples, write_task

SEED = 1


def read(folder, split: str) -> list[tuple[list[int], object]]:
    """Return a split's samples as the store's tokenizer frames them, with their labels as they stand in the file."""
    tokenizer, rows = word_tokenizer(), map(json.loads, (folder / f"{split}.jsonl").read_text().splitlines())
    texts = [((row["text"],) if "text" in row else (row["text_a"], row["text_b"]), row["label"]) for row in rows]
    return [(tokenizer(*text)["input_ids"], label) for text, label in texts]


def one_row_each(rows: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "letters", seed=4)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "numbers", seed=5, regression=True, pairs=True)


def packed(rows: int = 6, first_row: int = 0, seed: int = 0):
    samples = rows_of_samples(rows, seed)
    return numbered(samples, ids_of(samples, 40), first_row=first_row)


@pytest.mark.parametrize("each", [1, 3])
def test_every_row_draws_by_the_id_and_visit_of_its_first_sample(folder, each):
    objective = model_with("end_task", task=str(folder), samples_per_row=each).objectives["end_task"]
    samples = rows_of_samples(7)
    samples[2] = []
    numbers = [[(2**33 if row == 4 else 0) + number for number in ids] for row, ids in enumerate(ids_of(samples, 40))]
    batch = numbered(samples, numbers)
    view = objective.corrupt(batch, 0.7)
    train, letters = read(folder, "train"), "abc"
    longest = max(len(tokens) for tokens, _ in train)
    assert view.draw.samples.tokens.shape == (7 * each, longest)
    for row, ids in enumerate(numbers):
        for draw in range(each):
            place = row * each + draw
            assert bool(view.draw.counted[place]) == bool(ids)
            if not ids:
                continue
            word = philox(SEED, "end_task", draw, ids[0] & 0xFFFFFFFF, ids[0] >> 32, ids[0] % 3)[0]
            tokens, label = train[word * len(train) >> 32]
            assert view.draw.samples.tokens[place].tolist() == tokens + [PAD] * (longest - len(tokens))
            assert view.labels[place] == letters.index(label)
    first_of_a_row = [ids[0] if ids else None for ids in numbers]
    counts = dict(zip(batch.sample_ids.tolist(), view.counts["end_task"].tolist(), strict=True))
    assert counts == {number: each * (number in first_of_a_row) for ids in numbers for number in ids}
    assert len(set(view.draw.samples.sample_ids.tolist())) > 2


def test_draws_change_with_seed_and_visit_and_reach_every_sample_equally(folder):
    def drawn(seed=SEED, visit=0, rows=2300):
        objective = model_with("end_task", seed=seed, task=str(folder)).objectives["end_task"]
        batch = lay_out([random_samples([1])] * rows, visits=[visit] * rows)
        return objective.corrupt(batch, 0.0).draw.samples.sample_ids

    base = drawn()
    for other in (drawn(seed=2), drawn(visit=1)):
        assert (other != base).float().mean() > 0.9
    counts = torch.bincount(base, minlength=23)
    assert ((counts - 100).abs() < 5 * math.sqrt(100)).all()  # five standard deviations


def test_draws_of_a_row_are_the_same_in_any_micro_batch_and_any_packing(folder):
    objective = model_with("end_task", task=str(folder), samples_per_row=2).objectives["end_task"]
    samples = rows_of_samples(8)
    ids = ids_of(samples)
    whole = objective.corrupt(numbered(samples, ids), 0.0)
    for start in range(0, 8, 2):
        rows = slice(start, start + 2)
        part = objective.corrupt(numbered(samples[rows], ids[rows], first_row=start, row_length=101), 0.0)
        for field in ("tokens", "sample_ids", "sample_rows", "lengths"):
            assert torch.equal(
                getattr(part.draw.samples, field), getattr(whole.draw.samples, field)[2 * start : 2 * start + 4]
            )
    alone = objective.corrupt(numbered([row[:1] for row in samples], [row[:1] for row in ids]), 0.0)
    assert torch.equal(alone.draw.samples.tokens, whole.draw.samples.tokens)


def by_hand(model, objective, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Pool and apply the head, one sample at a time, with matrix products written out."""
    head = model.heads["end_task"].state_dict()
    logits = []
    for states, length in zip(hidden, lengths, strict=True):
        pooled = states[0] if objective.config.pooling == "first" else states[:length].mean(0)
        dense = torch.tanh(head["dense.weight"] @ pooled + head["dense.bias"])
        logits.append(head["out_proj.weight"] @ dense + head["out_proj.bias"])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "pooling"), [("bert", "first"), ("bert", "mean"), ("roberta", "first"), ("llama", "mean")]
)
def test_the_loss_is_that_of_the_backbone_and_a_head_written_by_hand(folder, family, pooling):
    model = model_with("end_task", family, task=str(folder), pooling=pooling)
    objective, batch = model.objectives["end_task"], packed()
    view = objective.corrupt(batch, 0.0)
    sums = objective.loss(model, view)["end_task"].sums
    train = read(folder, "train")
    chosen = [train[index] for index in view.draw.samples.sample_ids.tolist()]
    plain = copy.deepcopy(model.encoder.backbone)
    plain.set_attn_implementation("eager")
    losses = []
    for tokens, label in chosen:
        positions = torch.arange(len(tokens))[None] + model.encoder.first_position
        hidden = plain(input_ids=torch.tensor([tokens]), position_ids=positions).last_hidden_state
        logits = by_hand(model, objective, hidden, [len(tokens)])
        losses.append(F.cross_entropy(logits, torch.tensor(["abc".index(label)])).item())
    firsts = [int(row[0]) for row in batch.segment_ids]
    assert sums[firsts].tolist() == pytest.approx(losses, rel=1e-4)
    assert sums.sum().item() == pytest.approx(sum(losses), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "theirs"), [("bert", BertForSequenceClassification), ("roberta", RobertaForSequenceClassification)]
)
def test_the_loss_and_the_export_are_those_of_transformers_own_classifier(folder, tmp_path, family, theirs):
    model = model_with("end_task", family, task=str(folder))
    objective = model.objectives["end_task"]
    view = objective.corrupt(packed(), 0.0)
    total, _ = objective.loss(model, view)["end_task"]
    sequence_classifier(model.encoder, model.heads["end_task"]).save_pretrained(tmp_path)
    classifier = theirs.from_pretrained(tmp_path).eval()
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"}
    mask = view.draw.samples.real.long()
    loss = classifier(input_ids=view.draw.samples.tokens, attention_mask=mask, labels=view.labels).loss
    assert total.item() / 6 == pytest.approx(loss.item(), rel=1e-4)


@torch.no_grad()
def test_numbers_are_standardised_in_training_and_come_back_in_their_own_scale(numbers, tmp_path):
    model = model_with("end_task", task=str(numbers))
    objective = model.objectives["end_task"]
    view = objective.corrupt(packed(), 0.0)
    sums = objective.loss(model, view)["end_task"].sums
    train = read(numbers, "train")
    labels = np.array([label for _, label in train])
    classifier = BertForSequenceClassification.from_pretrained(
        _saved(sequence_classifier(model.encoder, model.heads["end_task"]), tmp_path)
    ).eval()
    assert classifier.config.problem_type == "regression" and classifier.config.num_labels == 1
    expected = 0.0
    for index in view.draw.samples.sample_ids.tolist():
        predicted = classifier(input_ids=torch.tensor([train[index][0]])).logits.item()
        expected += ((predicted - labels[index]) / labels.std()) ** 2
    assert sums.sum().item() == pytest.approx(expected, rel=1e-3)
    found = objective.predictions(model, "test").tolist()
    test = [classifier(input_ids=torch.tensor([tokens])).logits.item() for tokens, _ in read(numbers, "test")]
    assert found == pytest.approx(test, rel=1e-4)


def _saved(classifier, folder):
    classifier.save_pretrained(folder)
    return folder


def test_a_row_is_weighed_with_its_first_sample_and_a_row_without_samples_not_at_all(folder):
    model = model_with("end_task", task=str(folder), samples_per_row=2)
    objective = model.objectives["end_task"]
    samples = rows_of_samples(5)
    samples[3] = []
    batch = numbered(samples, ids_of(samples), row_length=70)
    view = objective.corrupt(batch, 0.0)
    firsts = [next((int(s) for s in row if s >= 0), -1) for row in batch.segment_ids]
    weights = torch.rand(len(batch.sample_ids), generator=torch.Generator().manual_seed(0))
    total, sums = objective.loss(model, view, weights)["end_task"]
    assert firsts[3] == -1 and (view.draw.counted.view(5, 2).all(1) == torch.tensor([1, 1, 1, 0, 1]).bool()).all()
    assert [int(i) for i in sums.nonzero()] == [first for first in firsts if first >= 0]
    assert total.item() == pytest.approx(float((weights * sums).sum()), rel=1e-5)
    others = torch.ones(len(weights))
    others[[first for first in firsts if first >= 0]] = 0
    nothing, _ = objective.loss(model, view, others)["end_task"]
    assert nothing.item() == 0.0 and nothing.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("micro_rows", [2, 5, 10])
def test_with_rows_enough_the_heldout_loss_is_that_of_the_whole_dev_split(folder, micro_rows):
    model = model_with("end_task", task=str(folder))
    objective = model.objectives["end_task"]
    samples = rows_of_samples(10)
    ids, total, count, seen = ids_of(samples), 0.0, 0, []
    for start in range(0, 10, micro_rows):
        rows = slice(start, start + micro_rows)
        view = objective.heldout_view(numbered(samples[rows], ids[rows], first_row=start))
        total += float(objective.loss(model, view)["end_task"].sums.sum())
        count += int(view.counts["end_task"].sum())
        seen += view.draw.samples.tokens[view.draw.counted].tolist()
    dev = read(folder, "dev")
    assert count == len(dev) == 7
    longest = max(len(tokens) for tokens, _ in dev)
    assert sorted(seen) == sorted(one_row_each([tokens for tokens, _ in dev], longest).tolist())
    losses = []
    for tokens, label in dev:
        batch = lay_out([[np.array(tokens)]])
        logits = model.heads["end_task"](objective.features(model.encoder, batch))
        losses.append(F.cross_entropy(logits, torch.tensor(["abc".index(label)])).item())
    assert total == pytest.approx(sum(losses), rel=1e-4)


def test_few_heldout_rows_measure_a_mixture_of_a_dev_split_that_is_sorted_by_label(tmp_path):
    folder = write_task(tmp_path / "sorted", dev=60)
    lines = sorted((folder / "dev.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["label"])
    (folder / "dev.jsonl").write_text("\n".join(lines))
    objective = model_with("end_task", task=str(folder)).objectives["end_task"]
    batch = lay_out([random_samples([1])] * 12)
    views = [objective.heldout_view(batch) for _ in range(2)]
    assert len(set(views[0].labels.tolist())) == 3
    assert torch.equal(views[0].draw.samples.tokens, views[1].draw.samples.tokens)


def test_scores_on_dev_are_those_of_predictions_one_by_one_and_leave_the_model_in_training(folder):
    model = model_with("end_task", task=str(folder)).train()
    objective = model.objectives["end_task"]
    scores = task_scores(model, objective, "dev")
    assert model.training and model.heads["end_task"].dropout.training
    model.eval()
    predicted, labels = [], []
    for tokens, label in read(folder, "dev"):
        hidden = objective.features(model.encoder, lay_out([[np.array(tokens)]]))
        predicted.append(int(model.heads["end_task"](hidden).argmax()))
        labels.append("abc".index(label))
    assert scores.values["accuracy"] == pytest.approx(np.mean(np.array(predicted) == labels))
    assert scores.values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_dropout_is_in_the_head_alone_at_the_rate_of_the_recipe(folder):
    model = model_with("end_task", task=str(folder), dropout=0.0)
    objective = model.objectives["end_task"]
    view = objective.corrupt(packed(), 0.0)
    sums = {}
    for rate in (None, 0.0, 0.5):
        if rate is not None:
            objective.config = objective.config.model_copy(update={"dropout": rate})
            head = objective.build_heads(model.encoder)["end_task"]
            head.load_state_dict(model.heads["end_task"].state_dict())
            model.heads["end_task"] = head.train()
        torch.manual_seed(0)
        sums[rate] = objective.loss(model, view)["end_task"].sums
    assert torch.equal(sums[0.0], sums[None]) and not torch.equal(sums[0.5], sums[None])


def test_a_limit_cuts_samples_and_tells_how_many(folder):
    objective = model_with("end_task", task=str(folder), max_length=9).objectives["end_task"]
    cut = sum(len(tokens) > 9 for tokens, _ in read(folder, "train"))
    assert f"train: {cut} of 23 samples were cut" in objective.notes and cut > 0
    assert objective.corrupt(packed(), 0.0).draw.samples.tokens.shape[1] == 9
    assert all("cut" not in note for note in model_with("end_task", task=str(folder)).objectives["end_task"].notes)


@pytest.mark.parametrize("family", ["electra", "modernbert", "distilbert", "deberta-v2", "gpt2"])
def test_families_with_another_head_are_not_exported_as_classifiers(folder, family):
    pooling = "mean" if family == "gpt2" else "first"
    model = model_with("end_task", family, task=str(folder), pooling=pooling)
    with pytest.raises(UserError, match=f"head of family '{family}' is not"):
        sequence_classifier(model.encoder, model.heads["end_task"])


def refused(**keys) -> str:
    with pytest.raises(UserError) as caught:
        model_with("end_task", **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_line_that_names_the_key(folder, tmp_path):
    assert "objectives.end_task.task" in refused(task="") and "objectives.end_task.task" in refused(task=None)
    line = refused(task=str(tmp_path / "nowhere"))
    assert line.startswith("objectives.end_task.task: ") and "no such folder" in line
    assert "did you mean 'mrpc'" in refused(task="mrcp")
    line = refused(task=str(folder), label_field="lable")
    assert "no field 'lable'" in line and "did you mean label_field label" in line and "--" not in line
    line = refused(task=str(folder), text_field="sentence")
    assert "no field 'sentence'" in line and "text_field" in line and "--" not in line
    assert "is not a finite number" in refused(task=str(folder), regression=True)
    assert "a decoder's first token sees nothing else; use 'mean'" in refused(task=str(folder), family="llama")
    assert "max_length" in refused(task=str(folder), max_length=3)
    assert "samples_per_row" in refused(task=str(folder), samples_per_row=0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"text": "w5"}, "no field 'label'"), ({"text": "w5", "label": None}, "is no class"),
     ({"text": "w5", "label": "a"}, "every training sample has the label 'a'")],
)  # fmt: skip
def test_a_task_without_labels_or_with_a_single_one_is_refused(tmp_path, row, reason):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    line = refused(task=str(tmp_path))
    assert line.startswith("objectives.end_task.task: ") and reason in line


def test_texts_longer_than_the_models_positions_are_refused(tmp_path):
    folder = write_task(tmp_path / "long")
    with open(folder / "test.jsonl", "a") as file:
        file.write(json.dumps({"text": " ".join(["w7"] * 600), "label": "a"}) + "\n")
    line = refused(task=str(folder), max_length=600)
    assert "objectives.end_task.max_length" in line and "600 tokens" in line and "512 or less" in line
    line = refused(task=str(folder), family="roberta", max_length=600)
    assert "512 or less" in line
    assert model_with("end_task", task=str(folder), max_length=512)


def test_an_export_knows_the_labels_without_the_tasks_files(folder):
    model = model_with("end_task", task=str(folder))
    objective = model.objectives["end_task"]
    unprepared = EndTask(objective.config, VOCABULARY, SEED)
    unprepared.check(model.encoder)
    heads = unprepared.build_heads(model.encoder)
    assert heads["end_task"].out_proj.out_features == 3
    assert objective.fingerprint and unprepared.fingerprint is None and unprepared.notes == []
