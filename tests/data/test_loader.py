import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.errors import UserError
from tests.builders import random_samples, write_store
from tests.data.test_batch import assert_equal

SAMPLES = random_samples(np.random.default_rng(4).integers(1, 25, 157), seed=4)
KEYS = {"seed": 3, "row_length": 31, "batch_rows": 12, "micro_batch_rows": 4, "pad_id": 0, "window": 50}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "store", SAMPLES)


def samples_of(batch: Batch) -> list[tuple]:
    """Return (global row, place in the row, id, visit, tokens) of each sample of a micro-batch."""
    found = []
    first = int(batch.sample_rows.min()) if len(batch.sample_rows) else 0
    for s, (sample, visit, row) in enumerate(zip(batch.sample_ids, batch.visits, batch.sample_rows, strict=True)):
        inside = batch.segment_ids[row - first] == s
        column = int(inside.nonzero()[0])
        tokens = tuple(batch.tokens[row - first][inside].tolist())
        found.append((int(row), column, int(sample), int(visit), tokens))
    return found


def global_batches(store, steps: int, world_size: int = 1, **changed) -> list[list[tuple]]:
    """Return each step's samples over all ranks, by global row."""
    loaders = [Loader(store, **{**KEYS, **changed}, rank=r, world_size=world_size) for r in range(world_size)]
    batches = []
    for _ in range(steps):
        parts = [loader.next() for loader in loaders]
        assert len({(p.samples, p.tokens, p.sample_ids_sha256, len(p.micro_batches)) for p in parts}) == 1
        batches.append(sorted(s for part in parts for batch in part.micro_batches for s in samples_of(batch)))
    return batches


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 12), (2, 3), (3, 4), (6, 1), (12, 1)])
def test_global_batches_do_not_depend_on_world_size_or_micro_batch(store, packing, world_size, micro_batch_rows):
    expected = global_batches(store, 7, packing=packing)
    assert expected == global_batches(store, 7, world_size, packing=packing, micro_batch_rows=micro_batch_rows)


def test_every_rank_gets_its_own_rows_in_order_of_micro_step(store):
    loader = Loader(store, **KEYS | {"micro_batch_rows": 2}, rank=1, world_size=3)
    rows = [sorted(set(batch.sample_rows.tolist())) for batch in loader.next().micro_batches]
    assert rows == [[2, 3], [8, 9]]


def test_a_micro_batchs_samples_lie_side_by_side_in_the_global_batch(store):
    whole = Loader(store, **KEYS | {"micro_batch_rows": 12}).next().micro_batches[0].sample_ids
    for rank in range(3):
        part = Loader(store, **KEYS | {"micro_batch_rows": 2}, rank=rank, world_size=3).next()
        for first, batch in zip(part.first_samples, part.micro_batches, strict=True):
            assert batch.sample_ids.equal(whole[first : first + len(batch.sample_ids)])


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_sees_every_sample_exactly_once(store, packing):
    seen = Counter()
    for batch in global_batches(store, 60, packing=packing):
        seen.update((visit, sample) for _, _, sample, visit, _ in batch)
    assert set(seen.values()) == {1}
    complete = max(visit for visit, _ in seen) - (50 // 157 + 1)
    assert complete >= 2
    for visit in range(complete + 1):
        assert sorted(s for v, s in seen if v == visit) == list(range(157))


def test_tokens_are_the_stores_and_every_step_is_described_rightly(store):
    loader = Loader(store, **KEYS)
    for _ in range(9):
        step = loader.next()
        samples = [s for batch in step.micro_batches for s in samples_of(batch)]
        for _, _, sample, _, tokens in samples:
            assert tokens == tuple(SAMPLES[sample].tolist())
        assert step.samples == len(samples)
        assert step.tokens == sum(len(tokens) for *_, tokens in samples)
        ids = np.sort([sample for _, _, sample, _, _ in samples]).astype("<i8")
        assert step.sample_ids_sha256 == hashlib.sha256(ids.tobytes()).hexdigest()
        for batch in step.micro_batches:
            assert batch.tokens.shape == (4, 31)
            assert (batch.tokens[~batch.real] == 0).all()


def test_without_packing_every_row_holds_one_sample_from_its_start(store):
    for batch in global_batches(store, 15, packing=False):
        assert [row for row, *_ in batch] == list(range(12))
        assert all(column == 0 for _, column, *_ in batch)


def test_with_packing_rows_are_shared_and_nearly_full(store):
    tokens = sum(len(t) for batch in global_batches(store, 30) for *_, t in batch)
    assert tokens / (30 * 12 * 31) > 0.9


def test_rows_are_shuffled_anew_in_every_window(tmp_path):
    """Packing begins with the longest sample; training must not."""
    store = write_store(tmp_path / "store", random_samples([31, *[7] * 80]))
    steps = global_batches(store, 40, window=81, batch_rows=21, micro_batch_rows=7)
    rows = [row for batch in steps for row, _, sample, _, _ in batch if sample == 0]
    assert len(rows) == 40
    assert len(set(rows)) > 10


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2, 5, 11, 17])
def test_going_on_from_a_saved_position_is_exact(store, packing, step):
    """Seventeen steps cross windows of 50 samples and epochs of 157 many times."""
    loader = Loader(store, **KEYS, packing=packing)
    for _ in range(step):
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    other = Loader(store, **KEYS, packing=packing)
    other.next()
    other.load_state_dict(state)
    assert other.state_dict() == state
    for _ in range(4):
        one, two = loader.next(), other.next()
        assert one.sample_ids_sha256 == two.sample_ids_sha256
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert_equal(a, b)


def test_a_position_is_valid_for_another_world_size_and_micro_batch(store):
    expected = global_batches(store, 6)[4:]
    loaders = [Loader(store, **KEYS | {"micro_batch_rows": 2}, rank=r, world_size=2) for r in range(2)]
    whole = Loader(store, **KEYS)
    for _ in range(4):
        whole.next()
    for loader in loaders:
        loader.load_state_dict(whole.state_dict())
    for batch in expected:
        parts = [b for loader in loaders for b in loader.next().micro_batches]
        assert sorted(s for b in parts for s in samples_of(b)) == batch


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"row_length": 32}, "data.row_length"),
        ({"packing": False}, "data.packing "),
        ({"window": 49}, "data.packing_window"),
        ({"seed": 4}, "seed"),
    ],
)
def test_a_position_of_another_layout_is_refused_by_its_key(store, changed, key):
    state = Loader(store, **KEYS).state_dict()
    with pytest.raises(UserError, match=f"^{key}") as caught:
        Loader(store, **{**KEYS, **changed}).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_a_position_in_another_store_is_refused(store, tmp_path):
    other = write_store(tmp_path / "other", [*SAMPLES[:-1], SAMPLES[-1] + 1])
    with pytest.raises(UserError, match=r"^data\.store"):
        Loader(other, **KEYS).load_state_dict(Loader(store, **KEYS).state_dict())


def test_seeds_and_epochs_give_other_orders(store):
    def ids(**changed):
        return [
            [sample for _, _, sample, _, _ in batch] for batch in global_batches(store, 12, packing=False, **changed)
        ]

    stream = list(itertools.chain(*ids(window=157)))[: 2 * 72]
    assert ids() != ids(seed=4)
    assert stream[:72] != stream[72:]


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="store is empty"):
        Loader(write_store(tmp_path / "empty", []), **KEYS)


def test_a_sample_longer_than_a_row_is_refused_with_the_length_to_use(store):
    longest = max(map(len, SAMPLES))
    with pytest.raises(UserError, match=f"data.row_length: {longest - 1} .* use {longest} or more"):
        Loader(store, **KEYS | {"row_length": longest - 1})
    Loader(store, **KEYS | {"row_length": longest}).next()


@pytest.mark.parametrize("window", [1, 50, 4096])
def test_a_store_shorter_than_a_batch_is_refused_whatever_the_window(store, window):
    keys = KEYS | {"window": window, "packing": False}
    Loader(store, **keys | {"batch_rows": 157}).check_fills_a_batch()
    with pytest.raises(UserError, match=r"157 rows.*training.batch_rows = 400"):
        Loader(store, **keys | {"batch_rows": 400, "window": 157}).check_fills_a_batch()
    with pytest.raises(UserError, match=r"training.batch_rows = 400"):
        Loader(store, **keys | {"batch_rows": 400}).check_fills_a_batch()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_tiny_store_comes_round_again_and_again(tmp_path, size):
    store = write_store(tmp_path / "tiny", SAMPLES[:size])
    seen = Counter()
    for batch in global_batches(store, 5, packing=False, batch_rows=4, micro_batch_rows=2):
        seen.update((visit, sample) for _, _, sample, visit, _ in batch)
    assert sum(seen.values()) == len(seen) == 20
    assert {(visit, sample) for visit in range(20 // size) for sample in range(size)} <= set(seen)
