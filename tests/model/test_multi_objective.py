import itertools

import pytest
import torch

from pretrain.errors import UserError
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import VOCABULARY, lay_out, random_samples, tiny_encoder
from tests.objectives.builders import annotated

RECIPES = [
    ("bert", {"mlm": {}}),
    ("bert", {"mlm": {}, "rtd": {}, "cse": {"group_rows": 2}, "clm": {}}),
    ("electra", {"rtd": {"generator": {"width": 0.5, "embeddings": "separate"}}, "mlm": {}}),
    ("modernbert", {"clm": {}, "rtd": {}}),
    ("roberta", {"cse": {"group_rows": 2}, "rtd": {}, "mlm": {}}),
    ("bert", {"itd": {"source": "generator"}, "rtd": {}, "std": {}, "dtd": {}, "sop": {}}),
    ("electra", {"itd": {"source": "generator"}, "rtd": {"generator": {"embeddings": "disentangled"}}, "std": {}}),
    ("modernbert", {"rtd": {"source": "unigram"}, "itd": {}, "guided_mlm": {}, "mlm": {}}),
    ("llama", {"clm": {}}),
    ("gpt2", {"clm": {}, "cse": {"group_rows": 2, "pooling": "mean"}}),
]


def build(family: str, recipe: dict, dropout: float = 0.1) -> MultiObjectiveModel:
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed=1)
    return MultiObjectiveModel(tiny_encoder(family, dropout=dropout), objectives)


def a_batch():
    samples = random_samples([5, 37, 3, 16, 17, 2, 23])
    return annotated(lay_out([samples[:2], samples[2:4], samples[4:6], samples[6:]]))


@pytest.mark.parametrize(("family", "recipe"), RECIPES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_components_hold_every_parameter_exactly_once(family, recipe):
    model = build(family, recipe)
    components = model.components()
    listed = [id(p) for params in components.values() for p in params]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    assert next(iter(components)) == "backbone"
    assert all(components.values())


@pytest.mark.parametrize(("family", "recipe"), RECIPES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_a_plan_trains_the_components_it_names_and_gives_the_others_no_gradient(family, recipe):
    model = build(family, recipe).train()
    batch = a_batch()
    components = model.components()
    for size in range(1, len(recipe) + 1):
        for plan in itertools.combinations(recipe, size):
            model.zero_grad(set_to_none=True)
            views = {name: model.objectives[name].corrupt(batch, 0.0) for name in plan}
            terms = {term: 1.0 for name in plan for term in model.objectives[name].terms}
            loss, _ = model(views, terms)
            loss.backward()
            trained = model.trained_by(list(plan))
            for component, params in components.items():
                gradients = [p.grad is not None for p in params]
                assert all(gradients) if component in trained else not any(gradients), (plan, component)


def test_objectives_with_a_head_in_common_share_it():
    model = build("bert", {"mlm": {}, "clm": {}})
    assert list(model.heads) == ["vocabulary"]
    assert model.trained_by(["mlm"]) == model.trained_by(["clm"]) == {"backbone", "head/vocabulary"}


def test_a_tied_embedding_belongs_to_the_backbone_and_the_rest_of_the_head_to_the_head():
    model = build("bert", {"mlm": {}})
    components = model.components()
    embedding = model.encoder.backbone.get_input_embeddings().weight
    assert any(p is embedding for p in components["backbone"])
    assert not any(p is embedding for p in components["head/vocabulary"])
    assert sum(p.numel() for p in components["head/vocabulary"]) == 32 * 32 + 3 * 32 + VOCABULARY.size


def test_a_head_whose_parameters_are_all_the_backbones_is_no_component():
    assert set(build("gpt2", {"clm": {}}).components()) == {"backbone"}
    assert build("gpt2", {"clm": {}}).trained_by(["clm"]) == {"backbone"}


def test_the_loss_is_the_scaled_and_weighted_sum_of_the_samples_sums():
    model = build("bert", {"mlm": {}, "rtd": {}}, dropout=0.0)
    batch = a_batch()
    views = {name: objective.corrupt(batch, 0.0) for name, objective in model.objectives.items()}
    scales = {"mlm": 0.3, "rtd/generator": 2.0, "rtd/discriminator": 0.07}
    weights = torch.rand(len(batch.sample_ids))
    loss, sums = model(views, scales, dict.fromkeys(views, weights))
    assert set(sums) == {*scales, "rtd/positives"}
    assert all(
        total.shape == (7,) and total.dtype == torch.float32 and not total.requires_grad for total in sums.values()
    )
    assert torch.isclose(loss, sum(scales[term] * (weights * sums[term]).sum() for term in scales))
    unweighted, _ = model(views, scales)
    assert torch.isclose(unweighted, sum(scales[term] * sums[term].sum() for term in scales))
    partly, _ = model(views, scales, {"rtd": weights})
    expected = scales["mlm"] * sums["mlm"].sum()
    expected += sum(scales[term] * (weights * sums[term]).sum() for term in ("rtd/generator", "rtd/discriminator"))
    assert torch.isclose(partly, expected)


@pytest.mark.parametrize(
    ("family", "recipe", "message"),
    [
        ("llama", {"mlm": {}}, r"objectives\.mlm: 'llama' is a decoder.*use clm"),
        ("gpt2", {"rtd": {}}, r"objectives\.rtd: 'gpt2' is a decoder"),
        ("deberta-v2", {"clm": {}}, r"objectives\.clm: the attention of 'deberta-v2'"),
    ],
)
def test_an_objective_that_does_not_fit_the_backbone_is_refused(family, recipe, message):
    with pytest.raises(UserError, match=message):
        build(family, recipe)
