"""Packed samples, and the loop over batches of one that per-sample gradients are tested against."""

import torch

from tests.kernels.conftest import Place

LENGTHS = (5, 0, 1, 70, 33)
"""Of samples in a pack: an empty one, one of one token, one of more than a tile of 64 rows."""
SAMPLES = len(LENGTHS)


def packed_segments(device: str = "cpu", lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Return segment ids of samples in a row with padding before, between and behind."""
    runs = [torch.full((3,), -1)]
    for sample, length in enumerate(lengths):
        runs += [torch.full((length,), sample), torch.full((sample % 3,), -1)]
    return torch.cat([*runs, torch.full((2,), -1)]).to(device)


def random_matrix(place: Place, width: int, seed: int = 0, rows: int | None = None) -> torch.Tensor:
    """Return normal numbers, a row for each token of :func:`packed_segments`."""
    rows = len(packed_segments()) if rows is None else rows
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return matrix.to(place.device, place.dtype)


def gradients_one_by_one(module, inputs, output_gradients, segments, samples=SAMPLES) -> list[list[torch.Tensor]]:
    """Return each sample's gradients of the module's parameters, by autograd on that sample alone."""
    result = []
    for sample in range(samples):
        module.zero_grad(set_to_none=False)
        own = segments == sample
        (module(inputs[own]) * output_gradients[own]).sum().backward()
        result.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()])
    return result


def norms_one_by_one(module, inputs, output_gradients, segments, samples=SAMPLES) -> torch.Tensor:
    """Return each sample's squared norm of all the module's gradients together, ``[S]``."""
    samples = gradients_one_by_one(module, inputs, output_gradients, segments, samples)
    return torch.stack([sum(gradient.square().sum() for gradient in gradients) for gradients in samples])


def plain_and_exact_norms(module, inputs, output_gradients, segments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`norms_one_by_one` in the dtype of the gradients and in fp64."""
    module = module.to(output_gradients.device)
    plain = norms_one_by_one(module.to(output_gradients.dtype), inputs, output_gradients, segments)
    exact_inputs = inputs.double() if inputs.is_floating_point() else inputs
    return plain, norms_one_by_one(module.double(), exact_inputs, output_gradients.double(), segments)
