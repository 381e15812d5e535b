"""Which tokens a masking policy hides, visit by visit."""

import numpy as np

from fused_objectives.targets import IGNORED
from pretrain.data.annotations import Annotation
from pretrain.data.batch import collate
from pretrain.data.store import Store
from pretrain.masking.masker import Masker

ROWS_AT_ONCE = 256


def draw_masks(
    masker: Masker, store: Store, samples: np.ndarray, visits: int, first_visit: int = 1000
) -> list[np.ndarray]:
    """Draw masks as training does at the run's start: for each of ``samples`` ``[visits, tokens]`` bool, true where the
    token is hidden.

    Args:
        first_visit: the visits are numbered from here; those of training begin with 0.

    Raises:
        UserError: if the store lacks the annotation that the policy reads.
    """
    wanted = {name: Annotation(store, name, kind) for name, kind in masker.annotations.items()}
    rows = [np.array([sample]) for sample in samples for _ in range(visits)]
    numbers = [np.array([first_visit + visit]) for _ in samples for visit in range(visits)]
    lengths, drawn = np.repeat(store.lengths[samples], visits), []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        batch = collate(store, rows[part], numbers[part], 0, store.max_length, masker.vocabulary.pad_id, wanted)
        labels = masker(batch, 0.0).labels.numpy()
        drawn += [row[:length] != IGNORED for row, length in zip(labels, lengths[part].tolist(), strict=True)]
    return [np.stack(drawn[start : start + visits]) for start in range(0, len(drawn), visits)]
