"""``impl`` changes how a run computes, not what."""

import pytest
import torch

from fused_objectives.backend import INTERPRETED
from pretrain.model.multi_objective import MultiObjectiveModel
from tests.training.runs import metrics, recipe, train, write_corpus

STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_with(impl: str, corpus, folder, monkeypatch) -> tuple[list[dict], list[torch.Tensor]]:
    """Train and return the records and everything that the objectives corrupted, in order."""
    seen = []
    forward = MultiObjectiveModel.forward

    def recording(model, views, scales, weights=None):
        for name in sorted(views):
            seen.append(views[name].tokens.clone())
            seen.append(getattr(views[name], "labels", views[name].tokens).clone())
        return forward(model, views, scales, weights)

    objectives = {"mlm": {"masking": {"rate": {"schedule": "linear", "from": 0.4, "to": 0.2}}}, "rtd": {}, "clm": {}}
    document = recipe(
        corpus, folder / impl, impl=impl, objectives=objectives, sampler={}, training__steps=STEPS, heldout={"rows": 2}
    )
    document["training"] |= {"batch_rows": 2, "micro_batch_rows": 1}
    with monkeypatch.context() as patched:
        patched.setattr(MultiObjectiveModel, "forward", recording)
        code, _, error = train(document)
    assert code == 0, error
    return metrics(folder / impl), seen


@pytest.mark.slow
@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
def test_a_run_on_the_kernels_has_the_masks_of_one_on_the_twins_and_its_losses(corpus, tmp_path, monkeypatch):
    plain, corrupted = run_with("torch", corpus, tmp_path, monkeypatch)
    fused, corrupted_too = run_with("triton", corpus, tmp_path, monkeypatch)
    assert len(corrupted) == len(corrupted_too) > STEPS
    assert all(torch.equal(one, other) for one, other in zip(corrupted, corrupted_too, strict=True))
    for one, other in zip(plain, fused, strict=True):
        assert one["sample_ids_sha256"] == other["sample_ids_sha256"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert fused[-1]["heldout"] == pytest.approx(plain[-1]["heldout"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run where there is a GPU")
def test_kernels_asked_for_where_they_cannot_run_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("fused_objectives.backend.INTERPRETED", False)
    code, _, error = train(recipe(corpus, tmp_path / "run", impl="triton"))
    assert code == 2
    assert "impl: Triton kernels do not run on 'cpu'" in error and error.count("\n") == 1
