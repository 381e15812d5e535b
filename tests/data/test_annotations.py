"""Annotations on disk: what the writer accepts, what the reader gives back, and going on after an interruption."""

import fcntl
import json
import os

import numpy as np
import pytest

from pretrain.data import annotation_writer
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import NO_UNIT, Annotation, folder_of
from pretrain.errors import UserError
from tests.builders import random_samples, write_store

LENGTHS = [5, 1, 37, 2, 11, 300, 4]
MADE_BY = {"annotation": "test", "rules": 1}


def random_units(lengths, kind="spans", seed=0):
    """Units of samples: runs of tokens numbered in order, with gaps; or a class for most tokens."""
    rng = np.random.default_rng(seed)
    if kind == "classes":
        return [np.where(rng.random(n) < 0.8, rng.integers(0, 17, n), NO_UNIT) for n in lengths]
    units = []
    for length in lengths:
        number, its = -1, []
        while len(its) < length:
            run = int(rng.integers(1, 5))
            inside = rng.random() < 0.5
            number += inside
            its += [number if inside else NO_UNIT] * run
        units.append(np.array(its[:length]))
    return units


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", random_samples(LENGTHS))


def write(writer, units, first=0):
    for one in units[first:]:
        writer.append(one, np.array([len(one)]))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["spans", "classes"])
def test_what_is_written_is_read_back_with_its_counts(store, kind):
    units = random_units(LENGTHS, kind)
    writer = AnnotationWriter(folder_of(store, "test"), kind, MADE_BY, store.fingerprint)
    writer.append(np.concatenate(units[:3]), np.array(LENGTHS[:3]))
    writer.append(np.empty(0), np.empty(0))
    writer.append(np.concatenate(units[3:]), np.array(LENGTHS[3:]))
    writer.finish()
    with pytest.raises(UserError, match="has no annotation"):
        Annotation(store, "test", kind)
    writer.publish()
    read = Annotation(store, "test", kind)
    assert read.units[:].tolist() == np.concatenate(units).tolist()
    counts = [len(set(one.tolist()) - {NO_UNIT}) if kind == "spans" else int((one != NO_UNIT).sum()) for one in units]
    expected = {"kind": kind, "store": store.fingerprint, "made_by": MADE_BY, "samples": 7, "tokens": sum(LENGTHS)}
    expected |= {"units": sum(counts), "samples_without": counts.count(0), "format_version": 1}
    assert expected.items() <= read.meta.items() and read.meta["program"].startswith("medley ")
    assert sorted(content(read.folder)) == ["meta.json", "units.bin"]
    assert [path.name for path in read.folder.parent.iterdir()] == ["test"]


def test_a_store_without_samples_has_an_annotation_without_units(tmp_path):
    store = write_store(tmp_path / "empty", [])
    writer = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    writer.finish()
    writer.publish()
    assert len(Annotation(store, "test", "spans").units) == 0


@pytest.mark.parametrize(
    ("kind", "units", "lengths"),
    [
        ("spans", [0, 0, 1], [2]),
        ("spans", [0, 0], [2, 0]),
        ("spans", [1, 1], [2]),  # numbers begin at 0
        ("spans", [0, 2], [2]),  # and leave none out
        ("spans", [1, 0], [2]),  # and never fall
        ("spans", [0, -1], [2]),
        ("spans", [0, NO_UNIT + 1], [2]),
        ("spans", [0, 1], [1, 1]),  # each sample anew
        ("classes", [17], [1]),
        ("classes", [-1], [1]),
    ],
)
def test_units_that_mean_nothing_are_refused(store, kind, units, lengths):
    writer = AnnotationWriter(folder_of(store, "test"), kind, MADE_BY)
    with pytest.raises(ValueError, match=r"lengths|numbered|classes"):
        writer.append(np.array(units), np.array(lengths))
    assert writer.samples == 0
    writer.close()


def test_more_units_than_numbers_are_refused_and_as_many_are_taken(tmp_path):
    writer = AnnotationWriter(tmp_path / "test", "spans", MADE_BY)
    writer.append(np.arange(NO_UNIT), np.array([NO_UNIT]))
    assert writer.units == 65535
    with pytest.raises(ValueError, match=r"fewer|numbered"):
        writer.append(np.arange(NO_UNIT + 2), np.array([NO_UNIT + 2]))
    writer.close()


def whole(store, units):
    """The files of an annotation that nothing interrupted."""
    writer = AnnotationWriter(folder_of(store, "whole"), "spans", MADE_BY, store.fingerprint)
    write(writer, units)
    writer.finish()
    writer.publish()
    return content(folder_of(store, "whole"))


@pytest.mark.parametrize("saved", range(len(LENGTHS) + 1))
def test_an_interrupted_annotation_goes_on_where_it_was_saved_and_is_the_same_in_the_end(store, saved):
    units = random_units(LENGTHS)
    expected = whole(store, units)
    first = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    write(first, units[:saved])
    first.save()
    write(first, random_units(LENGTHS, seed=9), first=min(saved, 5))  # written, but not saved: as if killed
    first.close()
    again = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    assert (again.samples, again.tokens) == (saved, sum(LENGTHS[:saved]))
    write(again, units, first=saved)
    again.finish()
    again.publish()
    assert content(folder_of(store, "test")) == expected


@pytest.mark.parametrize("harm", ["byte", "cut", "state", "no state", "maker", "kind", "store", "nonsense"])
def test_what_does_not_verify_is_begun_anew(store, harm):
    units = random_units(LENGTHS)
    folder = folder_of(store, "test")
    first = AnnotationWriter(folder, "spans", MADE_BY, store.fingerprint)
    write(first, units[:3])
    first.save()
    first.close()
    file, state = first.partial / "units.bin", first.partial / "state.json"
    if harm == "byte":
        file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "state":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"tokens": 6}))
    elif harm == "no state":
        state.unlink()
    elif harm == "nonsense":
        state.write_text("[1]")
    kind, maker, print_ = "spans", MADE_BY, store.fingerprint
    kind = "classes" if harm == "kind" else kind
    maker = {**MADE_BY, "rules": 2} if harm == "maker" else maker
    print_ = "another" if harm == "store" else print_
    again = AnnotationWriter(folder, kind, maker, print_)
    assert again.samples == again.tokens == again.units == 0 and file.stat().st_size == 0
    again.close()


def test_it_is_saved_now_and_then_without_being_asked(store, monkeypatch):
    monkeypatch.setattr(annotation_writer, "SAVE_SECONDS", 0.0)
    units = random_units(LENGTHS)
    first = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    write(first, units[:4])
    os.close(first._lock)  # what the system does when a process is killed; nothing is flushed
    again = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    assert again.samples == 4


def test_an_annotation_is_replaced_only_when_the_new_one_is_whole(store):
    old, new = random_units(LENGTHS), random_units(LENGTHS, seed=5)
    folder = folder_of(store, "test")
    for units in (old, new):
        writer = AnnotationWriter(folder, "spans", MADE_BY, store.fingerprint)
        write(writer, units)
        if units is new:
            assert Annotation(store, "test", "spans").units[:].tolist() == np.concatenate(old).tolist()
        writer.finish()
        writer.publish()
    assert Annotation(store, "test", "spans").units[:].tolist() == np.concatenate(new).tolist()
    assert [path.name for path in folder.parent.iterdir()] == ["test"]


def test_a_second_run_that_writes_the_same_annotation_is_refused(store):
    writer = AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    with pytest.raises(UserError, match="another run is writing this annotation"):
        AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint)
    writer.close()
    AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint).close()


def test_a_file_system_without_locks_is_written_all_the_same(store, monkeypatch):
    def refuse(*_):
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    AnnotationWriter(folder_of(store, "test"), "spans", MADE_BY, store.fingerprint).close()
