"""Where training began: a fingerprint of the backbone's first weights, by which runs of one initialisation are
known."""

import hashlib

import torch
from torch import nn


def fingerprint(encoder: nn.Module) -> str:
    """Return the SHA-256, in hex, over names, shapes and fp32 values of an encoder's parameters, in the order of their
    names.

    It is to be taken before heads are built, which may replace parts of the backbone, and before DeepSpeed cuts the
    weights up. A backbone on its own has the same one beside any objectives.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(encoder.named_parameters()):
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy())
    return digest.hexdigest()
