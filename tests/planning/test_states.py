"""What is planned is what two ranks keep and send: model states within 15 %, collectives within 5 %."""

import pytest

from pretrain.planning.communication import collectives, sent_per_step
from pretrain.planning.memory import deepspeed_estimate, model_states
from pretrain.planning.zero import FP32, Group, Zero, groups_of, touched
from pretrain.training.optimizer import OptimizerSettings, build_optimizer
from tests.planning.measured import CONFIGS, MICRO_STEPS, Model, configuration, measure_step

NAMES = sorted(path.stem for path in CONFIGS.glob("zero*.json"))
BILLION = [Group((10**6,) * 1000)]


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


REUSE = {"stage3_max_reuse_distance": 200_000, "stage3_max_live_parameters": 60_000}
CASES = [
    *((name, "adamw", {}) for name in NAMES),
    *((name, "muon", {}) for name in ("zero0", "zero1", "zero2-bf16", "zero3-offload")),
    ("zero2", "adamw", {"overlap_comm": True}),
    ("zero2", "adamw", {"contiguous_gradients": False}),
    ("zero3-bf16", "adamw", REUSE),
]


@pytest.mark.parametrize("name, optimizer, changes", CASES)
def test_two_ranks_keep_and_send_what_is_planned(ranks, name, optimizer, changes):
    measured = ranks(measure_step, name, optimizer, changes)
    states = model_states(groups(optimizer), zero(name, **changes), 2)
    kept = states.kept + states.host  # on a CPU both are in one memory
    assert kept == pytest.approx(max(each.held for each in measured), rel=0.15)
    assert kept + states.buffers == pytest.approx(max(each.micro_step for each in measured), rel=0.15)
    assert kept + states.update == pytest.approx(max(each.update for each in measured), rel=0.15)
    for each in measured:
        assert each.sent == pytest.approx(planned(name, optimizer, changes), rel=0.05)


def test_states_of_one_gpu_by_hand():
    billion, bf16 = 4 * 10**9, 2 * 10**9
    states = {name: model_states(BILLION, zero(name), 4) for name in NAMES}
    kept = {name: each.kept for name, each in states.items()}
    small = 10**6  # elements of a parameter
    assert kept["zero0"] == 4 * billion
    assert kept["zero1"] == 2 * billion + 3 * billion // 4
    assert kept["zero2"] == billion + 4 * billion // 4
    assert kept["zero2-bf16"] == bf16 + 4 * billion // 4
    assert kept["zero3"] == 5 * billion // 4
    assert kept["zero3-bf16"] == (bf16 + 4 * billion) // 4
    assert kept["zero2-offload"] == billion and states["zero2-offload"].host == 6 * billion // 4 + 4 * small
    assert kept["zero2-offload-bf16"] == bf16 + billion // 4
    assert states["zero2-offload-bf16"].host == (4 * billion + bf16) // 4 + 2 * small
    assert kept["zero3-offload"] == billion // 4 and states["zero3-offload"].host == 5 * billion // 4
    assert kept["zero3-offload-bf16"] == bf16 // 4 and states["zero3-offload-bf16"].host == 5 * billion // 4
    assert all(each.host == 0 for name, each in states.items() if "offload" not in name)
    muon = model_states([Group(BILLION[0].numels, "muon")], zero("zero0"), 4)
    assert muon.kept == 3 * billion


def test_a_part_within_a_large_parameter_has_the_sums_of_all_of_it():
    group = Group((70, 5, 25))  # parts of 25: the third ends where the second parameter does
    assert [group.touched(rank, 4) for rank in range(4)] == [70, 70, 75, 25]
    assert touched([group, Group(()), Group((3,))], 4) == 75 + 3
    large = model_states([Group((10**9,))], zero("zero2"), 64)
    assert large.gradients == 4 * 10**9 and large.optimizer == 8 * 10**9 // 64


def test_deepspeeds_estimate_is_ours_but_for_gradients_that_stay_in_sixteen_bits():
    theirs = deepspeed_estimate(BILLION, zero("zero2-bf16"), 4, 2)
    assert theirs - model_states(BILLION, zero("zero2-bf16"), 8).kept == 2 * 10**9 // 8
    layers = [Group((10**6,) * 1000)]
    theirs = deepspeed_estimate(layers, zero("zero3-bf16"), 4, 2)
    assert theirs - model_states(layers, zero("zero3-bf16"), 8).kept == FP32 * 10**6
    assert deepspeed_estimate(BILLION, zero("zero2"), 4, 2) is None


def test_gloo_sends_as_much_to_scatter_a_sum_as_to_give_all_of_it_to_all():
    nccl, gloo = (sent_per_step(BILLION, zero("zero3"), 2, 4, backend) for backend in ("nccl", "gloo"))
    assert gloo - nccl == 2 * 4 * 10**9 * 3 / 4
    assert sent_per_step(BILLION, zero("zero2"), 2, 4, "gloo") == sent_per_step(BILLION, zero("zero2"), 2, 4)


def test_one_rank_sends_nothing_and_an_empty_group_takes_nothing():
    for name in NAMES:
        assert sent_per_step(groups(), zero(name), 3, ranks=1) == 0
        with_empty = model_states([*groups(), Group(())], zero(name), 3)
        assert with_empty == model_states(groups(), zero(name), 3)


def test_buckets_count_in_the_type_that_travels_and_twice_when_reduction_overlaps():
    plain, double = (model_states(groups(), zero("zero2-bf16", overlap_comm=on), 2).buffers for on in (False, True))
    assert double - plain == 2 * 40_000


def test_stage_three_holds_less_at_once_only_where_both_reuse_and_prefetching_are_limited():
    def gathered(**limits: int) -> int:
        return model_states(BILLION, zero("zero3-bf16", **limits), 4).buffers

    reuse, live = {"stage3_max_reuse_distance": 10**8}, {"stage3_max_live_parameters": 10**7}
    assert gathered() == gathered(**reuse) > gathered(**live) > gathered(**reuse, **live)


def test_the_peak_is_in_the_micro_step_or_in_the_update():
    states = model_states(BILLION, zero("zero0"), 4)
    assert states.peak(0) == states.kept + states.update
    assert states.peak(10**10) == states.kept + states.buffers + 10**10
