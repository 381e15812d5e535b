"""The models that studies train."""

from pathlib import Path

from pretrain.model.disentangled import folded
from pretrain.training.build import Parts


def save_model(parts: Parts, folder: Path) -> None:
    """Write the backbone, as it is now, and its tokenizer as ``medley evaluate`` reads them."""
    folded(parts.model.encoder.pretrained).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
