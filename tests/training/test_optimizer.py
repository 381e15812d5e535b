"""The component optimizer: how groups are split, and Muon against torch's own, alone and cut up by ZeRO."""

import pytest
import torch
from torch import nn

from pretrain.training.flat import Flat, Fragment
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup, build_optimizer, orthogonalise
from tests.training.test_engine import AFTER, BEFORE, START, small_config
from tests.training.toy import ADAMW, LR_SCALES, Run, Toy, Trace, distance, groups_of, run_engine, run_plain

MATRICES = {"layers.0.weight", "layers.1.weight", "pooler.weight"}
VECTORS = {"layers.0.bias", "layers.1.bias", "pooler.bias", "norm.weight", "norm.bias"}
MUON = OptimizerSettings("muon", weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, momentum=0.9)


def split(settings: OptimizerSettings) -> dict[tuple[str, str, bool], set[str]]:
    module = Toy()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        (group["component"], group["algorithm"], group["weight_decay"] > 0): {
            names[id(each)] for each in group["params"]
        }
        for group in build_optimizer(module, groups_of(module), settings).param_groups
    }


def test_vectors_do_not_decay_and_matrices_do():
    groups = split(ADAMW)
    assert groups["backbone", "adamw", True] == {"embedding.weight", *MATRICES}
    assert groups["backbone", "adamw", False] == VECTORS
    assert groups["head/lm", "adamw", False] == {"decoder.bias"}
    assert ("head/lm", "adamw", True) not in groups


def test_muon_takes_hidden_matrices_and_neither_embeddings_nor_heads():
    groups = split(MUON)
    assert groups["backbone", "muon", True] == MATRICES
    assert groups["backbone", "adamw", True] == {"embedding.weight"}
    assert {name for name, algorithm, _ in groups if algorithm == "muon"} == {"backbone"}


def test_muon_leaves_an_untied_vocabulary_head_to_adamw_in_any_component():
    module = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.Linear(6, 11))
    groups = build_optimizer(module, [ParameterGroup("generator/rtd", list(module.parameters()))], MUON).param_groups
    (muon,) = [group for group in groups if group["algorithm"] == "muon"]
    assert muon["params"] == [module[1].weight]


def test_groups_must_hold_every_parameter_once():
    module = Toy()
    groups = groups_of(module)
    with pytest.raises(ValueError, match=r"in none: \['decoder.bias'\]"):
        build_optimizer(module, [group for group in groups if group.name != "head/lm"], ADAMW)
    with pytest.raises(ValueError, match="in two groups"):
        build_optimizer(module, [*groups, ParameterGroup("twice", [module.norm.weight])], ADAMW)
    with pytest.raises(ValueError, match="share a name"):
        build_optimizer(module, [*groups, ParameterGroup("backbone", [])], ADAMW)


def test_the_learning_rate_reaches_every_group_with_its_scale():
    module = Toy()
    optimizer = build_optimizer(module, groups_of(module), MUON)
    optimizer.set_learning_rate(0.3)
    assert {group["lr"] / LR_SCALES[group["component"]] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("shape", [(5, 5), (3, 17), (17, 3), (1, 4)])
def test_orthogonalise_brings_all_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix).float()
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.5
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_muon_equals_torchs_own_on_whole_matrices():
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(9, 4, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, [ParameterGroup("backbone", [ours.weight])], MUON)
    flat = Flat(ours.weight, [ours.weight], [ours.weight.shape], [Fragment(ours.weight, 0, 0, 36)])
    optimizer.layout, optimizer.active = {id(ours.weight): flat}, frozenset({"backbone"})
    optimizer.set_learning_rate(0.05)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.weight.grad = torch.randn(4, 9)
        theirs.weight.grad = ours.weight.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plain_muon() -> tuple[Trace, Trace]:
    return run_plain(BEFORE + AFTER, MUON), run_plain(BEFORE + AFTER, MUON, bf16=True)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload-bf16"])
def test_muon_cut_up_by_zero_equals_torchs_own_and_resumes_bit_identically(ranks, tmp_path, plain_muon, name):
    config = small_config(name)
    whole = ranks(run_engine, Run(BEFORE + AFTER, config, MUON, save_to=tmp_path, save_after=len(BEFORE)))
    for index, found in enumerate(whole[0].weights):
        exact, in_bf16 = (plain.weights[index] for plain in plain_muon)
        # Newton-Schulz works in bf16, so a gradient's last bit may turn a direction by 0.4 %
        allowed = 2 * distance(in_bf16, exact, START) if "bf16" in name else 0.005
        assert distance(found, exact, START) < allowed
    resumed = ranks(run_engine, Run(AFTER, config, MUON, load_from=tmp_path))
    for found, wanted in zip(resumed[0].weights, whole[0].weights[len(BEFORE) :], strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
