"""Masked language modelling on a task's texts: draws by a plain loop, masks counted, losses by transformers' model."""

import pytest
import torch
from scipy import stats

from fused_objectives.philox import philox
from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import MASK, VOCABULARY, lay_out, random_samples, tiny_encoder, word_tokenizer
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples, write_task

SEED = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / "letters", seed=4)


def objective_on(folder, **keys):
    return model_with("task_mlm", task=str(folder), **keys).objectives["task_mlm"]


def packed(rows: int = 7):
    samples = rows_of_samples(rows)
    return numbered(samples, ids_of(samples, 40))


def test_every_row_draws_texts_by_its_first_sample_independently_of_the_end_task(folder):
    objective = objective_on(folder, samples_per_row=2)
    batch = packed()
    view = objective.corrupt(batch, 0.0)
    expected = []
    for row in range(7):
        first = int(batch.sample_ids[batch.segment_ids[row, 0]])
        expected += [philox(SEED, "task_mlm", draw, first, 0, first % 3)[0] * 23 >> 32 for draw in range(2)]
    assert view.draw.samples.sample_ids.tolist() == expected
    end_task = model_with("end_task", task=str(folder), samples_per_row=2).objectives["end_task"]
    assert end_task.corrupt(batch, 0.0).draw.samples.sample_ids.tolist() != expected


def test_masks_have_the_rate_and_the_split_of_the_recipe_and_differ_from_draw_to_draw(folder):
    objective = objective_on(folder, masking={"rate": 0.3, "split": {"mask": 0.5, "random": 0.25}})
    view = objective.corrupt(lay_out([random_samples([1])] * 4000), 0.0)
    drawn, masked = view.draw.samples, view.masked
    text = drawn.real & ~torch.isin(drawn.tokens, torch.from_numpy(VOCABULARY.special_ids))
    chosen = masked.labels != IGNORED
    assert not (chosen & ~text).any() and torch.equal(masked.labels[chosen], drawn.tokens[chosen])
    assert torch.equal(masked.tokens[~chosen], drawn.tokens[~chosen])
    hidden, other = chosen & (masked.tokens == MASK), chosen & (masked.tokens != MASK)
    for count, of, share in ((chosen, text, 0.3), (hidden, chosen, 0.5), (other, chosen, 0.5)):
        low, high = stats.binom.interval(0.9999, int(of.sum()), share)
        assert low <= int(count.sum()) <= high
    assert int((other & (masked.tokens != drawn.tokens)).sum()) == pytest.approx(int(other.sum()) / 2, rel=0.1)
    longest = int(drawn.sample_ids[drawn.lengths.argmax()])
    patterns = {tuple(row) for row in chosen[drawn.sample_ids == longest].tolist()}
    assert len(patterns) > 100


def test_targets_are_counted_for_the_rows_first_sample(folder):
    objective = objective_on(folder, samples_per_row=2)
    samples = rows_of_samples(5)
    samples[3] = []
    batch = numbered(samples, ids_of(samples), row_length=70)
    view = objective.corrupt(batch, 0.0)
    counts = dict.fromkeys(range(len(batch.sample_ids)), 0)
    for row in (0, 1, 2, 4):
        labels = view.masked.labels[2 * row : 2 * row + 2]
        counts[int(batch.segment_ids[row, 0])] = int((labels != IGNORED).sum())
    assert view.counts["task_mlm"].tolist() == list(counts.values())
    assert (view.masked.labels[6:8] == IGNORED).all()


@torch.no_grad()
def test_the_loss_is_that_of_transformers_masked_language_model(folder):
    model = model_with("task_mlm", task=str(folder), masking={"rate": 0.4})
    objective = model.objectives["task_mlm"]
    view = objective.corrupt(packed(), 0.0)
    total, sums = objective.loss(model, view)["task_mlm"]
    weights = torch.rand(len(sums), generator=torch.Generator().manual_seed(0))
    weighted, _ = objective.loss(model, view, weights)["task_mlm"]
    theirs = model.encoder.pretrained
    theirs.set_attn_implementation("eager")
    mask = view.draw.samples.real.long()
    loss = theirs(input_ids=view.masked.tokens, attention_mask=mask, labels=view.masked.labels).loss
    assert total.item() / int(view.counts["task_mlm"].sum()) == pytest.approx(loss.item(), rel=1e-5)
    assert weighted.item() == pytest.approx(float((weights * sums).sum()), rel=1e-5)


def test_heldout_views_are_of_all_dev_texts_masked_alike_every_time(folder):
    objective = objective_on(folder, masking={"rate": {"schedule": "linear", "from": 0.5, "to": 0.1}})
    batch = packed(10)
    views = [objective.heldout_view(batch) for _ in range(2)]
    drawn = views[0].draw.samples.sample_ids[views[0].draw.counted]
    assert sorted(drawn.tolist()) == list(range(7))
    dev, laid_out = objective.splits["dev"], views[0].draw.samples
    for row, number in enumerate(drawn.tolist()):
        text = dev.tokens[dev.offsets[number] :][: dev.lengths[number]]
        assert torch.equal(laid_out.tokens[row][laid_out.real[row]], text.long())
    assert torch.equal(views[0].masked.tokens, views[1].masked.tokens)
    in_other_rows = objective.heldout_view(numbered(rows_of_samples(10, seed=5), ids_of(rows_of_samples(10, seed=5))))
    assert torch.equal(in_other_rows.masked.tokens[:7], views[0].masked.tokens[:7])
    assert (views[0].masked.labels[7:] == IGNORED).all() and (views[0].masked.labels[:7] != IGNORED).any()


def test_the_vocabulary_head_is_shared_with_masked_language_modelling(folder):
    configs = parse_objectives({"mlm": {}, "task_mlm": {"task": str(folder)}}, "test")
    objectives = build_objectives(configs, VOCABULARY, SEED)
    objectives["task_mlm"].prepare(word_tokenizer(), 24)
    model = MultiObjectiveModel(tiny_encoder("bert"), objectives)
    assert list(model.heads) == ["vocabulary"]
    assert model.trained_by(["task_mlm"]) == model.trained_by(["mlm"])


def test_mistakes_are_one_line_that_names_the_key(folder):
    for keys, reason in (
        ({"masking": {"policy": "salient"}}, "objectives.task_mlm.masking: policy 'salient' reads an annotation"),
        ({"masking": {"policy": "pos_weighted"}}, "use random, whole_word, span or frequency"),
        ({"family": "llama"}, "objectives.task_mlm: 'llama' is a decoder"),
        ({"task": "mrcp"}, "objectives.task_mlm.task: "),
        ({"max_length": 3}, "objectives.task_mlm.max_length"),
    ):
        with pytest.raises(UserError) as caught:
            objective_on(**{"folder": folder, **keys}) if "task" not in keys else model_with("task_mlm", **keys)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["whole_word", "span", "frequency"])
def test_policies_that_need_no_annotation_hide_texts(folder, policy):
    view = objective_on(folder, masking={"policy": policy, "rate": 0.4}).corrupt(packed(), 0.0)
    assert int(view.counts["task_mlm"].sum()) > 5
