"""On two ranks, at every stage, the engine's steps are plain torch's; one test a silent error of docs/deepspeed.md.

Each configuration runs once: a story of steps with mixed and alternating objectives, unequal counts, a NaN on one rank
and a dropped step; the tests look at what it left.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pretrain.training.ds_config import resolve_ds_config
from tests.training.toy import LR_SCALES, Run, Step, Toy, Trace, distance, groups_of, run_engine, run_plain, tokens

CONFIGS = Path(__file__).parents[2] / "configs" / "ds"
FP32 = ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
BF16 = ["zero2-bf16", "zero3-bf16", "zero2-offload-bf16", "zero3-offload-bf16"]


def small_config(name: str, world_size: int = 2, clip: float = 1.0) -> dict:
    """A shipped configuration with buckets so small that a toy fills several, and parameters partitioned at stage 3."""
    config = resolve_ds_config(
        CONFIGS / f"{name}.json",
        micro_batch_rows=4 // world_size,
        batch_rows=8,
        world_size=world_size,
        gradient_clipping=clip,
        device_type="cpu",
    )
    zero = config["zero_optimization"]
    zero |= {key: 60 for key in ("reduce_bucket_size", "allgather_bucket_size") if key in zero}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": 60}
    return config


def work(objective: str, rows: tuple[int, int], seed: int) -> list[dict]:
    return [{objective: tokens(count, 10 * seed + rank)} for rank, count in enumerate(rows)]


BEFORE = [
    Step([work("lm", (3, 2), 1), work("pair", (4, 1), 2)], lr=0.01),  # mixed objectives in one window
    Step([work("lm", (3, 2), 3), work("lm", (1, 4), 4)], lr=0.02),  # "pair" idle
    Step([work("score", (2, 0), 5), work("lm", (2, 5), 6)], lr=0.01),  # a rank without a row
]
SPOILT = [
    Step([work("pair", (3, 2), 7), work("score", (2, 2), 8)], lr=0.5, poison=True),
    Step([work("pair", (3, 2), 9), work("score", (2, 2), 10)], lr=0.5, drop=True),
]
AFTER = [
    Step([work("score", (3, 3), 11), work("score", (1, 2), 12)], lr=0.03),  # "pair" and "lm" idle after a spoilt step
    Step([work("pair", (1, 1), 13), work("lm", (2, 2), 14)], lr=0.01),
    Step([work("lm", (5, 1), 15)], lr=0.01),
]
STORY = BEFORE + SPOILT + AFTER


@dataclass
class Told:
    """What the ranks brought back: of the whole story, of it without the spoilt steps, and of its end after a load."""

    story: list[Trace]
    unspoilt: list[Trace]
    resumed: list[Trace]


@pytest.fixture(scope="module")
def tell(rank_pool, tmp_path_factory):
    told: dict[str, Told] = {}

    def tell_once(name: str) -> Told:
        if name not in told:
            config, folder = small_config(name), tmp_path_factory.mktemp("saved")
            runs = [
                Run(STORY, config, save_to=folder, save_after=len(BEFORE)),
                Run(BEFORE + AFTER, config),
                Run(AFTER, config, load_from=folder),
            ]
            told[name] = Told(*(rank_pool.run(run_engine, run) for run in runs))
        return told[name]

    return tell_once


@pytest.fixture(scope="module")
def plain() -> Trace:
    return run_plain(STORY)


@pytest.fixture(scope="module")
def plain_bf16() -> Trace:
    return run_plain(STORY, bf16=True)


START = {name: value.clone() for name, value in Toy().state_dict().items()}


@pytest.mark.parametrize("name", FP32)
def test_every_step_equals_plain_torch_on_one_process(tell, plain, name):
    for found, wanted in zip(tell(name).story[0].weights, plain.weights, strict=True):
        assert distance(found, wanted, START) < 1e-5


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_the_error_is_at_most_twice_that_of_plain_torch_in_bf16(tell, plain, plain_bf16, name):
    for found, in_bf16, exact in zip(tell(name).story[0].weights, plain_bf16.weights, plain.weights, strict=True):
        assert distance(found, exact, START) <= 2 * distance(in_bf16, exact, START)


@pytest.mark.parametrize("name", FP32 + BF16)
def test_the_reported_norm_is_that_of_torch_before_clipping_and_equal_on_all_ranks(tell, plain, name):
    story = tell(name).story
    for (found, applied), (wanted, wanted_applied), step in zip(story[0].outcomes, plain.outcomes, STORY, strict=True):
        assert applied is wanted_applied
        if not step.drop:
            assert found == pytest.approx(wanted, rel=1e-2 if name in BF16 else 1e-5)
    assert repr(story[0].outcomes) == repr(story[1].outcomes)


@pytest.mark.parametrize("name", FP32 + BF16)
def test_idle_heads_keep_weights_states_and_step_counters_bit_for_bit(tell, name):
    component_of = {}
    toy = Toy()
    names = {id(parameter): parameter_name for parameter_name, parameter in toy.named_parameters()}
    for group in groups_of(toy):
        component_of |= {names[id(parameter)]: group.name for parameter in group.params}
    for trace in tell(name).story:
        counts = dict.fromkeys(LR_SCALES, 0)
        for index, step in enumerate(STORY):
            applied = trace.outcomes[index][1]
            for component in step.active if applied else ():
                counts[component] += 1
            for parameter, state in trace.states[index].items():
                assert state.get("step", torch.tensor(0.0)).item() == counts[component_of[parameter]]
                if index and not (applied and component_of[parameter] in step.active):
                    before = trace.states[index - 1][parameter]
                    assert before.keys() == state.keys()
                    assert all(torch.equal(before[key], state[key]) for key in state)


@pytest.mark.parametrize("name", FP32 + BF16)
def test_a_step_spoilt_by_nan_on_one_rank_or_dropped_is_as_if_it_never_was(tell, name):
    told = tell(name)
    assert [applied for _, applied in told.story[0].outcomes[3:5]] == [False, False]
    for index, found in enumerate(told.story[0].weights[3:], start=3):
        wanted = told.unspoilt[0].weights[max(2, index - 2)]
        assert all(torch.equal(found[parameter], wanted[parameter]) for parameter in wanted)


@pytest.mark.parametrize("name", FP32 + BF16)
def test_a_run_continued_from_its_checkpoint_is_bit_identical(tell, name):
    told = tell(name)
    for rank in range(2):
        for found, wanted in zip(told.resumed[rank].states, told.unspoilt[rank].states[len(BEFORE) :], strict=True):
            assert found.keys() == wanted.keys()
            for parameter, state in wanted.items():
                assert state.keys() == found[parameter].keys()
                assert all(torch.equal(found[parameter][key], state[key]) for key in state)
    assert repr(told.resumed[0].outcomes) == repr(told.unspoilt[0].outcomes[len(BEFORE) :])


@pytest.mark.parametrize("name", FP32 + BF16)
def test_the_full_state_dict_has_every_name_and_ties_stay_tied(tell, name):
    story = tell(name).story
    assert story[1].weights == [None] * len(STORY)
    weights = story[0].weights[-1]
    assert weights.keys() == START.keys()
    assert torch.equal(weights["decoder.weight"], weights["embedding.weight"])
    assert all(value.dtype == torch.float32 and value.shape == START[key].shape for key, value in weights.items())
    Toy().load_state_dict(weights)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3-offload-bf16"])
def test_checkpointed_activations_and_joint_backwards_change_nothing(ranks, tell, name):
    config = small_config(name)
    checkpointed = ranks(run_engine, Run(BEFORE[:2], config, checkpointing=True))[0]
    joint = ranks(run_engine, Run(BEFORE[:2], config, joint=True))[0]
    for index in range(2):
        wanted = tell(name).story[0].weights[index]
        assert all(torch.equal(checkpointed.weights[index][key], wanted[key]) for key in wanted)
        # sums in another order: in bf16 the tied weight's two gradients add up before they reach fp32
        assert distance(joint.weights[index], wanted, START) < (0.1 if name in BF16 else 1e-5)


MOVES = [("zero2", "zero3", 2), ("zero3", "zero1", 2), ("zero3-offload", "zero0", 2), ("zero0", "zero2-offload", 2)]
RESIZES = [("zero2", "zero2", 1), ("zero3", "zero3", 1), ("zero2-bf16", "zero3", 1)]


@pytest.mark.parametrize(("before", "after", "world_size"), MOVES + RESIZES)
def test_a_checkpoint_continues_on_another_stage_and_world_size(ranks, tmp_path, plain, before, after, world_size):
    ranks(run_engine, Run(BEFORE, small_config(before), save_to=tmp_path, save_after=3))
    rest = AFTER if world_size == 2 else [_on_one_rank(step) for step in AFTER]
    run = Run(rest, small_config(after, world_size), load_from=tmp_path)
    found = ranks(run_engine, run, world_size=world_size)[0]
    for weights, wanted in zip(found.weights, plain.weights[-len(AFTER) :], strict=True):
        assert distance(weights, wanted, START) < (0.1 if before in BF16 else 1e-5)


def _on_one_rank(step: Step) -> Step:
    """The same rows of all ranks as micro-steps of one."""
    return Step([[each] for micro in step.work for each in micro], lr=step.lr)


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_clipping_off_means_off(ranks, name):
    found = ranks(run_engine, Run(BEFORE[:1], small_config(name, clip=0.0)))[0]
    assert distance(found.weights[0], run_plain(BEFORE[:1], clip=math.inf).weights[0], START) < 1e-5
