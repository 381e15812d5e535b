"""From scores to weights, against the formulas of the papers written out as plain loops."""

import math

import numpy as np
import pytest

from pretrain.influence.weights import (
    effective_sample_size,
    linupper,
    noise_and_signal,
    permuted,
    softmax_weights,
    standardised,
    window_weights,
)

SCORES = np.random.default_rng(0).gamma(0.7, 3.0, 13)


def written_out(scores, temperature) -> list[float]:
    """Return the paper's weights (arXiv 2311.00913, eqs. 6 to 8), times the number of scores."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    z = [(score - mean) / math.sqrt(variance) for score in scores]
    total = sum(math.exp(temperature * each) for each in z)
    return [len(scores) * math.exp(temperature * each) / total for each in z]


@pytest.mark.parametrize("temperature", [1.0, -1.0, 0.3, 40.0])
def test_weights_are_the_papers_times_the_number_of_samples(temperature):
    weights = softmax_weights(temperature * standardised(SCORES))
    assert weights.tolist() == pytest.approx(written_out(SCORES.tolist(), temperature), rel=1e-6)
    assert weights.sum() == pytest.approx(len(SCORES), rel=1e-12)


def test_a_common_factor_of_all_scores_does_not_matter():
    for factor in (1e-12, 1e9):
        assert standardised(factor * SCORES) == pytest.approx(standardised(SCORES), rel=1e-9)


def test_scores_that_differ_by_rounding_alone_weigh_alike():
    scores = 7.3 * (1 + 1e-6 * np.random.default_rng(1).standard_normal(9))
    assert softmax_weights(standardised(scores)) == pytest.approx(np.ones(9), abs=0.05)
    assert standardised(np.full(4, 0.0)).tolist() == [0.0] * 4


def test_the_softmax_of_scores_far_apart_does_not_overflow():
    assert softmax_weights(np.array([1e4, 0.0, -1e4])).tolist() == [3.0, 0.0, 0.0]


def test_weights_by_a_window_of_the_very_same_scores_are_those_of_the_batch():
    z = 0.8 * standardised(SCORES)
    assert window_weights(z, z, bound=13) == pytest.approx(softmax_weights(z), rel=1e-12)


def test_weights_by_a_window_depend_on_no_other_sample_and_are_bounded():
    window = standardised(SCORES)
    alone = [window_weights(np.array([each]), window, bound=13)[0] for each in (0.1, 2.0, 700.0)]
    assert window_weights(np.array([0.1, 2.0, 700.0]), window, bound=13).tolist() == alone
    assert alone[:2] == pytest.approx(np.exp([0.1, 2.0]) / np.exp(window).mean()) and alone[2] == pytest.approx(13)


def test_linupper_is_the_papers_function_of_the_loss():
    losses = np.array([2.0, 3.0, 4.0, 7.0, 12.0])
    expected = [min(2 * (loss - 2) / 10 - 1 + 1, 1) for loss in losses]
    assert linupper(losses).tolist() == pytest.approx(expected) == [0.0, 0.2, 0.4, 1.0, 1.0]
    assert linupper(np.full(3, 4.0)).tolist() == [1.0] * 3


@pytest.mark.parametrize("step", [0, 1, 2**33])
def test_shuffled_weights_are_a_permutation_that_the_step_decides(step):
    weights = np.random.default_rng(2).random(101)
    shuffled = permuted(weights, 3, step)
    assert sorted(shuffled) == sorted(weights) and shuffled.tolist() != weights.tolist()
    assert shuffled.tolist() == permuted(weights, 3, step).tolist()
    assert shuffled.tolist() != permuted(weights, 4, step).tolist() != permuted(weights, 3, step + 1).tolist()


def test_every_sample_comes_to_every_place_about_equally_often():
    counts = np.zeros((5, 5))
    for step in range(2000):
        for place, sample in enumerate(permuted(np.arange(5), 0, step)):
            counts[place, sample] += 1
    assert abs(counts / 2000 - 0.2).max() < 0.045  # five standard errors


def test_the_effective_sample_size_is_a_fraction_of_the_samples():
    assert effective_sample_size(np.ones(7)) == 1.0
    assert effective_sample_size(np.array([4.0, 0, 0, 0])) == 0.25
    assert effective_sample_size(np.array([2.0, 2, 0, 0])) == 0.5


def test_no_sample_at_all_is_no_error():
    none = np.zeros(0)
    assert not len(standardised(none)) and not len(softmax_weights(none)) and not len(linupper(none))
    assert not len(permuted(none, 0, 0)) and effective_sample_size(none) == 1.0


def test_noise_and_signal_are_found_without_bias():
    rng = np.random.default_rng(4)
    mean, deviation, samples = rng.standard_normal(30), 0.7, 6
    found = []
    for _ in range(4000):
        gradients = mean + deviation * rng.standard_normal((samples, 30))
        found.append(noise_and_signal((gradients.sum(0) ** 2).sum(), (gradients**2).sum(1)))
    noise, signal = np.mean(found, 0)
    errors = np.std(found, 0) / math.sqrt(len(found))
    assert abs(noise - deviation**2 * 30 / samples) < 5 * errors[0]
    assert abs(signal - (mean**2).sum()) < 5 * errors[1]
