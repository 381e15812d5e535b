import math

import numpy as np
import pytest
from sklearn import metrics as sk

from pretrain.evaluation.metrics import Scores, baseline, score, summarise, undefined_note


def test_classification_scores_equal_the_hand_computed_ones():
    values = score(np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 2]), regression=False).values
    # F1 by class 2·1/(2+1+1), 2·2/(4+1+0), 0; Matthews (c·s − Σ t·p) / √(s² − Σp²)(s² − Σt²), c = 3, s = 5
    assert values["accuracy"] == values["micro_f1"] == pytest.approx(3 / 5)
    assert values["macro_f1"] == pytest.approx((0.5 + 0.8 + 0.0) / 3)
    assert values["matthews"] == pytest.approx((3 * 5 - (2 * 2 + 2 * 3 + 1 * 0)) / math.sqrt((25 - 13) * (25 - 9)))


def test_classification_scores_equal_scikit_learns_on_random_predictions():
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(0, 5, 137), rng.integers(0, 5, 137)
    scores = score(predictions, labels, regression=False)
    assert scores.undefined == ()
    assert scores.values["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert scores.values["macro_f1"] == pytest.approx(sk.f1_score(labels, predictions, average="macro"))
    assert scores.values["matthews"] == pytest.approx(sk.matthews_corrcoef(labels, predictions))


def test_correlations_equal_the_hand_computed_ones():
    values = score(np.array([1.0, 2.0, 30.0]), np.array([1.0, 3.0, 2.0]), regression=True).values
    assert values["spearman"] == pytest.approx(0.5)
    assert values["pearson"] == pytest.approx(np.corrcoef([1, 2, 30], [1, 3, 2])[0, 1])


@pytest.mark.parametrize("predictions", [[2.5, 2.5, 2.5], [1.0, math.nan, 2.0]])
def test_undefined_correlations_become_zero_and_are_named(predictions):
    scores = score(np.array(predictions), np.array([1.0, 2.0, 3.0]), regression=True)
    assert scores.values == {"spearman": 0.0, "pearson": 0.0}
    assert set(scores.undefined) == {"spearman", "pearson"}


def test_matthews_of_constant_predictions_becomes_zero_and_is_named():
    scores = score(np.array([1, 1, 1]), np.array([0, 1, 1]), regression=False)
    assert scores.values["matthews"] == 0.0
    assert scores.undefined == ("matthews",)
    assert undefined_note("test", [scores, Scores(scores.values)]).endswith("matthews in 1 of 2")
    assert undefined_note("test", [Scores(scores.values)]) is None


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], [1, 0])])
def test_empty_or_unequal_arrays_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="must be equal"):
        score(np.array(predictions), np.array(labels), regression=False)


def test_baseline_is_the_majority_of_train_scored_on_test():
    scores = baseline([1, 1, 0, 2], [0, 1, 2, 1, 0], regression=False)
    assert scores.values["accuracy"] == pytest.approx(2 / 5)
    assert scores.values["macro_f1"] == pytest.approx((2 * 2 / (4 + 3)) / 3)
    assert baseline([1.0, 2.0], [1.5, 3.0], regression=True).values == {"spearman": 0.0, "pearson": 0.0}


def test_spread_is_the_sample_standard_deviation_and_absent_for_one_run():
    mean, sd = summarise([{"accuracy": 0.5}, {"accuracy": 0.7}, {"accuracy": 0.9}])
    assert mean["accuracy"] == pytest.approx(0.7)
    assert sd["accuracy"] == pytest.approx(0.2)
    assert summarise([{"accuracy": 0.5}]) == ({"accuracy": 0.5}, {"accuracy": None})
