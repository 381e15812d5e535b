"""One module for all objectives: the backbone, every head, and the one place where losses are reduced."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.errors import UserError
from pretrain.model.disentangled import check_vocabulary_head
from pretrain.model.encoder import Encoder
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.objectives.base import REGISTRY, Objective, TermLoss, View

BACKBONE = "backbone"


def component(head: str) -> str:
    """Return the name of a head's component; the generator is a model of its own and no head."""
    return head if head == "generator" else f"head/{head}"


class MultiObjectiveModel(nn.Module):
    """Backbone and heads of all objectives of a recipe, in one module, so that one engine call does a whole micro-step.

    Args:
        encoder: the backbone.
        objectives: by name; each is asked for the heads that no earlier one has built.
    """

    def __init__(self, encoder: Encoder | EncoderDecoder, objectives: dict[str, Objective]):
        super().__init__()
        self.encoder = encoder
        self.objectives = objectives
        self.heads = nn.ModuleDict()
        self._followers = {name for name, objective in objectives.items() if objective.follows}
        self.left: dict[str, Any] = {}
        """What objectives leave for those that follow them in a forward pass."""
        for objective in objectives.values():
            _check_kind(objective, encoder)
            objective.check(encoder)
            objective.meet(objectives)
            missing = set(objective.heads) - set(self.heads)
            if missing:
                built = objective.build_heads(encoder)
                self.heads.update({name: built[name] for name in objective.heads if name in missing & built.keys()})
        if "vocabulary" in self.heads:
            check_vocabulary_head(encoder.pretrained)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return component → parameters: ``backbone``, then every head without what it shares with those before it."""
        seen: set[int] = set()
        components: dict[str, list[nn.Parameter]] = {}
        for name, module in ((BACKBONE, self.encoder), *((component(n), head) for n, head in self.heads.items())):
            components[name] = [p for p in module.parameters() if id(p) not in seen]
            seen.update(id(p) for p in components[name])
        return {name: params for name, params in components.items() if params}

    def trained_by(self, names: list[str]) -> set[str]:
        """Return the components that a step on these objectives trains."""
        heads = {component(head) for name in names for head in self.objectives[name].heads}
        return (heads | {BACKBONE}) & set(self.components())

    def forward(
        self,
        views: dict[str, View],
        scales: dict[str, float],
        weights: Mapping[str, torch.Tensor] | None = None,
        judges: Mapping[str, Objective] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the objectives of one micro-step.

        Args:
            views: objective → its view of the micro-batch.
            scales: term → factor: share of the objective × weight of the term / global count of the term's targets.
            weights: objective → ``[S]`` float32 sample weights; 1 where there are none.
            judges: who computes the losses, by the names in ``views``; None: the model's objectives.

        Returns:
            the micro-step's part of the step's loss, a scalar, and term → ``[S]`` float32, each sample's sum of losses,
            detached; or what objectives count in the forward pass.

        The loss is Σ over terms of scale × Σ over samples of weight × sum: added over all ranks and micro-steps it is
        the weighted mean over the step's global count.
        """
        losses: dict[str, TermLoss] = {}
        for name in sorted(views, key=self._followers.__contains__):
            losses |= (judges or self.objectives)[name].loss(self, views[name], (weights or {}).get(name))
        self.left.clear()
        loss = sum(scales[term] * each.total for term, each in losses.items() if each.total is not None)
        return loss, {term: term_loss.sums for term, term_loss in losses.items()}


def _check_kind(objective: Objective, backbone: Encoder | EncoderDecoder) -> None:
    """Raise :class:`UserError` if an objective of sources and targets meets another backbone, or the reverse."""
    paired = isinstance(backbone, EncoderDecoder)
    if objective.paired == paired:
        return
    if paired:
        fitting = ", ".join(sorted(name for name, each in REGISTRY.items() if each.paired))
        reason = f"'{backbone.config.model_type}' is an encoder–decoder, which is trained on {fitting}"
    else:
        reason = f"needs an encoder–decoder, such as t5 or bart; '{backbone.config.model_type}' is none (model.family)"
    raise UserError(f"objectives.{objective.name}: {reason}")
