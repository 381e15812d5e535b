"""How often a step runs its models: forward passes of the backbone and the generator."""

from pretrain.model.multi_objective import BACKBONE, MultiObjectiveModel


class PassCounter:
    """Counts calls of the encoders of a model, with or without a gradient, whoever makes them."""

    def __init__(self, model: MultiObjectiveModel):
        encoders = {BACKBONE: model.encoder}
        if "generator" in model.heads:
            encoders["generator"] = model.heads["generator"].encoder
        self.calls = dict.fromkeys(encoders, 0)
        for name, encoder in encoders.items():
            encoder.register_forward_pre_hook(lambda module, inputs, name=name: self._count(name))

    def _count(self, name: str) -> None:
        self.calls[name] += 1

    def restart(self) -> None:
        """Count from 0: a step begins."""
        self.calls = dict.fromkeys(self.calls, 0)

    def a_micro_step(self, micro_steps: int) -> dict[str, float]:
        """Return model → passes since the start of the step, over its micro-steps."""
        return {name: calls / micro_steps for name, calls in self.calls.items()}
