"""A store of 10⁹ tokens costs what a small one does: counted in reads, bytes and memory, not in seconds."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from benchmarks.store import synthesise
from pretrain.data.loader import Loader
from pretrain.data.store import Store

LENGTH = 997  # tokens of a sample
KEYS = {"seed": 3, "row_length": 2 * LENGTH, "batch_rows": 12, "micro_batch_rows": 6, "window": 512, "world_size": 2}
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stores of about 10⁶ and 10⁹ tokens, the large one in 64 shards, whose files are holes but for the index."""
    folder = tmp_path_factory.mktemp("scale")
    synthesise(folder / "small", 10**6, 1, LENGTH)
    synthesise(folder / "large", 10**9, 64, LENGTH)
    yield folder
    (folder / "large" / "index.npy").unlink()


@pytest.fixture
def reads(monkeypatch):
    """What is read: (bytes asked for) of every read."""
    sizes, pread = [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, size, place: sizes.append(size) or pread(descriptor, size, place)
    )
    return sizes


def positions(store):
    """The state at the start, in the middle and near the end of the third epoch."""
    last = -(-3 * len(store) // KEYS["window"]) - 2
    return [{"window": window, "row": 1, "samples": 512 * window} for window in (0, last // 2, last)]


def test_the_large_store_has_its_size_and_its_shards(folders):
    store = Store(folders / "large")
    assert len(store.tokens) == store.meta["tokens"] > 999_000_000 and len(store.meta["shards"]) == 64
    assert store.index[-1].sum() == len(store.tokens) and len(store[len(store) - 1]) == LENGTH


@pytest.mark.parametrize("size", ["small", "large"])
def test_opening_reads_no_token_and_no_row_of_the_index(folders, reads, size):
    assert len(Store(folders / size)) > 1000 and reads == []


def test_resuming_anywhere_reads_one_window_and_the_batch(folders, reads):
    store = Store(folders / "large")
    for position in positions(store):
        loader = Loader(store, **KEYS)
        identity = json.loads(json.dumps(loader.state_dict()))["identity"]
        loader.load_state_dict({**position, "identity": identity})
        assert reads == []
        loader.next()
        index = [size for size in reads if size != 2 * LENGTH]
        assert len(index) <= KEYS["window"] and sum(index) <= 512 * KEYS["window"]
        assert len(reads) - len(index) <= 2 * KEYS["batch_rows"] // 2  # two samples a row, half the rows are ours
        reads.clear()


def test_memory_of_a_rank_does_not_grow_with_the_store(folders):
    peaks = {}
    for size in ("small", "large"):
        tracemalloc.start()
        store = Store(folders / size)
        store.token_counts(1000, sampled=2**16)
        for position in positions(store):
            loader = Loader(store, **KEYS)
            loader.load_state_dict({**position, "identity": loader.state_dict()["identity"]})
            for _ in range(60):  # some windows
                loader.next()
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks["large"] < peaks["small"] + MEBIBYTE / 2 and peaks["large"] < 8 * MEBIBYTE
    np.testing.assert_equal(str(folders) in open("/proc/self/maps").read(), False)


def test_a_late_batch_has_the_tokens_that_lie_there(folders):
    store = Store(folders / "large")
    shard = folders / "large" / store.meta["shards"][-1]["file"]
    last = len(store) - 1
    with open(shard, "r+b") as file:
        file.seek(-2 * LENGTH, os.SEEK_END)
        file.write(np.arange(LENGTH, dtype="<u2").tobytes())
    assert store[last].tolist() == list(range(LENGTH)) and not store[last - 1].any()
