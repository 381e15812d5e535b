"""Annotations: which tokens of a store belong together, kept beside them.

An annotation of a store is a folder of two files within it::

    annotations/NAME/units.bin   one little-endian uint16 a token of the store, by its offset; 65535: nothing to say
    annotations/NAME/meta.json   format version, kind, the store's fingerprint, counts, what made it

A view's annotations are those of the store whose samples it shows.

There are two kinds. ``spans`` numbers the units of each sample (0, 1, …): named entities, dates, spans that a policy
would have the model recover. ``classes`` gives each token a class, an index into :data:`PARTS_OF_SPEECH`.
"""

import json
from pathlib import Path

import numpy as np

from pretrain.data.disk_array import DiskArray, Part
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.errors import UserError, nearest

FORMAT_VERSION = 1
KINDS = ("spans", "classes")
PARTS_OF_SPEECH = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
"""The classes of Universal Dependencies, in their order there."""
NO_UNIT = 2**16 - 1


class Annotation:
    """Read access to one annotation of a store; opens in constant time. ``units`` are the tokens' by their offsets.

    Raises:
        UserError: if the store has none of this name, or it is of another kind, made for another store, or damaged.
    """

    def __init__(self, store: Store, name: str, kind: str):
        store = store.source
        self.name, self.folder = name, folder_of(store, name)
        corpus = store.folder.parent
        again = f"make it with 'medley annotate {corpus} {name}{' --model FOLDER' * (name == 'learned')}'"
        if not (self.folder / "meta.json").is_file():
            others = sorted(path.name for path in self.folder.parent.glob("*") if (path / "meta.json").is_file())
            match = nearest(name, others)
            hint = f"; did you mean '{match}'?" if match else f"; {again}"
            raise UserError(f"{store.folder}: has no annotation '{name}'{hint}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            version, fingerprint = self.meta["format_version"], self.meta["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / 'meta.json'}: not an annotation's ({error!r}); {again}") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{self.folder}: format version {version}, this program reads {FORMAT_VERSION}; {again}")
        if fingerprint != store.fingerprint:
            raise UserError(f"{self.folder}: was made for another store; {again}")
        if self.meta.get("kind") != kind:
            raise UserError(
                f"{self.folder}: holds {self.meta.get('kind')}, but {kind} are needed; name another annotation"
            )
        self.units = DiskArray([Part(self.folder / "units.bin", int(store.meta["tokens"]))], "<u2", again)

    def look_up(self, ids: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the units of the samples ``ids``, one after another; ``offsets`` and ``lengths`` are those of their
        tokens in the store."""
        return self.units.runs(offsets, lengths)


def folder_of(store: Store | StoreWriter, name: str) -> Path:
    """Return where an annotation of a store lies."""
    return store.folder / "annotations" / name
