import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import MASK, VOCABULARY, lay_out, padded, random_samples, tiny_encoder
from tests.objectives.builders import ids_of, numbered, rows_of_samples
from tests.objectives.oracles import gumbel_draw

TERMS = ("correction/generator", "correction/discriminator")


def model_with(correction: dict | None = None, family: str = "bert", seed: int = 1) -> MultiObjectiveModel:
    """Return a model without dropout whose discriminator accuses about half of the tokens."""
    recipe = {
        "correction": correction or {},
        "rtd": {"masking": {"rate": 0.4}, "generator": {"embeddings": "separate"}},
    }
    torch.manual_seed(0)
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed)
    model = MultiObjectiveModel(tiny_encoder(family), objectives).eval()
    model.heads["detection"].dense_prediction.weight.data *= 10
    return model


def a_batch():
    rows = rows_of_samples(6)
    return numbered(rows, ids_of(rows), row_length=75)


def views_of(model, batch):
    return {name: objective.corrupt(batch, 0.25) for name, objective in model.objectives.items()}


def gradients(model, names, batch, scales):
    model.zero_grad(set_to_none=True)
    views = {name: view for name, view in views_of(model, batch).items() if name in names}
    model(views, {**dict.fromkeys(("rtd/generator", "rtd/discriminator"), 0.0), **scales})[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_both_rounds_are_those_of_a_loop_over_the_tokens(family):
    model, batch = model_with({"mistake_weight": 3.0}, family), a_batch()
    view = model.objectives["correction"].corrupt(batch, 0.25)
    _, first = model.objectives["rtd"].play(model, view)
    read, asked = [], []
    model.encoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.heads["generator"].encoder.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    losses = model.objectives["correction"].loss(model, view)

    notebook = {"true_positives": [], "false_negatives": [], "false_positives": []}
    masked = batch.tokens.clone()
    for place in batch.real.nonzero().tolist():
        row, column = place
        original, shown = int(batch.tokens[row, column]), int(first.tokens[row, column])
        accused = bool(first.accused[row, column])
        if shown != original:
            notebook["true_positives" if accused else "false_negatives"].append((row, column))
        elif accused:
            notebook["false_positives"].append((row, column))
    for place in notebook["true_positives"]:
        masked[place] = MASK
    assert torch.equal(asked[-1], masked)
    for name, places in notebook.items():
        assert len(places) > 5
        assert losses[f"correction/{name}"].sums.sum() == len(places)

    generator, layout = model.heads["generator"], Layout(batch)
    logits = generator.head(generator.encoder(masked, layout))
    expected, relearnt = batch.tokens.clone(), torch.zeros(len(batch.sample_ids))
    for place in notebook["false_negatives"]:
        expected[place] = first.tokens[place]
    for place in notebook["true_positives"]:
        sample = int(batch.segment_ids[place])
        identity = int(batch.position_ids[place]), int(batch.sample_ids[sample]), int(batch.visits[sample])
        expected[place] = gumbel_draw("correction/sample", logits[place], *identity)
        relearnt[sample] += F.cross_entropy(logits[place][None], batch.tokens[place][None])
    assert torch.equal(read[-1], expected)
    assert losses[TERMS[0]].sums.tolist() == pytest.approx(relearnt.tolist(), rel=1e-4, abs=1e-5)

    logits, detected = model.heads["detection"](model.encoder(expected, layout))[..., 0], torch.zeros_like(relearnt)
    positives = 0
    for place in batch.real.nonzero().tolist():
        place = tuple(place)
        label = float(expected[place] != batch.tokens[place])
        weight = 3.0 if place in notebook["false_negatives"] + notebook["false_positives"] else 1.0
        loss = F.binary_cross_entropy_with_logits(logits[place], torch.tensor(label))
        detected[batch.segment_ids[place]] += weight * loss
        positives += label
    assert losses[TERMS[1]].sums.tolist() == pytest.approx(detected.tolist(), rel=1e-4)
    assert losses["correction/positives"].sums.sum() == positives > 5


def test_the_round_of_the_same_step_is_taken_over_and_one_played_for_it_is_the_same():
    model, batch = model_with(), a_batch()
    scales, passes = dict.fromkeys(TERMS, 0.5), []
    for module, name in ((model.encoder, "backbone"), (model.heads["generator"].encoder, "generator")):
        module.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
    together = gradients(model, ("correction", "rtd"), batch, scales)
    assert sorted(passes) == ["backbone"] * 2 + ["generator"] * 2
    passes.clear()
    alone = gradients(model, ("correction",), batch, scales)
    assert sorted(passes) == ["backbone"] * 2 + ["generator"] * 2
    for name, gradient in alone.items():
        assert torch.equal(gradient, together[name]), name
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
    assert model.left == {}


def test_the_discriminator_gives_the_generator_no_gradient():
    model, batch = model_with(), a_batch()
    with_both = gradients(model, ("correction", "rtd"), batch, {**dict.fromkeys(TERMS, 0.5), "rtd/generator": 0.5})
    without = {TERMS[0]: 0.5, TERMS[1]: 0.0, "rtd/generator": 0.5}
    generator_only = gradients(model, ("correction", "rtd"), batch, without)
    of_generator = [name for name in with_both if name.startswith("heads.generator.")]
    assert of_generator
    for name in of_generator:
        assert torch.equal(with_both[name], generator_only[name]), name


@pytest.mark.parametrize("bias", [-1e4, 1e4], ids=["nothing is accused", "everything is accused"])
def test_an_empty_notebook_is_no_error(bias):
    model, batch = model_with(), a_batch()
    model.heads["detection"].dense_prediction.bias.data.fill_(bias)
    found = gradients(model, ("correction",), batch, dict.fromkeys(TERMS, 0.5))
    assert all(gradient.isfinite().all() for gradient in found.values())
    view = model.objectives["correction"].corrupt(batch, 0.25)
    losses = model.objectives["correction"].loss(model, view)
    sizes = {name: int(each.sums.sum()) for name, each in losses.items() if each.total is None}
    if bias < 0:
        assert losses[TERMS[0]].total == 0
        assert all((found[name] == 0).all() for name in found if name.startswith("heads.generator."))
        assert sizes["correction/true_positives"] == sizes["correction/false_positives"] == 0
        assert sizes["correction/positives"] == sizes["correction/false_negatives"] > 5
    else:
        assert sizes["correction/false_negatives"] == 0
        assert sizes["correction/false_positives"] == int(batch.real.sum()) - sizes["correction/true_positives"]


def test_rows_without_samples_have_an_empty_notebook():
    model = model_with()
    view = model.objectives["correction"].corrupt(lay_out([[], []], row_length=7), 0.0)
    losses = model.objectives["correction"].loss(model, view)
    assert all(each.sums.shape == (0,) for each in losses.values())


def test_what_stands_at_a_false_negative_and_who_hits_the_original_is_told_apart():
    """A replacement drawn anew that hits the original is original; one that was missed stays positive."""
    model, batch = model_with(), padded(random_samples([40, 23]))
    generator = model.heads["generator"]
    correction = model.objectives["correction"]
    view = correction.corrupt(batch, 0.25)
    _, first = model.objectives["rtd"].play(model, view)
    projection = generator.encoder.pretrained.get_output_embeddings()
    chosen = int(batch.tokens[first.replaced & first.accused].mode().values)
    projection.bias.data[chosen] = 1e4  # from now on every draw is this token
    model.left["rtd"] = first
    read = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    losses = correction.loss(model, view)
    caught, missed = first.replaced & first.accused, first.replaced & ~first.accused
    assert (read[0][caught] == chosen).all() and torch.equal(read[0][missed], first.tokens[missed])
    hits = int((batch.tokens[caught] == chosen).sum())
    assert hits > 0
    assert int(losses["correction/positives"].sums.sum()) == int(first.replaced.sum()) - hits


@pytest.mark.parametrize("others", [{}, {"mlm": {}}, {"rtd": {"source": "unigram"}}], ids=str)
def test_a_recipe_without_a_first_round_is_refused(others):
    objectives = build_objectives(parse_objectives({"correction": {}, **others}, "test"), VOCABULARY, seed=1)
    with pytest.raises(UserError, match=r"^objectives\.correction: .*; add rtd with source generator$"):
        MultiObjectiveModel(tiny_encoder("bert"), objectives)
