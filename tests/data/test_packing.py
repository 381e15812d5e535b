import numpy as np
import pytest

from pretrain.data.packing import pack


def best_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best fit decreasing by a look at every row."""
    rows, room = [], []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[sample]]
        if not fitting:
            rows.append([])
            room.append(row_length)
            fitting = [len(rows) - 1]
        tightest = min(fitting, key=lambda row: room[row])
        rows[tightest].append(sample)
        room[tightest] -= lengths[sample]
    return rows


def fewest_rows(lengths: list[int], row_length: int) -> int:
    """The best there is, by trying every assignment (for a handful of samples)."""
    best = len(lengths)

    def place(sample: int, room: list[int]):
        nonlocal best
        if len(room) >= best:
            return
        if sample == len(lengths):
            best = len(room)
            return
        for row in range(len(room)):
            if room[row] >= lengths[sample]:
                place(sample + 1, [*room[:row], room[row] - lengths[sample], *room[row + 1 :]])
        place(sample + 1, [*room, row_length - lengths[sample]])

    place(0, [])
    return best


def realistic(samples: int, longest: int, seed: int) -> np.ndarray:
    """Lengths of prepared text: most documents fill whole samples, the rest is spread log-normally."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(4.5, 1.0, samples)).astype(np.int64)
    return np.clip(lengths, 5, longest)


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_lies_in_exactly_one_row_and_no_row_is_overfull(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 62, rng.integers(1, 700))
    rows = pack(lengths, 61)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= 61 for row in rows)


@pytest.mark.parametrize("seed", range(6))
def test_as_few_rows_as_best_fit_decreasing_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 157)

    def fills(rows):  # which of two rows with equal room takes a sample is free; how full the rows become is not
        return sorted(lengths[row].sum().item() for row in rows)

    assert fills(pack(lengths, 32)) == fills(best_fit(lengths.tolist(), 32))


@pytest.mark.parametrize("seed", range(8))
def test_within_the_proven_bound_of_the_fewest_rows(seed):
    lengths = np.random.default_rng(seed).integers(1, 11, 9)
    assert len(pack(lengths, 10)) <= 11 / 9 * fewest_rows(lengths.tolist(), 10) + 6 / 9


@pytest.mark.parametrize(("longest", "row_length"), [(128, 512), (512, 2048), (128, 128)])
def test_rows_are_full_to_97_percent_on_realistic_lengths(longest, row_length):
    lengths = realistic(4096, longest, seed=1)
    assert lengths.sum() / (len(pack(lengths, row_length)) * row_length) >= 0.97


def test_the_same_lengths_give_the_same_rows():
    lengths = realistic(501, 128, seed=2)
    assert pack(lengths, 256) == pack(lengths.copy(), 256)


def test_no_samples_no_rows_and_whole_rows_stay_alone():
    assert pack(np.empty(0, np.int64), 7) == []
    assert pack(np.array([7, 7, 7]), 7) == [[0], [1], [2]]
    assert pack(np.array([1]), 1) == [[0]]
