"""Annotations: which tokens of a store belong together, kept beside them.

An annotation of a store is a folder of two files within it::

    annotations/NAME/units.bin   one little-endian uint16 a token of tokens.bin, 65535 where there is nothing to say
    annotations/NAME/meta.json   format version, kind, the store's fingerprint, counts, what made it

A view's annotations are those of the store whose samples it shows.

There are two kinds. ``spans`` numbers the units of each sample (0, 1, …): named entities, dates, spans that a policy
would have the model recover. ``classes`` gives each token a class, an index into :data:`PARTS_OF_SPEECH`.
"""

import json
from pathlib import Path

import numpy as np

from pretrain.data.store import Store, StoreWriter
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
    """Read access to one annotation of a store; opens in constant time.

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
        tokens, file = int(store.meta["tokens"]), self.folder / "units.bin"
        if not file.is_file() or file.stat().st_size != 2 * tokens:
            raise UserError(f"{file}: is damaged: not 2 bytes for each of {tokens:,} tokens; {again}")
        self.units = np.memmap(file, "<u2", "r") if tokens else np.empty(0, np.uint16)

    def look_up(self, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the units of the samples ``ids``, one after another; ``places`` are those of their tokens in the
        store."""
        return self.units[places]


def folder_of(store: Store | StoreWriter, name: str) -> Path:
    """Return where an annotation of a store lies."""
    return store.folder / "annotations" / name
