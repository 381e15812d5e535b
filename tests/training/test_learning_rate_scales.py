"""Learning rates by component."""

import pytest
import torch

from pretrain.export import load_model
from pretrain.recipe import load_recipe
from pretrain.training.build import build
from tests.training.runs import recipe, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def moved(corpus, run, objectives=("mlm", "sop"), **scales) -> dict[str, torch.Tensor]:
    """Return component → how far one step moved its parameters, by their order."""
    keys = {"rtd": {"generator": {"embeddings": "disentangled"}}}
    key = {"training__optimizer__learning_rate_scales": {name.replace("_", "/"): f for name, f in scales.items()}}
    document = recipe(corpus, run, sampler={}, training__steps=1, **key)
    document["objectives"] = {name: keys.get(name, {}) for name in objectives}
    document["training"]["optimizer"]["weight_decay"] = 0.1
    assert train(document)[0] == 0
    folder = run / "checkpoints" / "step-00000001"
    loaded = load_recipe(folder / "config.yaml")
    start = build(loaded, dtype=torch.float32)
    end = load_model(folder, loaded, start.vocabulary).components()
    return {
        name: torch.cat([(after - before).flatten() for before, after in zip(params, end[name], strict=True)]).detach()
        for name, params in start.components.items()
    }


def test_a_factor_scales_the_steps_of_its_component_alone(corpus, tmp_path):
    plain, scaled = moved(corpus, tmp_path / "plain"), moved(corpus, tmp_path / "scaled", head_order=10.0, backbone=0.0)
    assert plain["backbone"].abs().max() > 0 and not scaled["backbone"].any()
    torch.testing.assert_close(scaled["head/order"], 10 * plain["head/order"], rtol=1e-3, atol=1e-6)
    assert torch.equal(scaled["head/vocabulary"], plain["head/vocabulary"]) and plain["head/vocabulary"].any()


def test_the_generators_factor_scales_the_embedding_that_it_trains_and_not_what_the_backbone_adds(corpus, tmp_path):
    plain, scaled = (
        moved(corpus, tmp_path / str(factor), ["rtd"], generator=factor, backbone=1.0) for factor in (1.0, 2.0)
    )
    assert torch.equal(scaled["backbone"], plain["backbone"]) and plain["backbone"].any()
    torch.testing.assert_close(scaled["generator"], 2 * plain["generator"], rtol=1e-3, atol=1e-6)
    embedding = slice(0, 96 * 32)  # the generator's first parameter
    assert plain["generator"][embedding].any() and scaled["generator"][embedding].any()


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ({"head/ordre": 10.0}, "learning_rate_scales: unknown component 'head/ordre'; did you mean 'head/order'?"),
        ({"backbone": -1.0}, "learning_rate_scales.backbone: "),
    ],
)
def test_a_wrong_component_or_factor_is_refused_before_the_run_begins(corpus, tmp_path, scales, reason):
    key = {"training__optimizer__learning_rate_scales": scales}
    code, _, error = train(recipe(corpus, tmp_path / "run", objectives={"sop": {}}, sampler={}, **key))
    assert code == 2 and len(error.splitlines()) == 1
    assert ".rank0.yaml: training.optimizer." in error and reason in error
    assert not (tmp_path / "run").exists()
