from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch, collate
from tests.builders import lay_out, padded, random_samples, write_store

LENGTHS = [3, 1, 9, 2, 7, 12, 5]


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "units":
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        else:
            assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b), field.name


@pytest.mark.parametrize("rows", [[[2, 0], [5], [1, 3, 6, 1]], [[4]], [[0], [1], [2]]], ids=str)
def test_collate_equals_laying_out_place_by_place(tmp_path, rows):
    samples = random_samples(LENGTHS)
    store = write_store(tmp_path / "store", samples)
    visits = [[10 * row + i for i in range(len(ids))] for row, ids in enumerate(rows)]
    batch = collate(store, [np.array(ids) for ids in rows], [np.array(v) for v in visits], 40, 23, pad_id=99)
    expected = lay_out(
        [[samples[i] for i in ids] for ids in rows],
        row_length=23,
        ids=[i for ids in rows for i in ids],
        visits=[visit for row in visits for visit in row],
        first_row=40,
        pad=99,
    )
    assert_equal(batch, expected)


def test_collate_of_no_rows_is_an_empty_batch(tmp_path):
    store = write_store(tmp_path / "store", random_samples(LENGTHS))
    batch = collate(store, [], [], 0, 23, pad_id=0)
    assert_equal(batch, lay_out([], row_length=23))
    assert batch.sum_per_sample(batch.tokens).shape == (0,)


def test_sums_per_sample_leave_padding_out():
    samples = random_samples(LENGTHS)
    batch = lay_out([samples[:3], samples[3:5], [], samples[5:]], row_length=31)
    values = torch.rand(4, 31, dtype=torch.float64)
    expected = [values[batch.segment_ids == s].sum() for s in range(len(samples))]
    assert torch.allclose(batch.sum_per_sample(values), torch.stack(expected))
    assert torch.equal(batch.sum_per_sample(batch.real.long()), batch.lengths)


def test_to_moves_every_field():
    batch = padded(random_samples(LENGTHS))
    batch = replace(batch, units={"words": batch.tokens})
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, field.name).is_meta for field in fields(Batch) if field.name != "units")
    assert moved.units["words"].is_meta


def test_units_of_annotations_lie_at_their_tokens_and_padding_has_none(tmp_path):
    samples = random_samples(LENGTHS)
    store = write_store(tmp_path / "store", samples)
    units = np.arange(sum(LENGTHS), dtype=np.uint16)
    rows, visits = [np.array([2, 0]), np.array([5])], [np.zeros(2, np.int64), np.zeros(1, np.int64)]

    def look_up(ids, offsets, lengths):
        return np.concatenate([units[start : start + length] for start, length in zip(offsets, lengths, strict=True)])

    batch = collate(store, rows, visits, 0, 14, 99, {"some": SimpleNamespace(look_up=look_up)})
    starts = np.cumsum(LENGTHS) - LENGTHS
    for number, sample in enumerate((2, 0, 5)):
        found = batch.units["some"][batch.segment_ids == number]
        assert found.tolist() == list(range(starts[sample], starts[sample] + LENGTHS[sample]))
    assert (batch.units["some"][~batch.real] == 65535).all()
