"""Arrays on disk: what numpy would read, in whatever files; and what happens when the files go."""

import errno
import os
import pickle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.disk_array import DiskArray, Part
from pretrain.errors import RunError, UserError
from tests.builders import random_samples, write_store

VALUES = np.random.default_rng(1).integers(0, 2**16, 3001).astype("<u2")


def write(folder: Path, cuts: list[int], values=VALUES, skipped=0) -> DiskArray:
    """Write ``values`` in files that end at ``cuts``, each behind some bytes that are no items."""
    parts = []
    for number, items in enumerate(np.split(values, cuts)):
        path = folder / f"{number}.bin"
        path.write_bytes(b"x" * skipped + items.tobytes())
        parts.append(Part(path, len(items), skipped))
    return DiskArray(parts, np.dtype((values.dtype, values.shape[1:])), "make it again")


@pytest.fixture(params=[([], 0), ([1], 7), ([100, 100, 101, 2990], 3), ([0, 3001], 0)], ids=str)
def array(request, tmp_path):
    return write(tmp_path, *request.param[:1], skipped=request.param[1])


@pytest.mark.parametrize(
    "key",
    [
        *(0, -1, 3000, slice(None), slice(5, 5), slice(99, 102), slice(90, 2995), slice(20, 3), slice(3000, 10, -7)),
        *(np.array([7]), np.array([3000, 0, 99, 100, 101, 0]), np.array([], int), [-3001, -1], VALUES > 60000),
    ],
    ids=str,
)
def test_indexing_reads_what_numpy_reads(array, key):
    np.testing.assert_array_equal(array[key], VALUES[key])
    assert array[key].dtype == VALUES.dtype and len(array) == 3001


def test_items_may_be_rows(tmp_path):
    rows = np.arange(2 * 801).reshape(801, 2).astype("<i8")
    array, places = write(tmp_path, [13, 700], rows, 128), np.array([800, 3, 4, 799, 12, 13, 3])
    for key in (places, slice(10, 720), 700, slice(4, 4)):
        np.testing.assert_array_equal(array[key], rows[key])
    np.testing.assert_array_equal(np.asarray(array), rows)


def test_runs_come_one_after_another_in_the_order_asked_for(tmp_path):
    array = write(tmp_path, [100, 2990])
    starts, lengths = np.array([95, 100, 30, 31, 2990, 7]), np.array([5, 17, 1, 9, 11, 0])
    expected = [VALUES[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    np.testing.assert_array_equal(array.runs(starts, lengths), np.concatenate(expected))
    assert len(array.runs(starts[:0], lengths[:0])) == 0


def test_runs_that_touch_are_one_read_and_near_items_too(tmp_path, monkeypatch):
    array, reads = write(tmp_path, []), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments[1:]) or pread(*arguments))
    array.runs(np.array([10, 15, 30]), np.array([5, 15, 4]))
    array[np.array([1000, 1200, 999, 2000])]
    assert reads == [(48, 20), (2 * 202, 2 * 999), (2, 4000)]


def test_an_array_without_files_is_empty(tmp_path):
    array = DiskArray([], "<u2", "")
    assert len(array) == len(array[:]) == len(array[np.array([], int)]) == len(array.runs(*np.empty((2, 0), int))) == 0
    with pytest.raises(IndexError):
        array[0]


@pytest.mark.parametrize("key", [3001, -3002, [5, 3001]], ids=str)
def test_a_place_outside_is_an_index_error(array, key):
    with pytest.raises(IndexError, match="array of 3001"):
        array[key]


def test_a_file_system_that_gives_fewer_bytes_than_asked_for_is_asked_again(array, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, place: pread(descriptor, min(size, 33), place))
    np.testing.assert_array_equal(array[:], VALUES)


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "a folder"])
def test_a_file_that_is_not_what_it_should_be_is_refused_with_its_remedy(tmp_path, damage):
    parts = write(tmp_path, [9, 90]).parts
    path = parts[1].path
    if damage in ("missing", "a folder"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    if damage in ("shorter", "longer"):
        path.write_bytes((path.read_bytes() + b"x")[: None if damage == "longer" else -2])
    with pytest.raises(UserError, match=rf"^{path}: is (missing|damaged: it has [^\n]*); make it again$"):
        DiskArray(parts, "<u2", "make it again")


def test_too_many_files_are_told_with_what_helps(tmp_path, monkeypatch):
    parts = write(tmp_path, [9]).parts

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"^[^\n]*Too many open files\); raise 'ulimit -n', or prepare larger shards$"):
        DiskArray(parts, "<u2", "")


def test_a_file_that_is_cut_while_it_is_read_is_one_line_that_names_it(tmp_path):
    array = write(tmp_path, [1000])
    os.truncate(tmp_path / "1.bin", 400)
    np.testing.assert_array_equal(array[:1200], VALUES[:1200])
    for read in (lambda: array[1150:1201], lambda: array[[5, 3000]], lambda: array.runs(np.array([2000]), [3])):
        with pytest.raises(RunError, match=r"^[^\n]*/1\.bin: cannot be read any more: it has been cut to 400 bytes$"):
            read()


def test_a_file_system_that_fails_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    array, pread = write(tmp_path, [1000]), os.pread
    stale = array._descriptors[1]

    def failing(descriptor, *arguments):
        if descriptor == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", failing)
    np.testing.assert_array_equal(array[:1000], VALUES[:1000])
    with pytest.raises(RunError, match=r"^[^\n]*/1\.bin: cannot be read any more: Stale file handle$"):
        array[:]


def test_no_file_of_a_store_is_mapped_and_a_closed_one_leaves_no_descriptor(tmp_path):
    before = set(Path("/proc/self/fd").iterdir())
    store = write_store(tmp_path / "store", random_samples([5, 9, 1]))
    assert len(store[1]) == 9 and len(store.lengths[:]) == 3
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    del store
    assert set(Path("/proc/self/fd").iterdir()) == before


def _tokens(store, ids):
    return [store[sample].tolist() for sample in ids]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_is_read_in_other_processes(tmp_path, method):
    samples = random_samples([5, 9, 1, 30])
    store = write_store(tmp_path / "store", samples)
    assert len(pickle.dumps(store)) < 500
    with get_context(method).Pool(2) as pool:
        found = pool.starmap(_tokens, [(store, [0, 3]), (store, [2, 1])])
    assert found == [[samples[i].tolist() for i in ids] for ids in ([0, 3], [2, 1])]


def test_a_copy_is_read_in_place_of_its_file_and_given_up_once_it_fails(tmp_path):
    array, told = write(tmp_path, [1000]), []
    (tmp_path / "copy").write_bytes(VALUES[1000:][::-1].tobytes())  # other content, to tell them apart
    array.use_copy(1, os.open(tmp_path / "copy", os.O_RDONLY), told.append)
    np.testing.assert_array_equal(array[:], np.concatenate([VALUES[:1000], VALUES[1000:][::-1]]))
    assert b"".join(array.content(1)) == VALUES[1000:].tobytes()
    os.truncate(tmp_path / "copy", 10)
    for _ in range(2):
        np.testing.assert_array_equal(array[:], VALUES)
    assert told == ["it has been cut to 10 bytes"]
