"""What is planned is what two ranks keep and send: model states within 15 %, collectives within 5 %."""

import pytest

from pretrain.planning.communication import collectives, sent_per_step
from pretrain.planning.memory import FP32, Group, Zero, deepspeed_estimate, groups_of, model_states
from pretrain.training.optimizer import OptimizerSettings, build_optimizer
from tests.planning.measured import MICRO_STEPS, Model, configuration, measure_step

NAMES = ["zero0", "zero1", "zero2", "zero2-bf16", "zero3", "zero3-bf16", "zero2-offload-bf16", "zero3-offload"]
BILLION = [Group((10**9,))]


def groups(optimizer: str = "adamw") -> list[Group]:
    module = Model()
    settings = OptimizerSettings(optimizer, 0.01, (0.9, 0.98), 1e-6)
    return groups_of(build_optimizer(module, module.groups(), settings).param_groups)


def zero(name: str, **changes) -> Zero:
    config = configuration(name)
    config["zero_optimization"] |= changes
    return Zero.of(config)


def planned(name: str, optimizer: str, changes: dict) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in collectives(groups(optimizer), zero(name, **changes), MICRO_STEPS):
        sums[each.kind] = sums.get(each.kind, 0) + each.numel * each.itemsize
    return sums


CASES = [("zero1", "adamw", {})]


@pytest.mark.parametrize("name, optimizer, changes", CASES)
def test_two_ranks_keep_and_send_what_is_planned(ranks, name, optimizer, changes):
    held, sent = ranks(measure_step, name, optimizer, changes)[0]
    states = model_states(groups(optimizer), zero(name, **changes), 2)
    assert states.kept + states.host == pytest.approx(held, rel=0.15)
    assert sent == pytest.approx(planned(name, optimizer, changes), rel=0.05)


def test_states_of_one_gpu_by_hand():
    weights, bf16 = 4 * 10**9, 2 * 10**9
    kept = {name: model_states(BILLION, zero(name), 4) for name in NAMES}
    assert kept["zero0"].kept == 4 * weights
    assert kept["zero1"].kept == 2 * weights + 3 * weights // 4
    assert kept["zero2"].kept == weights + 4 * weights // 4
    assert kept["zero2-bf16"].kept == bf16 + 4 * weights // 4
    assert kept["zero3"].kept == 4 * weights // 4
    assert kept["zero3-bf16"].kept == (bf16 + 4 * weights) // 4
    assert kept["zero2-offload-bf16"].kept == bf16 and kept["zero2-offload-bf16"].host == 5 * weights // 4
    assert all(states.host == 0 for name, states in kept.items() if "offload" not in name)
    assert model_states([Group((10**9,), "muon")], zero("zero0"), 4).kept == 3 * weights


def test_deepspeeds_estimate_is_ours_but_for_gradients_that_stay_in_sixteen_bits():
    theirs = deepspeed_estimate(BILLION, zero("zero2-bf16"), 4, 2)
    assert theirs - model_states(BILLION, zero("zero2-bf16"), 8).kept == 2 * 10**9 // 8
    layers = [Group((10**6,) * 1000)]
    theirs = deepspeed_estimate(layers, zero("zero3-bf16"), 4, 2)
    assert theirs - model_states(layers, zero("zero3-bf16"), 8).kept == FP32 * 10**6
    assert deepspeed_estimate(BILLION, zero("zero2"), 4, 2) is None


def test_one_rank_sends_nothing_and_an_empty_group_takes_nothing():
    for name in NAMES:
        assert sent_per_step(groups(), zero(name), 3, ranks=1) == 0
        with_empty = model_states([*groups(), Group(())], zero(name), 3)
        assert with_empty == model_states(groups(), zero(name), 3)


def test_buckets_count_in_the_type_that_travels_and_twice_when_reduction_overlaps():
    plain, double = (model_states(groups(), zero("zero2-bf16", overlap_comm=on), 2).buffers for on in (False, True))
    assert (plain, double) == (2 * 5000, 4 * 5000)
    assert model_states(groups(), zero("zero2", contiguous_gradients=False), 2).buffers == 0
    everything = zero("zero3-bf16", stage3_max_reuse_distance=10**9)
    nothing = zero("zero3-bf16", stage3_max_reuse_distance=0)
    assert model_states(groups(), nothing, 2).buffers < model_states(groups(), everything, 2).buffers
