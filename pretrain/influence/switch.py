"""When to go from novelty to stability: a switch that is thrown when a step's gradient is more noise than signal."""

from typing import Any

import numpy as np

from pretrain.influence.weights import noise_and_signal

INTERVAL_STEPS = 10
DECAY = 0.9  # of what was measured before, from measurement to measurement
ENOUGH = 5  # measurements


class NoiseSwitch:
    """Compares the noise of the mean gradient with its signal, both averaged over measurements; once thrown it stays.

    While the signal is larger, samples of large gradients are those that the model has most to learn from; afterwards,
    those that are noisiest.
    """

    def __init__(self):
        self.noise = self.signal = 0.0
        self.measurements = 0
        self.thrown = False

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is to be measured."""
        return not self.thrown and step % INTERVAL_STEPS == 0

    def take(self, square_of_sum: float, squares: np.ndarray) -> None:
        """Take up a step's ‖Σ g‖² and ``squares [n]``, the ‖g‖² of its parts; numbers that are not finite, or a single
        part, say nothing."""
        if len(squares) < 2 or not np.isfinite([square_of_sum, *squares]).all():
            return
        noise, signal = noise_and_signal(square_of_sum, squares)
        self.noise, self.signal = DECAY * self.noise + noise, DECAY * self.signal + signal
        self.measurements += 1
        self.thrown = self.measurements >= ENOUGH and self.noise > self.signal

    @property
    def ratio(self) -> float | None:
        """Noise over signal; None where there is no signal to see."""
        return self.noise / self.signal if self.signal > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken up, as JSON holds it."""
        return {name: getattr(self, name) for name in ("noise", "signal", "measurements", "thrown")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
