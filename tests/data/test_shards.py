"""Shards: how many files the tokens lie in changes nothing but that."""

import hashlib
import json

import numpy as np
import pytest

from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import Annotation, folder_of
from pretrain.data.loader import Loader
from pretrain.data.prepare import prepare
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.errors import UserError
from tests.builders import random_samples
from tests.data.test_batch import assert_equal

LENGTHS = np.random.default_rng(5).integers(1, 25, 157)
SAMPLES = random_samples(LENGTHS, seed=5)
WHOLE = 2 * LENGTHS.sum() / 1e6  # megabytes


def write(folder, megabytes, samples=SAMPLES, at_once=11, vocabulary_size=1000):
    writer = StoreWriter(folder, vocabulary_size, megabytes)
    for start in range(0, len(samples), at_once):
        part = samples[start : start + at_once]
        writer.append(np.concatenate(part), np.array([len(sample) for sample in part]))
    writer.close()
    return Store(folder)


def layout(store):
    """Bytes of each shard."""
    return [shard["bytes"] for shard in store.meta["shards"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "store", WHOLE)


@pytest.mark.parametrize("at_once", [1, 11, 157])
@pytest.mark.parametrize("megabytes", [WHOLE, WHOLE - 2e-6, 1e-3, 97e-6, 48e-6, 2e-6, 1e-9])
def test_samples_ids_offsets_and_fingerprint_do_not_depend_on_the_shards(tmp_path, whole, megabytes, at_once):
    store = write(tmp_path / "store", megabytes, at_once=at_once)
    assert len(layout(store)) >= -(-WHOLE // megabytes) if megabytes > 1e-5 else len(layout(store)) == 157
    assert store.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(store.index[:], whole.index[:])
    np.testing.assert_array_equal(store.tokens[:], whole.tokens[:])
    for sample, expected in enumerate(SAMPLES):
        np.testing.assert_array_equal(store[sample], expected)
    for sampled in (2**22, 100):
        assert store.token_counts(1000, sampled, 7).tolist() == whole.token_counts(1000, sampled, 7).tolist()


def test_no_sample_crosses_a_shard_and_no_shard_is_above_its_size_or_could_take_the_next_sample(tmp_path):
    store = write(tmp_path / "store", 97e-6)  # 48 tokens
    ends = np.cumsum(layout(store)) // 2
    assert set(ends) <= set(np.cumsum(LENGTHS)) and ends[-1] == LENGTHS.sum()
    assert max(layout(store)) <= 97 and len(ends) > 30
    for size, end in zip(layout(store)[:-1], ends[:-1], strict=True):
        assert size + 2 * LENGTHS[np.searchsorted(np.cumsum(LENGTHS), end) + 1] > 97


def test_a_sample_longer_than_a_shard_has_one_to_itself(tmp_path):
    store = write(tmp_path / "store", 20e-6, random_samples([3, 4, 31, 2, 8, 11, 1]))
    assert layout(store) == [14, 62, 20, 22, 2]


def test_the_files_are_listed_with_their_sizes_and_hashes(tmp_path):
    store = write(tmp_path / "store", 1e-3, vocabulary_size=2**17)
    entries = [*store.meta["shards"], store.meta["index"]]
    assert [entry["file"] for entry in entries] == [
        *(f"tokens-{n:05d}.bin" for n in range(len(entries) - 1)),
        "index.npy",
    ]
    for entry in entries:
        content = (store.folder / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(["meta.json", *(e["file"] for e in entries)])


def test_a_store_without_samples_has_no_shard(tmp_path):
    store = write(tmp_path / "store", 1.0, [])
    assert layout(store) == [] and len(store) == len(store.tokens) == 0
    assert sorted(path.name for path in store.folder.iterdir()) == ["index.npy", "meta.json"]
    assert store.token_counts(7).tolist() == [0] * 7 and store.samples(slice(0, 5)) == []


def test_batches_and_their_annotations_are_the_same_from_one_shard_and_from_many(tmp_path, whole):
    loaders = []
    for store in (whole, write(tmp_path / "store", 97e-6)):
        writer = AnnotationWriter(folder_of(store, "some"), "classes", {}, store.fingerprint)
        writer.append(np.arange(LENGTHS.sum()) % 17, LENGTHS)
        writer.finish()
        writer.publish()
        keys = {"seed": 3, "row_length": 31, "batch_rows": 12, "micro_batch_rows": 4, "window": 50}
        loaders.append(Loader(store, annotations={"some": Annotation(store, "some", "classes")}, **keys))
    for _ in range(20):
        one, other = (loader.next() for loader in loaders)
        assert one.sample_ids_sha256 == other.sample_ids_sha256
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert_equal(a, b)
            assert (a.units["some"] != 65535).equal(a.real)
    assert loaders[0].state_dict() == loaders[1].state_dict()


def test_preparing_with_smaller_shards_changes_the_files_of_tokens_and_their_list_alone(tmp_path):
    (tmp_path / "in.txt").write_text(
        "\n\n".join(f"A gull flew {number} times over the harbour." for number in range(200))
    )
    options = {"vocabulary": 300, "workers": 1, "min_length": 2, "heldout": 0.1, "annotate": "pos"}
    prepare([tmp_path / "in.txt"], tmp_path / "one", **options)
    prepare([tmp_path / "in.txt"], tmp_path / "many", shard_megabytes=0.0002, **options)
    for split in ("train", "heldout"):
        one, many = Store(tmp_path / "one" / split), Store(tmp_path / "many" / split)
        assert len(layout(one)) == 1 < len(layout(many))
        assert {**one.meta, "shards": 0} == {**many.meta, "shards": 0}
        units = [Annotation(store, "pos", "classes").units[:] for store in (one, many)]
        np.testing.assert_array_equal(*units)


@pytest.mark.parametrize("megabytes", [0, -1, float("nan"), float("inf")])
def test_a_shard_of_no_size_is_refused(tmp_path, megabytes):
    (tmp_path / "in.txt").write_text("A gull.")
    with pytest.raises(UserError, match=r"^--shard-megabytes [^\n]*: must be above 0$"):
        prepare([tmp_path / "in.txt"], tmp_path / "out", shard_megabytes=megabytes)


@pytest.mark.parametrize("damage", ["missing", "cut", "not listed"])
def test_a_store_without_all_of_a_shard_is_refused(tmp_path, damage):
    folder = write(tmp_path / "store", 97e-6).folder
    shard, meta = folder / "tokens-00007.bin", json.loads((folder / "meta.json").read_text())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-2])
    else:
        del meta["shards"][7]
        (folder / "meta.json").write_text(json.dumps(meta))
    named = "shards do not add up" if damage == "not listed" else "tokens-00007.bin"
    with pytest.raises(UserError, match=rf"^[^\n]*{named}[^\n]*prepare the corpus again$"):
        Store(folder)


def test_a_store_of_the_first_format_opens_and_is_the_same_store(tmp_path, whole):
    folder = write(tmp_path / "store", WHOLE).folder
    (folder / "tokens-00000.bin").rename(folder / "tokens.bin")
    meta = json.loads((folder / "meta.json").read_text()) | {"format_version": 1}
    del meta["shards"], meta["index"]
    (folder / "meta.json").write_text(json.dumps(meta))
    old = Store(folder)
    assert old.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(old.tokens[:], whole.tokens[:])
    np.testing.assert_array_equal(old.index[:], whole.index[:])
