"""The local cache: whole copies, shared, within their bound; and a run that goes on whatever happens to it."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import parse
from pretrain.data import local_cache
from pretrain.data.disk_array import DiskArray
from pretrain.data.local_cache import CacheConfig, LocalCache
from pretrain.errors import UserError
from tests.builders import random_samples
from tests.data.test_shards import write

SHARD = 200  # bytes
SAMPLES = random_samples([100] * 7 + [50], seed=9)


def make(folder, seed=9):
    """Write and open a store of eight shards, seven of 200 bytes and one of 100, and an index of 256."""
    store = write(folder, SHARD / 1e6, random_samples([100] * 7 + [50], seed=seed))
    assert [shard["bytes"] for shard in store.meta["shards"]] == [SHARD] * 7 + [100]
    assert store.meta["index"]["bytes"] == 256
    return store


def cached(store, folder, limit):
    """Copy to ``folder`` as a run does and wait for it."""
    cache = LocalCache(CacheConfig(folder=str(folder), gigabytes=limit / 1e9), [store.index, store.tokens])
    cache.start()
    cache.start()
    cache.join()
    return cache


def copies(folder):
    """Name → bytes of the copies, and nothing else may lie there but the lock."""
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert found.pop(".lock") == 0
    return found


def files(*stores):
    """Name of a copy → bytes, for all files of stores."""
    entries = [entry for store in stores for entry in [store.meta["index"], *store.meta["shards"]]]
    return {f"{entry['sha256']}.bin": entry["bytes"] for entry in entries}


def reads_from(array: DiskArray):
    """Where each part of an array is read now."""
    return [str(Path(f"/proc/self/fd/{descriptor}").readlink().parent) for descriptor in array._sources]


def is_intact(store, samples=SAMPLES):
    return all(np.array_equal(store[number], sample) for number, sample in enumerate(samples))


def test_all_files_that_fit_are_copied_and_read_there(tmp_path, capsys):
    store = make(tmp_path / "store")
    cached(store, tmp_path / "cache", 1756)
    assert copies(tmp_path / "cache") == files(store)
    assert set(reads_from(store.tokens)) == set(reads_from(store.index)) == {str(tmp_path / "cache")}
    shutil.rmtree(store.folder)
    assert is_intact(store) and capsys.readouterr().err == ""


def test_what_does_not_fit_is_read_from_the_store_and_nothing_is_evicted_for_it(tmp_path, capsys):
    store = make(tmp_path / "store")
    for _ in range(2):  # a second run finds the same copies
        cached(store, tmp_path / "cache", 256 + 3 * SHARD + 99)
        assert list(copies(tmp_path / "cache").values()).count(SHARD) == 3
        assert copies(tmp_path / "cache").keys() < files(store).keys()
        assert reads_from(store.tokens).count(str(tmp_path / "cache")) == 3
        assert is_intact(store) and capsys.readouterr().err == ""
        store = make(tmp_path / "again") if not (tmp_path / "again").exists() else store


def test_a_bound_below_every_file_copies_nothing(tmp_path):
    store = make(tmp_path / "store")
    cached(store, tmp_path / "cache", 99)
    assert copies(tmp_path / "cache") == {} and is_intact(store)


def test_copies_of_a_stores_other_files_are_not_given_up_for_those_that_lack_one(tmp_path):
    cached(make(tmp_path / "1"), tmp_path / "cache", 10_000)
    for name in list(files(make(tmp_path / "2")))[:4]:
        (tmp_path / "cache" / name).unlink()
    left = copies(tmp_path / "cache")
    store = make(tmp_path / "3")
    cached(store, tmp_path / "cache", sum(left.values()) + 99)
    assert copies(tmp_path / "cache") == left and is_intact(store)


def test_copies_of_other_stores_make_room_the_least_recently_used_first(tmp_path):
    folder, stores = tmp_path / "cache", [make(tmp_path / str(seed), seed) for seed in (1, 2, 9)]
    early, late, wanted = map(files, stores)  # they have the index in common, and so its copy
    for store in stores[:2]:
        cached(store, folder, 10_000)
    for time, name in enumerate([*early, *late]):
        os.utime(folder / name, (time, time))
    third = stores.pop()
    stores.clear()
    del store
    cached(third, folder, 256 + 3 * 1500 - 1200)
    assert copies(folder) == dict(list(early.items())[-2:]) | late | wanted


def test_a_copy_that_a_process_reads_is_never_removed(tmp_path):
    first, second = make(tmp_path / "1", 1), make(tmp_path / "2", 2)
    cached(first, tmp_path / "cache", 1756)
    cached(second, tmp_path / "cache", 1756)
    assert copies(tmp_path / "cache") == files(first) and is_intact(second, random_samples([100] * 7 + [50], seed=2))
    del first
    cached(second, tmp_path / "cache", 1756)
    assert copies(tmp_path / "cache") == files(second)


def test_a_lower_bound_is_kept_even_against_the_stores_own_copies(tmp_path):
    cached(make(tmp_path / "1"), tmp_path / "cache", 10_000)
    store = make(tmp_path / "2")
    cached(store, tmp_path / "cache", 700)
    assert 500 < sum(copies(tmp_path / "cache").values()) <= 700 and is_intact(store)


def test_the_bound_holds_at_every_moment_while_copying(tmp_path, monkeypatch):
    cached(make(tmp_path / "1", 1), tmp_path / "cache", 10_000)
    store, most = make(tmp_path / "2", 2), []
    content = DiskArray.content

    def watched(self, number):
        for piece in content(self, number):
            yield piece
            most.append(len(piece) + sum(copies(tmp_path / "cache").values()))

    monkeypatch.setattr(DiskArray, "content", watched)
    cached(store, tmp_path / "cache", 1756 + 300)
    assert len(most) == 8 and max(most) <= 1756 + 300


def test_ranks_share_one_copy_of_each_file(tmp_path, monkeypatch):
    written, copy = [], LocalCache._copy
    monkeypatch.setattr(LocalCache, "_copy", lambda self, *args: written.append(args[2].sha256) or copy(self, *args))
    stores = [make(tmp_path / str(rank)) for rank in range(4)]
    config = CacheConfig(folder=str(tmp_path / "cache"), gigabytes=1756 / 1e9)
    caches = [LocalCache(config, [store.index, store.tokens]) for store in stores]
    for cache in caches:
        cache.start()
    for cache in caches:
        cache.join()
    assert sorted(f"{name}.bin" for name in written) == sorted(files(stores[0])) and len(set(written)) == 9
    for store in stores:
        assert set(reads_from(store.tokens)) == {str(tmp_path / "cache")} and is_intact(store)


def test_a_copy_is_made_only_by_who_holds_the_lock_and_what_a_dead_one_left_is_removed(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / local_cache.INCOMING).write_bytes(b"x" * 5000)
    store = make(tmp_path / "store")
    cache = LocalCache(CacheConfig(folder=str(folder), gigabytes=1756 / 1e9), [store.index, store.tokens])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.start()
        assert is_intact(store)  # training does not wait for it
        assert {path.name for path in folder.iterdir()} == {".lock", local_cache.INCOMING}
    cache.join()
    assert copies(folder) == files(store)
    (folder / local_cache.INCOMING).write_bytes(b"x" * 5000)
    cached(store, folder, 1756)  # where nothing is left to copy
    assert copies(folder) == files(store)


def test_a_copy_whose_content_is_not_the_listed_one_is_not_kept(tmp_path, capsys):
    store = make(tmp_path / "store")
    shard = store.folder / "tokens-00002.bin"
    shard.write_bytes(bytes(SHARD))
    cached(store, tmp_path / "cache", 1756)
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1 and "tokens-00002.bin: its content is not the one that meta.json has the hash of" in told
    )
    assert copies(tmp_path / "cache").keys() == set(list(files(store))[:3]) and reads_from(store.tokens)[2] == str(
        store.folder
    )


def test_a_copy_of_another_size_is_made_again(tmp_path):
    store = make(tmp_path / "store")
    name = list(files(store))[4]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).write_bytes(b"x" * 7)
    cached(store, tmp_path / "cache", 1756 + 7)
    assert copies(tmp_path / "cache") == files(store) and is_intact(store)


def test_a_copy_that_becomes_unreadable_is_given_up_for_the_store(tmp_path, capsys):
    store = make(tmp_path / "store")
    cached(store, tmp_path / "cache", 1756)
    name = list(files(store))[3]
    os.truncate(tmp_path / "cache" / name, 5)
    for _ in range(2):
        assert is_intact(store)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and name in told and "tokens-00002.bin is read instead" in told


def test_a_full_disk_is_one_warning_and_leaves_nothing_half(tmp_path, capsys, monkeypatch):
    store, sync = make(tmp_path / "store"), os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    cached(store, tmp_path / "cache", 1756)
    reason = f"{tmp_path / 'cache'}: No space left on device"
    assert capsys.readouterr().err == f"warning: data.cache: {reason}; what is not copied is read where it lies\n"
    assert len(copies(tmp_path / "cache")) == 2 and is_intact(store)


@pytest.mark.parametrize("reason", ["a file in its place", "no permission to make it"])
def test_a_folder_that_cannot_be_written_is_one_warning_of_one_rank(tmp_path, capsys, monkeypatch, reason):
    folder = tmp_path / "cache"
    if reason == "a file in its place":
        folder.touch()
    else:
        folder = "/proc/none/cache"
    store = make(tmp_path / "store")
    cached(store, folder, 1756)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: data.cache: {folder}: ") and told.count("\n") == 1 and is_intact(store)
    monkeypatch.setenv("LOCAL_RANK", "1")
    cached(store, folder, 1756)
    assert capsys.readouterr().err == ""


def test_stores_without_hashes_of_their_files_are_not_copied(tmp_path):
    store = make(tmp_path / "store")
    arrays = [DiskArray([type(part)(part.path, part.items) for part in store.tokens.parts], store.dtype, "")]
    cache = LocalCache(CacheConfig(folder=str(tmp_path / "cache"), gigabytes=1), arrays)
    cache.start()
    cache.join()
    assert copies(tmp_path / "cache") == {}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"folder": "x", "gigabytes": 1, "gigabyte": 1}, "did you mean 'gigabytes'"),
        ({"folder": "x", "gigabytes": 0}, "gigabytes"),
        ({"gigabytes": 1}, "folder"),
    ],
)
def test_wrong_keys_are_one_line(keys, told):
    with pytest.raises(UserError, match=rf"^[^\n]*{told}[^\n]*$"):
        parse(CacheConfig, keys, "recipe.yaml")
