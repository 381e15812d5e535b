"""Gradients as shards: they are plain torch's, reading one leaves no trace, and one put in the accumulated gradient's
place is applied like it.

Each configuration lives twice through one story of steps: plainly, and with probes before and within the steps and the
last one's gradient put together from those of its micro-steps. A process that is alone does the work of both ranks.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from pretrain.training.engine import Engine, init_distributed
from pretrain.training.gradient import Gradient
from pretrain.training.trainer import Trainer
from tests.training.runs import recipe, states, train, write_corpus
from tests.training.test_engine import AFTER, BEFORE, BF16, FP32, SPOILT, small_config, work
from tests.training.test_engine_refusals import message_of
from tests.training.toy import ADAMW, Step, Toy, groups_of, states_of

# NaN spoils the second step, if there are two ranks; "score" is idle after it, and "pair" in the last
STORY = [BEFORE[0], replace(SPOILT[0], lr=0.01), AFTER[1], BEFORE[1]]
WEIGHTS = (0.5, 2.0)  # of a step's micro-steps; powers of two, so that they commute with bf16's rounding
WINDOWS = [
    [work("lm", (3, 2), 21)],
    [work("lm", (3, 2), 22), work("pair", (1, 3), 23), work("lm", (0, 3), 24)],  # a rank without a row
    [work("score", (2, 2), 25), work("lm", (4, 1), 26)],
]
CHOICES = [None, {"backbone"}, {"head/lm", "head/pair"}, set()]
ALONE = ["zero0", "zero1", "zero2", "zero3-bf16", "zero3-offload"]
LIVES = [(name, 2) for name in FP32 + BF16 if name not in ALONE[3:]] + [(name, 1) for name in ALONE]


@dataclass
class Life:
    """What one life left on a rank after each of its steps, and what was measured besides."""

    outcomes: list[tuple[float, bool]] = field(default_factory=list)
    states: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    measured: dict = field(default_factory=dict)

    def step(self, engine: Engine, step: Step) -> None:
        outcome = engine.step(step.lr, step.active)
        self.outcomes.append((outcome.grad_norm, outcome.applied))
        self.states.append(states_of(engine))


def make_engine(name: str, world_size: int, checkpointing: bool = False) -> Engine:
    init_distributed(60)
    module, config = Toy(checkpointing=checkpointing), small_config(name, world_size)
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["sub_group_size"] = 100  # several flat tensors a group
    return Engine(module, groups_of(module), config, ADAMW)


def backward(engine: Engine, micro: list[dict], weight: float = 1.0) -> None:
    """One micro-step; alone, the forwards of both ranks share a backward."""
    works = micro if engine.world_size == 1 else [micro[engine.rank]]
    engine.backward(sum(engine(each) for each in works) * weight)


def probe(engine: Engine, window: list[list[dict]]) -> Gradient:
    engine.begin_step()
    for micro in window:
        backward(engine, micro)
    return engine.gradient()


def whole(gradient: Gradient) -> Tensor:
    return torch.cat([shard.view(-1) for shards in gradient.parts.values() for shard in shards])


def in_their_memory(gradient: Gradient, other: Gradient) -> bool:
    pairs = ((gradient.parts[name], other.parts[name]) for name in gradient.parts)
    return all(one.data_ptr() == two.data_ptr() for pair in pairs for one, two in zip(*pair, strict=True))


def live_plainly(name: str, world_size: int) -> Life:
    engine, life = make_engine(name, world_size), Life()
    for step in STORY:
        engine.begin_step()
        for micro, weight in zip(step.work, WEIGHTS, strict=True):
            backward(engine, micro, math.nan if step.poison and engine.rank == 1 else weight)
        life.step(engine, step)
    engine.close()
    return life


def live_with_probes(name: str, world_size: int) -> Life:
    """Live through the same story with checkpointed activations and probes, its last step put together; then go on."""
    engine, life = make_engine(name, world_size, checkpointing=True), Life()
    gradients = [probe(engine, window) for window in WINDOWS]  # before anything else
    copies = [whole(gradient).clone() for gradient in gradients]
    pairs = [(left, right) for left in gradients for right in gradients]
    life.measured["products"] = [engine.inner_products(pairs, choice) for choice in CHOICES]
    life.measured["of no pairs"] = engine.inner_products([])
    for step, window in zip(STORY[:-1], WINDOWS, strict=True):
        probe(engine, window)
        engine.begin_step()
        for micro, weight in zip(step.work, WEIGHTS, strict=True):
            backward(engine, micro, math.nan if step.poison and engine.rank == 1 else weight)
            engine.gradient()
        life.step(engine, step)
    life.measured["kept"] = [torch.equal(whole(each), copy) for each, copy in zip(gradients, copies, strict=True)]
    life.measured["elements"] = copies[0].numel()

    parts = [probe(engine, [micro]) for micro in STORY[-1].work]
    combined = Gradient.combine(parts, WEIGHTS)
    copy = whole(combined).clone()
    in_place = Gradient.combine(parts, WEIGHTS, in_place=True)
    life.measured["in place"] = torch.equal(whole(in_place), copy) and in_their_memory(in_place, parts[0])
    engine.put_gradient(combined)
    life.step(engine, STORY[-1])

    first, second = (probe(engine, window) for window in WINDOWS[:2])
    engine.put_gradient(second)
    life.measured["read back"] = torch.equal(whole(engine.gradient()), whole(second))
    into = engine.gradient(into=parts[1])
    life.measured["written over"] = torch.equal(whole(into), whole(second)) and in_their_memory(into, parts[1])
    backward(engine, WINDOWS[0][0])
    error = Gradient.combine([engine.gradient(), first, second], [1, -1, -1])
    life.measured["added"] = engine.inner_products([(error, error), (second, second)])

    broken = Gradient.combine([second], [1.0])
    if engine.rank == engine.world_size - 1:
        broken.parts["backbone"][0].view(-1)[0] = math.nan
    engine.put_gradient(broken)
    life.step(engine, Step(WINDOWS[1]))
    engine.put_gradient(second)
    life.step(engine, Step([]))  # the backbone alone
    engine.close()
    return life


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], start: str = "") -> bool:
    """Whether all states of the parameters whose names begin with ``start`` have the same bits."""

    def bits(state: dict[str, Tensor]) -> dict[str, list]:
        return {key: value.view(torch.int32).tolist() for key, value in state.items()}  # -0 is not 0

    return all(bits(found[name]) == bits(state) for name, state in wanted.items() if name.startswith(start))


def way(life: Life, index: int, other: Life, other_index: int) -> float:
    """Return the distance between the weights of this rank in two lives."""
    pairs = ((life.states[index][name], state) for name, state in other.states[other_index].items())
    return math.sqrt(sum(float((left["master"] - right["master"]).square().sum()) for left, right in pairs))


@pytest.fixture(scope="module")
def lives(rank_pool):
    told: dict[tuple, list[list[Life]]] = {}

    def lives_of(name: str, world_size: int) -> list[list[Life]]:
        """Return of each kind of life what it left on each rank."""
        if (name, world_size) not in told:
            kinds = (live_plainly, live_with_probes)
            told[name, world_size] = [rank_pool.run(kind, name, world_size, world_size=world_size) for kind in kinds]
        return told[name, world_size]

    return lives_of


def products(choice: set[str] | None) -> Tensor:
    """Return the inner products of the windows' gradients, ``[3, 3] float64``: plain torch on one process, in fp64."""
    rows = []
    for window in WINDOWS:
        module = Toy().double()
        sum(module(each) for micro in window for each in micro).backward()
        chosen = [
            each for group in groups_of(module) if choice is None or group.name in choice for each in group.params
        ]
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in chosen]
        rows.append(torch.cat([torch.zeros(0).double(), *(each.flatten() for each in gradients)]))
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_inner_products_are_those_of_plain_torch_in_double_precision_and_equal_on_all_ranks(lives, name, world_size):
    measured = [life.measured for life in lives(name, world_size)[1]]
    norms = products(None).diag().sqrt()
    for choice, found in zip(CHOICES, measured[0]["products"], strict=True):
        error = torch.tensor(found, dtype=torch.float64).view(3, 3) - products(choice)
        assert float((error / norms.outer(norms)).abs().max()) < (0.01 if name in BF16 else 1e-6)
    assert all(each["products"] == measured[0]["products"] and each["of no pairs"] == [] for each in measured)


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_a_gradient_is_a_copy_of_a_share_of_the_elements(lives, name, world_size):
    measured = [life.measured for life in lives(name, world_size)[1]]
    total = sum(each.numel() for each in Toy().parameters())
    padding = 0 if name == "zero0" else 8 * 30  # at most, over a toy's many small tensors
    assert total <= sum(each["elements"] for each in measured) <= total + padding
    assert all(each["kept"] == [True] * len(WINDOWS) for each in measured)


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_probes_and_checkpointed_activations_leave_no_trace(lives, name, world_size):
    for plain, probed in zip(*lives(name, world_size), strict=True):
        assert [applied for _, applied in plain.outcomes] == [True, world_size == 1, True, True]
        for index in range(len(STORY) - 1):
            assert probed.outcomes[index] == plain.outcomes[index]
            assert same(probed.states[index], plain.states[index])


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_a_step_on_a_gradient_put_together_is_one_on_the_weighted_losses(lives, name, world_size):
    last = len(STORY) - 1
    for plain, probed in zip(*lives(name, world_size), strict=True):
        (norm, applied), (wanted_norm, _) = probed.outcomes[last], plain.outcomes[last]
        assert applied and norm == pytest.approx(wanted_norm, rel=1e-6)
        assert way(probed, last, plain, last) < 1e-5 * way(plain, last - 1, plain, last)
        assert same(probed.states[last], probed.states[last - 1], "pair")


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_a_gradient_that_was_put_is_read_back_and_added_to(lives, name, world_size):
    for life in lives(name, world_size)[1]:
        assert life.measured["read back"]
        error, norm = life.measured["added"]
        assert error <= 1e-12 * norm


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_memory_that_is_handed_back_is_taken_and_changes_no_bit(lives, name, world_size):
    for life in lives(name, world_size)[1]:
        assert life.measured["in place"] and life.measured["written over"]


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_nan_in_one_ranks_shard_skips_the_step_on_all_ranks(lives, name, world_size):
    for life in lives(name, world_size)[1]:
        *_, before, after, _ = life.states
        assert life.outcomes[-2] == (math.inf, False) and same(before, after)


@pytest.mark.parametrize(("name", "world_size"), LIVES)
def test_idle_components_stay_though_the_gradient_put_has_them(lives, name, world_size):
    for life in lives(name, world_size)[1]:
        *_, before, after = life.states
        assert life.outcomes[-1] == (pytest.approx(math.sqrt(life.measured["added"][1]), rel=1e-6), True)
        assert not same(before, after) and same(before, after, "decoder.bias") and same(before, after, "pair")


def test_products_of_long_shards_cancel_in_double_precision():
    long = torch.zeros((1 << 20) + 3)
    long[:2], long[-1] = torch.tensor([2.0**24, 1.0]), -(2.0**24)
    left = Gradient({"backbone": [long, torch.zeros(0)], "head/lm": [torch.ones(1)]})
    ones = Gradient({name: [torch.ones_like(each) for each in shards] for name, shards in left.parts.items()})
    assert (left.dot(ones).item(), left.dot(ones, {"backbone"}).item()) == (2.0, 1.0)


def misuse() -> dict[str, str]:
    engine = make_engine("zero2", 1)
    engine.begin_step()
    told = {"no backward": message_of(RuntimeError, engine.gradient)}
    gradient = probe(engine, WINDOWS[0])
    told["no such component"] = message_of(ValueError, engine.inner_products, [(gradient, gradient)], {"body"})
    engine.step(0.1, {"backbone", "head/lm"})
    told["after a step"] = message_of(RuntimeError, engine.gradient)
    engine.close()
    return told


def test_misuse_is_an_error(ranks):
    (told,) = ranks(misuse, world_size=1)
    assert "without backward" in told["no backward"] and "without backward" in told["after a step"]
    assert "['body']" in told["no such component"]


def test_probes_between_the_steps_of_a_run_with_dropout_leave_its_states_bit_identical(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    changes = {"objectives": {"mlm": {}, "cse": {"group_rows": 2}}, "sampler__shares": {}, "training__steps": 3}

    def run(name: str) -> dict[str, str]:
        assert train(recipe(corpus, tmp_path / name, **changes))[0] == 0
        return states(tmp_path / name / "checkpoints" / "step-00000003")

    plain, probed, step = run("plain"), [], Trainer.train_step

    def probe_and_step(trainer: Trainer) -> dict:
        views = trainer.corrupt(trainer.heldout.micro_batches[0], {"mlm": 0.5, "cse": 0.5})
        trainer.engine.begin_step()
        trainer.engine.backward(trainer.engine(views, {"mlm": 0.1, "cse": 0.1})[0])
        gradient = trainer.engine.gradient()
        probed.append(trainer.engine.inner_products([(gradient, gradient)]))
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", probe_and_step)
    assert run("probed") == plain
    assert len(probed) == 3 and all(norm > 0 for (norm,) in probed)
