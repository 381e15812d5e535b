"""Averages are numpy's, exact where they can be; the greedy search is that of the paper, written again."""

import itertools
import random

import numpy as np
import pytest
import torch

from pretrain.courses.soup import average, greedy, mean


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 3), "vector": (7,), "scalar": (), "empty": (0, 4)}
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**drawn, "positions": torch.arange(9)}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_average_is_the_mean_in_fp64_rounded_once(count):
    models = [weights(seed) for seed in range(count)]
    soup = average(models)
    assert soup.keys() == models[0].keys() and torch.equal(soup["positions"], torch.arange(9))
    for name in ("matrix", "vector", "scalar", "empty"):
        expected = np.mean([model[name].numpy().astype(np.float64) for model in models], axis=0).astype(np.float32)
        np.testing.assert_array_equal(soup[name].numpy(), expected)


def test_sums_beyond_fp32_and_fp16_are_not_lost():
    large = torch.tensor([3e38, 60000.0])
    assert torch.equal(mean([large, large, large]), large)
    half = torch.tensor([60000.0], dtype=torch.float16)
    assert torch.equal(mean([half, half]), half)
    tiny = [torch.tensor([1.0]), torch.tensor([1e-9]), torch.tensor([-1.0])]
    assert mean(tiny).item() == pytest.approx(1e-9 / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("copies", [2, 3, 4, 5, 8])
def test_copies_of_one_model_average_to_it_bit_for_bit(copies, dtype):
    model = weights(3, dtype) | {"zeros": torch.tensor([0.0, -0.0], dtype=dtype)}
    for name, tensor in average([model] * copies).items():
        assert tensor.dtype == model[name].dtype and tensor.shape == model[name].shape
        assert torch.equal(tensor.flatten().view(torch.uint8), model[name].flatten().view(torch.uint8))


def test_linear_models_average_their_outputs():
    models = [weights(seed, torch.float64) for seed in range(3)]
    inputs = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = torch.stack([inputs @ model["matrix"].T for model in models])
    torch.testing.assert_close(inputs @ average(models)["matrix"].T, outputs.mean(0), rtol=1e-13, atol=1e-13)


def searched(alone: list[float], value) -> tuple[list[int], dict[int, float]]:
    """Do the paper's recipe literally: the soup's own score is asked for anew at every comparison."""
    names = list(range(len(alone)))
    ranked = []
    while names:
        best = max(alone[name] for name in names)
        name = next(name for name in names if alone[name] == best)
        ranked.append(name)
        names.remove(name)
    soup, told = [], {}
    for name in ranked:
        told[name] = value({*soup, name})
        if not soup or told[name] >= value(set(soup)):
            soup.append(name)
    return soup, told


@pytest.mark.parametrize("case", range(40))
def test_the_search_is_the_brute_force_one(case):
    rng = random.Random(case)
    count = rng.randint(1, 6)
    levels = rng.choice([3, 100])  # few of them make ties
    table = {
        frozenset(members): rng.randrange(levels) / levels
        for size in range(1, count + 1)
        for members in itertools.combinations(range(count), size)
    }
    alone, asked = [table[frozenset([index])] for index in range(count)], []

    def score(members: list[int]) -> float:
        asked.append(frozenset(members))
        return table[frozenset(members)]

    tastings = greedy(alone, score)
    kept, told = searched(alone, lambda members: table[frozenset(members)])
    assert [each.ingredient for each in tastings if each.kept] == kept
    assert {each.ingredient: each.together for each in tastings} == told
    assert [each.alone for each in tastings] == sorted(alone, reverse=True)
    assert len(asked) == count - 1, "every soup is scored once"


def test_no_ingredient_makes_no_soup():
    assert greedy([], lambda members: 0.0) == []
