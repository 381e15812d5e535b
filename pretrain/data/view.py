"""Views: a prepared corpus that shows some samples of another and copies no tokens."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from pretrain.data.store import FORMAT_VERSION, Store
from pretrain.data.store_writer import write_index


def write_view(folder: Path, corpus: Path, kept: np.ndarray, published: Path, **meta) -> None:
    """Write a view of a prepared corpus: some samples of ``train``, all of ``heldout``, and the tokenizer.

    Args:
        folder: to write in; it exists.
        corpus: a prepared corpus, which may be a view itself.
        kept: ``[samples]`` int64: ids of the samples of ``train`` to show, which are numbered anew in this order.
        published: where ``folder`` will lie; the tokens are found relative to it.
        meta: what else ``meta.json`` of ``train`` shall say.
    """
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    _write(folder / "train", Store(corpus / "train"), kept, published / "train", meta)
    if (corpus / "heldout").is_dir():
        heldout = Store(corpus / "heldout")
        _write(folder / "heldout", heldout, np.arange(len(heldout)), published / "heldout", {})


def _write(folder: Path, store: Store, kept: np.ndarray, published: Path, meta: dict) -> None:
    folder.mkdir()
    index = store.index[kept]
    parts = bytes.fromhex(store.source.fingerprint) + hashlib.sha256(index.tobytes()).digest()
    whole = len(kept) == len(store) and (kept == np.arange(len(store))).all()
    document = {
        "format_version": FORMAT_VERSION,
        "dtype": store.dtype.str,
        "samples": len(kept),
        "tokens": int(index[:, 1].sum()),
        "max_length": int(index[:, 1].max(initial=0)),
        "fingerprint": store.fingerprint if whole else hashlib.sha256(parts).hexdigest(),
        "view_of": {
            "folder": os.path.relpath(store.source.folder.resolve(), published.resolve()),
            "fingerprint": store.source.fingerprint,
        },
        "index": write_index(folder, len(kept), io.BytesIO(index.tobytes())),
        **({"tokenizer": store.meta["tokenizer"]} if "tokenizer" in store.meta else {}),
        **meta,
    }
    (folder / "meta.json").write_text(json.dumps(document, indent=2) + "\n")
