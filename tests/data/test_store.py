"""The token store: what is written is read, and what is damaged is refused."""

import json

import numpy as np
import pytest

from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.errors import UserError


def write(folder, samples, vocabulary_size=1000, batch=3):
    writer = StoreWriter(folder, vocabulary_size)
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        writer.append(np.concatenate(part), np.array([len(sample) for sample in part]))
    writer.close(origin="test")
    return Store(folder)


@pytest.fixture
def samples():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 1000, length) for length in (1, 7, 128, 3, 31, 2, 5)]


def test_samples_come_back_as_written_with_their_ids(tmp_path, samples):
    store = write(tmp_path / "store", samples)
    assert len(store) == len(samples) and store.max_length == 128 and store.meta["origin"] == "test"
    for sample_id, sample in enumerate(samples):
        np.testing.assert_array_equal(store[sample_id], sample)


def test_an_empty_store_opens_and_has_no_sample(tmp_path):
    store = write(tmp_path / "store", [])
    assert len(store) == 0 and store.max_length == 0 and store.lengths[:].shape == (0,)


def test_tokens_take_two_bytes_up_to_65536_entries_and_four_beyond(tmp_path):
    small = write(tmp_path / "small", [np.array([0, 65535])], vocabulary_size=65536)
    large = write(tmp_path / "large", [np.array([0, 65536])], vocabulary_size=65537)
    assert small[0].tolist() == [0, 65535] and small.dtype.itemsize == 2
    assert large[0].tolist() == [0, 65536] and large.dtype.itemsize == 4


def test_fingerprint_is_of_the_content_and_not_of_how_it_was_appended(tmp_path, samples):
    whole, by_one = write(tmp_path / "a", samples), write(tmp_path / "b", samples, batch=1)
    swapped = write(tmp_path / "c", samples[::-1])
    regrouped = write(tmp_path / "d", [np.concatenate(samples)])
    assert whole.fingerprint == by_one.fingerprint
    assert len({whole.fingerprint, swapped.fingerprint, regrouped.fingerprint}) == 3


@pytest.mark.parametrize(("tokens", "lengths"), [([1, 2, 3], [2]), ([1, 2], [2, 0]), ([1000], [1]), ([-1], [1])])
def test_writer_refuses_wrong_lengths_and_tokens_outside_the_vocabulary(tmp_path, tokens, lengths):
    with pytest.raises(ValueError):
        StoreWriter(tmp_path / "store", 1000).append(np.array(tokens), np.array(lengths))


def test_a_folder_is_no_store_before_it_is_closed(tmp_path, samples):
    StoreWriter(tmp_path / "store", 1000).append(samples[0], np.array([1]))
    with pytest.raises(UserError, match="not a token store"):
        Store(tmp_path / "store")


@pytest.mark.parametrize(
    "damage", ["tokens-00000.bin cut", "index.npy cut", "index.npy of another", "version", "no json"]
)
def test_a_damaged_store_is_refused_in_one_line(tmp_path, samples, damage):
    folder = write(tmp_path / "store", samples).folder
    other = write(tmp_path / "other", samples[:2]).folder
    meta = json.loads((folder / "meta.json").read_text())
    if damage.endswith("cut"):
        path = folder / damage.split()[0]
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "index.npy of another":
        (folder / "index.npy").write_bytes((other / "index.npy").read_bytes())
    elif damage == "version":
        (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    else:
        (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"^[^\n]*prepare[^\n]*$|^[^\n]*meta\.json says[^\n]*$"):
        Store(folder)


def test_a_prepared_corpus_in_place_of_its_store_is_explained(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds a 'train' store"):
        Store(tmp_path)
