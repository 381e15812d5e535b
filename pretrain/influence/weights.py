"""From scores to weights: what PRESENCE (arXiv 2311.00913) and its baselines do with the numbers of a global batch.

Weights are never negative and their mean is 1 (the paper's sum to 1): a step then keeps the size of a plain one, and
with it the meaning of learning rate and clipping. All numbers are fp64.
"""

import numpy as np

from fused_objectives.philox import philox

RELATIVE_EPSILON = 1e-4  # deviations below this part of the mean are rounding, not differences between samples


def standardised(scores: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Return (s − mean) / √(var + ε) of ``scores [n]`` (eq. 6), with mean and variance of ``among [m]`` or themselves.

    ε is relative to the mean, so that a common factor of all scores does not matter.
    """
    among = scores if among is None else among
    if not len(scores) or not len(among):
        return np.zeros(len(scores))
    mean, variance = among.mean(), among.var()
    spread = np.sqrt(variance + (RELATIVE_EPSILON * mean) ** 2)
    return (scores - mean) / spread if spread else np.zeros(len(scores))


def softmax_weights(exponents: np.ndarray) -> np.ndarray:
    """Return n · softmax of ``exponents [n]`` (eqs. 7 and 8, times n)."""
    if not len(exponents):
        return np.ones(0)
    powers = np.exp(exponents - exponents.max())
    return powers * (len(powers) / powers.sum())


def window_weights(exponents: np.ndarray, among: np.ndarray, bound: float) -> np.ndarray:
    """Return e^x of ``exponents [n]`` over its mean for ``among [m]``, the exponents of earlier samples; at most
    ``bound``.

    So a sample's weight depends on no other sample of its batch, and weights have the mean 1 only in the long run.
    """
    logarithm = among.max() + np.log(np.exp(among - among.max()).mean())
    return np.exp(np.minimum(exponents - logarithm, np.log(bound)))


def linupper(losses: np.ndarray) -> np.ndarray:
    """Return min(h + 1, 1) of ``losses [n]``, with h the losses rescaled to [−1, 1] (LinUpper, arXiv 2502.06733)."""
    if not len(losses) or losses.max() == losses.min():
        return np.ones(len(losses))
    rescaled = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    return np.minimum(rescaled + 1, 1)


def permuted(weights: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Return ``weights [n]`` in an order that depends on (seed, step) alone."""
    draws = philox(seed, "weigher", np.arange(len(weights)), step)[0]
    return weights[np.argsort(draws, kind="stable")]


def effective_sample_size(weights: np.ndarray) -> float:
    """Return (Σw)² / Σw² of ``weights [n]`` as a fraction of n; 1 if there are none."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares / len(weights) if squares else 1.0


def noise_and_signal(square_of_sum: float, squares: np.ndarray) -> tuple[float, float]:
    """Split the size of a gradient into noise and signal, from ‖Σ g‖² and ``squares [n]``, the ‖g‖² of its n ≥ 2 parts.

    The signal ‖E g‖² is the mean product of two different parts, (‖Σ g‖² − Σ ‖g‖²) / n(n − 1), which noise does not
    bias; it may come out negative. The noise is what is left of the mean ‖g‖², divided by n: that of the mean gradient.
    """
    number, total = len(squares), float(squares.sum())
    signal = (square_of_sum - total) / (number * (number - 1))
    return (total / number - signal) / number, signal
