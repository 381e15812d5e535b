"""Layers that tell what goes through them: for the time of a recording they have another ``forward``."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from fused_objectives.detection import Detection
from fused_objectives.generator_sampling import Sampled
from pretrain.influence.heads import HeadUse
from pretrain.influence.layers import Layer, Use
from pretrain.influence.ledger import Ledger
from pretrain.model.projection import Score, Shifted
from pretrain.model.rows import present_rows
from pretrain.objectives.scores import CrossEntropyScore, DetectionScore


class _Told(torch.autograd.Function):
    """Hands outputs on as they are; in the backward it tells the inputs of the layer and the gradients that came.

    It keeps activations and no parameter, which ZeRO-3 would have emptied by then, and it keeps them as autograd does,
    so that checkpointing drops and recomputes them.
    """

    @staticmethod
    def forward(ctx, outputs: torch.Tensor, inputs: torch.Tensor, anchor: torch.Tensor | None, tell: Callable | None):
        ctx.tell = tell
        ctx.save_for_backward(inputs)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, gradients: torch.Tensor):
        ctx.tell(*ctx.saved_tensors, gradients)
        return gradients, None, None, None


class Tap:
    """What a layer calls while it is recorded.

    Args:
        layer: the layer.
        ledger: who is told.
        anchor: a tensor that needs a gradient: what comes out of the layer then needs one as well, though the layer's
            parameters are given none. None leaves that to autograd.
    """

    def __init__(self, layer: Layer, ledger: Ledger, anchor: torch.Tensor | None):
        self.layer, self.ledger, self.anchor = layer, ledger, anchor
        self.module = layer.module if anchor is None else layer.detached()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs = self.layer.run(self.module, *args, **kwargs)
        if not torch.is_grad_enabled():
            return outputs
        inputs, rows, tell = self.layer.inputs(*args, **kwargs).detach(), present_rows(), None
        if rows is not None:  # in a checkpoint's second forward nobody says, nor need be told
            outputs, segments = self.layer.spread(outputs, inputs, rows)
            tell = self._teller(segments, rows.scattered)
            self.ledger.numbers += outputs.numel()
        return _Told.apply(outputs, inputs, self.anchor, tell)

    def scored(self, score: Score, features: torch.Tensor) -> Any:
        """Return what a score makes of the layer's inputs, in place of its outputs."""
        module, rows = self.module, present_rows()
        inner = score.score if isinstance(score, Shifted) else score
        if not torch.is_grad_enabled() or rows is None:
            return score(features, module.weight, module.bias)
        segments = rows.of(features.shape[:-1])
        if isinstance(inner, DetectionScore):
            return self._detection(inner, score(features, module.weight, module.bias), features, segments)
        if not isinstance(inner, CrossEntropyScore):
            raise RuntimeError(f"{self.layer.name}: a loss without gradients per sample, {type(inner).__name__}")
        bias = module.bias if inner is score else score.shifted(module.bias)
        bias = None if bias is None else bias.detach().clone()  # not the parameter, which ZeRO-3 empties
        use = HeadUse(self.layer, inner, bias, features.detach(), segments)
        measured = self.ledger.measures(self.layer) and not rows.scattered
        kept = self.anchor is not None and self.ledger.has_room(len(features) * len(module.weight))
        result = score(features, module.weight, module.bias, squared_norms=measured, logit_gradients=kept)
        loss = result.loss if isinstance(result, Sampled) else result
        use = use._replace(loss=loss._replace(total=None))
        self.ledger.expect(self.layer)
        told = _Told.apply(loss.total, features.detach(), self.anchor, partial(self._tell_head, use))
        loss = loss._replace(total=told)
        return result._replace(loss=loss) if isinstance(result, Sampled) else loss

    def _teller(self, segments: torch.Tensor | None, scattered: bool) -> Callable:
        self.ledger.expect(self.layer)

        def tell(inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            if segments is None:
                self.ledger.refuse(self.layer)
                return
            use = self.layer.use(inputs, gradients, segments)
            self.ledger.keep(self.layer, Use.joined([use]) if scattered else use)

        return tell

    def _tell_head(self, use: HeadUse, features: torch.Tensor, factor: torch.Tensor) -> None:
        self.ledger.keep(self.layer, use._replace(features=features, factor=factor))

    def _detection(
        self, score: DetectionScore, loss: Detection, features: torch.Tensor, segments: torch.Tensor | None
    ) -> Detection:
        """A layer with one output, whose gradients are known."""
        slopes, tell = score.slopes(loss)[:, None], self._teller(segments, False)

        def tell_slopes(features: torch.Tensor, factor: torch.Tensor) -> None:
            tell(features, (slopes * factor).to(features.dtype))

        return loss._replace(total=_Told.apply(loss.total, features.detach(), self.anchor, tell_slopes))


@contextmanager
def tapped(layers: Iterable[Layer], ledger: Ledger, anchor: torch.Tensor | None) -> Iterator[None]:
    """Let ``layers`` tell a ledger what goes through them; see :class:`Tap` for ``anchor``."""
    with ExitStack() as stack:
        for layer in layers:
            setattr(layer.module, layer.method, Tap(layer, ledger, anchor))
            stack.callback(delattr, layer.module, layer.method)
        yield
