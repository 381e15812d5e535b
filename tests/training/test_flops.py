"""FLOPs are those that are computed: counted by hand, and by torch's counter over a real forward and backward."""

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fused_objectives.targets import IGNORED
from pretrain.data.batch import Batch
from pretrain.model.attention import Layout
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from pretrain.training.flops import _packed_flops, expected_flops_per_token, flops_per_token
from tests.builders import TINY, VOCABULARY, padded, random_samples, tiny_encoder
from tests.training.runs import metrics, recipe, train, write_corpus

WIDTH, INNER, LAYERS = (TINY["bert"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
GENERATED = {"rtd": {}, "itd": {"source": "generator"}}


def model_of(objectives: dict[str, dict], checkpointing: bool = False) -> MultiObjectiveModel:
    built = build_objectives(parse_objectives(objectives, "test"), VOCABULARY, seed=1)
    return MultiObjectiveModel(tiny_encoder("bert", activation_checkpointing=checkpointing), built).train()


@pytest.fixture
def batch() -> Batch:
    return padded(random_samples([9, 31, 17, 24, 1]), row_length=33)


def trunk(places: int, batch: Batch, layers: int) -> int:
    """A forward pass: four projections and two of the feed-forward layer at all places, padding too; two products of
    attention over every block."""
    pairs = sum(len(block) * block.shape[1] ** 2 for block, _ in Layout(batch).blocks())
    return layers * (2 * places * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + 2 * 2 * pairs * WIDTH)


def vocabulary(labels: torch.Tensor) -> int:
    return 2 * int((labels != IGNORED).sum()) * (WIDTH * WIDTH + WIDTH * VOCABULARY.size)


def detection(batch: Batch) -> int:
    return 2 * int(batch.lengths.sum()) * (WIDTH * WIDTH + WIDTH)


def test_masked_language_modelling_takes_six_flops_a_weight_and_token_and_attention(batch):
    model = model_of({"mlm": {}})
    view = model.objectives["mlm"].corrupt(batch, 0.0)
    by_hand = 3 * (trunk(5 * 33, batch, LAYERS) + vocabulary(view.labels))
    assert flops_per_token(model, batch, ["mlm"]) * 82 == by_hand
    whole = padded(random_samples([17] * 3))
    weights = 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER)
    targets = vocabulary(model.objectives["mlm"].corrupt(whole, 0.0).labels)
    counted = flops_per_token(model, whole, ["mlm"]) * 51
    assert counted == 6 * weights * 51 + 3 * (LAYERS * 4 * 3 * 17**2 * WIDTH + targets)


def test_what_stage_3_puts_in_the_place_of_linear_layers_counts_as_they_do(batch, monkeypatch):
    model = model_of(GENERATED)
    counted = flops_per_token(model, batch, [*GENERATED])
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    assert flops_per_token(model, batch, [*GENERATED]) == counted
    assert torch.nn.functional.linear is zero3_linear_wrap


def test_electra_takes_generator_and_discriminator_and_what_is_not_trained_counts_once(batch):
    model = model_of(GENERATED)
    view = model.objectives["rtd"].corrupt(batch, 0.0)
    generator = trunk(5 * 33, batch, 1) + vocabulary(view.labels)
    by_hand = 3 * (generator + trunk(5 * 33, batch, LAYERS) + detection(batch))
    assert flops_per_token(model, batch, ["rtd"]) * 82 == by_hand

    view = model.objectives["itd"].corrupt(batch, 0.0)
    places, longer = view.tokens.numel(), view.batch
    assert places > 5 * 33 and int((view.labels == 1).sum())
    filled = trunk(places, longer, 1) + vocabulary(torch.where(view.labels == 1, 0, IGNORED))
    by_hand = filled + 3 * (trunk(places, longer, LAYERS) + detection(longer))
    assert flops_per_token(model, batch, ["itd"]) * 82 == by_hand


@pytest.mark.parametrize("name", ["mlm", "clm", "rtd", "std", "itd"])
def test_the_count_is_that_of_torch_over_forward_and_backward(batch, name):
    """torch has no formula for the CPU's own attention, and counts what is recomputed."""
    model = model_of(GENERATED | {"mlm": {}, "clm": {}, "std": {}})
    view = model.objectives[name].corrupt(batch, 0.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model({name: view}, dict.fromkeys(model.objectives[name].terms, 1.0))
        loss.backward()
    assert flops_per_token(model, batch, [name]) * 82 == pytest.approx(counter.get_total_flops(), rel=1e-12)
    again = model_of(GENERATED | {"mlm": {}, "clm": {}, "std": {}}, checkpointing=True)
    assert flops_per_token(again, batch, [name]) == flops_per_token(model, batch, [name])


def test_counting_leaves_no_trace(batch):
    model = model_of(GENERATED)
    for _, parameter in zip(range(3), model.parameters(), strict=False):
        parameter.requires_grad_(False)
    before = [(parameter.requires_grad, parameter.detach().clone()) for parameter in model.parameters()]
    flops_per_token(model, batch, ["itd"])
    for parameter, (required, values) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == required and parameter.grad is None and torch.equal(parameter, values)
    with pytest.raises(KeyError):
        flops_per_token(model, batch, ["mlm"])


def test_a_drawn_objective_costs_what_it_is_drawn_and_a_mixed_one_all(batch):
    model = model_of(GENERATED | {"mlm": {}})
    each = {name: flops_per_token(model, batch, [name]) for name in model.objectives}
    shares = {"rtd": 1.0, "itd": 3.0, "mlm": 0.0}
    mixed, drawn = (expected_flops_per_token(model, batch, shares, mixes=mixes) for mixes in (True, False))
    assert mixed == pytest.approx(each["rtd"] + each["itd"])
    assert drawn == pytest.approx(each["rtd"] / 4 + each["itd"] * 3 / 4)


def test_packed_attention_counts_pairs_within_samples():
    query = torch.zeros(12, 3, 8)
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    assert _packed_flops(query, query, query, bounds, bounds, 7, 7, scale=0.1) == 4 * 3 * 8 * (25 + 49)


@pytest.mark.parametrize("stage", [2, 3])
def test_utilisation_is_counted_once_a_plan_and_changes_nothing(tmp_path, stage):
    store = write_corpus(tmp_path / "store")
    changes = {"objectives": GENERATED, "sampler": {"mode": "draw", "name": "round_robin"}, "training__steps": 3}
    for name, peak in (("plain", None), ("counted", 1e-3)):
        document = recipe(store, tmp_path / name, log__peak_tflops=peak, **changes)
        assert train(document, ds=f"zero{stage}.json")[0] == 0
    plain, counted = (metrics(tmp_path / name) for name in ("plain", "counted"))
    assert [each["losses"] for each in plain] == [each["losses"] for each in counted]
    assert [each["grad_norm"] for each in plain] == [each["grad_norm"] for each in counted]
    work = [each["mfu"] * each["seconds"] / each["tokens"] for each in counted]
    assert work[0] == pytest.approx(work[2]) and work[0] != pytest.approx(work[1])
    assert all(each["mfu"] is None for each in plain)
