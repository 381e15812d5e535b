"""Exact meta-gradients in float64: plain autograd through the step, every logit formed, attention by its formula."""

import copy

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.data.batch import Batch
from pretrain.masking.learning.meta_gradient import mixed_embeddings
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from tests.builders import MASK, VOCABULARY, lay_out, random_samples, tiny_encoder

IS_TEXT = torch.tensor([token not in set(VOCABULARY.special_ids.tolist()) for token in range(VOCABULARY.size)])


class Task(torch.nn.Module):
    """An encoder, its vocabulary head, and a linear classifier of first tokens."""

    def __init__(self, family: str = "bert", classes: int = 3):
        super().__init__()
        self.encoder: Encoder = tiny_encoder(family)
        self.vocabulary = self.encoder.vocabulary_head()
        torch.manual_seed(7)
        self.classifier = torch.nn.Linear(self.encoder.config.hidden_size, classes)

    def shared(self) -> dict[str, torch.nn.Parameter]:
        return {f"encoder.{name}": each for name, each in self.encoder.named_parameters()}

    def exact(self) -> "Task":
        return copy.deepcopy(self).double()

    def forward(self, work: str, *args):
        return getattr(self, work)(*args)

    def task_loss(self, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        first = self.encoder(batch.tokens, Layout(batch))[batch.position_ids.eq(0) & batch.real]
        return F.cross_entropy(self.classifier(first), labels)

    def masked_loss(self, batch: Batch, mask: torch.Tensor, shown: torch.Tensor | None = None) -> torch.Tensor:
        """Σ m·CE / Σ m over the text, predicted from what a mask ``shown`` leaves; None: the same mask."""
        with mixed_embeddings(self.encoder, mask if shown is None else shown, MASK):
            hidden = self.encoder(batch.tokens, Layout(batch))
        logits = self.vocabulary(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1), batch.tokens.reshape(-1), reduction="none")
        weights = torch.where(text(batch), mask, 0.0).reshape(-1)
        return (weights * losses).sum() / weights.sum()


def text(batch: Batch) -> torch.Tensor:
    return IS_TEXT[batch.tokens] & batch.real


def batches() -> tuple[Batch, Batch, torch.Tensor]:
    """Return a corpus batch, packed, with a sample of one token, and labelled samples with their labels."""
    corpus = lay_out([random_samples([9, 4], seed=1), random_samples([12, 1], seed=2)])
    labelled = lay_out([[sample] for sample in random_samples([7, 5, 8, 6], seed=3)])
    return corpus, labelled, torch.tensor([0, 2, 1, 0])


def task_gradient(model: Task, labelled: Batch, labels: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model.task_loss(labelled, labels), list(model.shared().values())))


def alignment_twice_differentiated(model: Task, corpus: Batch, mask: torch.Tensor, direction, through_input=True):
    """∂/∂m ⟨direction, ∇L_mlm⟩ by a second backward pass through the gradient, ``[rows, length]``."""
    shown = None if through_input else mask.detach()
    mask = mask.detach().requires_grad_()
    parameters = list(model.shared().values())
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(model.masked_loss(corpus, mask, shown), parameters, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return torch.autograd.grad(product, mask)[0]


def loss_after_a_step(model: Task, corpus, mask, labelled, labels, rate: float) -> torch.Tensor:
    """L_task(θ − α ∇L_mlm(θ; x, m)), the graph of the step kept."""
    shared = model.shared()
    with sdpa_kernel(SDPBackend.MATH):
        loss = model.masked_loss(corpus, mask)
        gradients = torch.autograd.grad(loss, list(shared.values()), create_graph=True, allow_unused=True)
        moved = {
            name: each if gradient is None else each - rate * gradient
            for (name, each), gradient in zip(shared.items(), gradients, strict=True)
        }
        return functional_call(model, moved, ("task_loss", labelled, labels))
