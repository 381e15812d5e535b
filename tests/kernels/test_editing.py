from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from fused_objectives import editing
from fused_objectives.editing import Edited, delete_tokens, insert_tokens
from fused_objectives.targets import IGNORED
from tests.kernels import corruption
from tests.kernels.corruption import (
    IS_ORDINARY,
    KEY,
    MASK,
    ORDINARY,
    ORDINARY_IDS,
    PAD,
    SPECIAL,
    VOCABULARY,
    Rows,
    below,
    by_sample,
    draws,
    lay_out,
    many,
    odd_rows,
    padded_rows,
    pick,
    poisoned_memory,  # noqa: F401  (a fixture)
    random_sample,
    reordered_rows,
    same,
)

EDIT_TRITON = editing.edit_triton
EDITS = ["insert", "insert masks", "delete"]


def edit(what: str, rows: Rows, impl: str = "torch", **options) -> Edited:
    device = rows.tokens.device
    options = KEY | {"pad_id": PAD} | options
    if what == "delete":
        return delete_tokens(*rows, **{"is_ordinary": IS_ORDINARY.to(device)} | options, impl=impl)
    options = {"ordinary_ids": ORDINARY_IDS.to(device), "capacity": 2 * rows.tokens.shape[1]} | options
    return insert_tokens(*rows, insert_id=MASK if what == "insert masks" else None, **options, impl=impl)


def oracle(what: str, rows: Rows, rate: float, capacity: int, pad_id: int = PAD) -> tuple:
    """The same by a loop that writes the edited samples out, row after row."""
    shape = len(rows.tokens), capacity
    result = [torch.full(shape, padding) for padding in (pad_id, -1, 0, IGNORED, -1)]
    lengths, dropped = (torch.zeros(len(rows.sample_ids), dtype=torch.int64) for _ in range(2))
    for row in range(len(rows.tokens)):
        written, position, current, gap = [], 0, None, False
        for column in range(rows.tokens.shape[1]):
            token, segment, old = (int(tensor[row, column]) for tensor in rows[:3])
            if segment < 0:
                continue
            if segment != current:
                current, position, gap = segment, 0, False
            choose, _, which, _ = draws(old, int(rows.sample_ids[segment]), int(rows.visits[segment]))
            source = row * rows.tokens.shape[1] + column
            if what == "delete":
                if token not in SPECIAL and below(choose, rate):
                    gap = True
                    continue
                written.append((token, segment, position, int(gap), source))
                gap = False
            else:
                if old > 0 and below(choose, rate):
                    new = MASK if what == "insert masks" else pick(which)
                    written.append((new, segment, position, 1, -1))
                    position += 1
                written.append((token, segment, position, 0, source))
            position += 1
        for column, values in enumerate(written):
            (lengths if column < capacity else dropped)[values[1]] += 1
            if column < capacity:
                for tensor, value in zip(result, values, strict=True):
                    tensor[row, column] = value
    return *result, lengths, dropped


@pytest.mark.parametrize(
    ("rate", "layouts"),
    [(0.0, [(117, 64)]), (0.15, [(117, 32), (300, 512)]), (0.6, [(40, 128), (0, 512), (1, 256)]), (1.0, [(300, 64)])],
)
@pytest.mark.parametrize("what", EDITS)
def test_kernel_and_twin_equal_a_loop_over_tokens_bit_for_bit(place, what, rate, layouts, monkeypatch):
    rows = odd_rows()
    there = rows.to(place.device)
    for capacity, block in layouts:
        expected = oracle(what, rows, rate, capacity, pad_id=7)
        same(edit(what, there, rate=rate, capacity=capacity, pad_id=7), expected)
        monkeypatch.setattr(editing, "edit_triton", partial(EDIT_TRITON, block=block))
        same(edit(what, there, "triton", rate=rate, capacity=capacity, pad_id=7), expected)


@pytest.mark.parametrize("what", EDITS)
def test_edits_depend_neither_on_packing_nor_on_order_nor_on_rank(place, what):
    samples = corruption.SAMPLES
    layouts = [odd_rows(), padded_rows(), reordered_rows(), lay_out([samples[2:5], [samples[8]]], 150)]
    for impl in ("torch", "triton"):
        edited = (edit(what, rows.to(place.device), impl, rate=0.4, capacity=600) for rows in layouts)
        first, *others = (
            by_sample(
                Rows(new.tokens, new.segments, new.positions, rows.sample_ids, rows.visits),
                new.tokens,
                new.positions,
                new.labels,
            )
            for rows, new in zip(layouts, edited, strict=True)
        )
        assert len(first) == len(samples) and len(others[-1]) == 4
        for other in others:
            assert other == {sample: first[sample] for sample in other}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("what", EDITS)
def test_samples_stay_whole_and_their_labels_with_their_tokens(place, what, impl):
    """What holds however rows are cut: stated without the loop that the other tests compare with."""
    rows = odd_rows().to(place.device)
    for capacity in (70, 400):
        new = edit(what, rows, impl, rate=0.5, capacity=capacity)
        original = new.sources >= 0
        assert torch.equal(rows.tokens.flatten()[new.sources[original]], new.tokens[original])
        assert torch.equal(rows.segments.flatten()[new.sources[original]], new.segments[original])
        real = new.segments >= 0
        assert torch.equal(new.labels == IGNORED, ~real)
        assert (new.tokens[~real] == PAD).all() and (new.positions[~real] == 0).all()
        assert (real.long().diff(dim=1) <= 0).all()  # packed to the left
        if what == "delete":
            assert original[real].all()
        else:
            assert torch.equal(new.labels[real] == 1, ~original[real])
        for segment in range(len(rows.sample_ids)):
            mine = new.segments == segment
            assert new.lengths[segment] == mine.sum()
            assert new.positions[mine].tolist() == list(range(int(mine.sum())))
            before = int((rows.segments == segment).sum())
            if what == "delete":
                assert new.lengths[segment] + new.dropped[segment] <= before
            else:
                assert before <= new.lengths[segment] + new.dropped[segment] <= max(2 * before - 1, 0)
            sources = new.sources[mine & original]
            assert (sources.diff() > 0).all()
            if what == "delete" and len(sources):
                gaps = rows.positions.flatten()[sources].diff() > 1
                assert torch.equal(new.labels[mine][1:] == 1, gaps)
        assert new.cu_seqlens.dtype == torch.int32
        assert new.cu_seqlens.tolist() == [0, *np.cumsum(new.lengths.tolist())]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rates_at_the_ends_are_exact(place, impl):
    rows = padded_rows().to(place.device)
    length = rows.tokens.shape[1]
    for what in EDITS:
        unedited = edit(what, rows, impl, rate=0.0, capacity=length)
        same(unedited[:3], rows[:3])
        assert (unedited.labels[rows.segments >= 0] == 0).all() and not unedited.dropped.any()
    lengths = torch.tensor([len(sample.tokens) for sample in corruption.SAMPLES], device=place.device)
    every = edit("insert masks", rows, impl, rate=1.0, capacity=2 * length)
    assert torch.equal(every.lengths, 2 * lengths - 1)
    inside = every.segments >= 0
    assert torch.equal(every.labels[inside], every.positions[inside] % 2)
    nothing = edit("delete", rows, impl, rate=1.0, capacity=length)
    special = (~IS_ORDINARY.to(place.device)[rows.tokens] & (rows.segments >= 0)).sum(1)
    assert torch.equal(nothing.lengths, special)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_sample_without_special_tokens_may_lose_all_and_its_first_token(place, impl):
    sample = random_sample(30, 77, special=False)
    rows = lay_out([[sample, random_sample(4, 78), random_sample(9, 79, special=False)]], 50).to(place.device)
    new = edit("delete", rows, impl, rate=1.0)
    assert new.lengths[0] == 0 and new.dropped.tolist() == [0, 0, 0] and new.lengths[2] == 0
    same(new, oracle("delete", rows.to("cpu"), 1.0, 50))
    assert new.cu_seqlens.tolist() == [0, 0, int(new.lengths[1]), int(new.lengths[1])]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_does_not_fit_is_dropped_from_the_rows_end_and_counted(place, impl):
    rows = lay_out([corruption.SAMPLES[:3], corruption.SAMPLES[3:5]], 80).to(place.device)
    whole = edit("insert", rows, impl, rate=0.5, capacity=200)
    assert not whole.dropped.any()
    for capacity in (1, 30, 50, 99, 200):
        cut = edit("insert", rows, impl, rate=0.5, capacity=capacity)
        same(cut[:5], (tensor[:, :capacity] for tensor in whole[:5]))
        assert torch.equal(cut.lengths + cut.dropped, whole.lengths)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("what", EDITS)
def test_no_tokens_and_no_samples_become_padding(place, what, impl):
    for rows, length, capacity in ((0, 7, 5), (3, 0, 5), (3, 7, 5), (3, 7, 0), (3, 0, 0)):
        nothing = torch.full((rows, length), -1, device=place.device)
        for samples in (0, 2):
            ids = torch.ones(samples, dtype=torch.int64, device=place.device)
            new = edit(what, Rows(nothing + 1, nothing, nothing, ids, ids), impl, rate=1.0, capacity=capacity, pad_id=9)
            for tensor, padding in zip(new[:5], (9, -1, 0, IGNORED, -1), strict=True):
                assert tensor.shape == (rows, capacity) and (tensor == padding).all()
            assert new.lengths.tolist() == new.dropped.tolist() == [0] * samples
            assert new.cu_seqlens.tolist() == [0] * (samples + 1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("what", EDITS)
def test_strided_inputs_are_alike_and_inputs_are_not_changed(place, what, impl):
    rows = odd_rows().to(place.device)
    expected = edit(what, rows, rate=0.5)
    strided = Rows(*(torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in rows))
    transposed = Rows(*(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in rows))
    for others in (strided, transposed):
        same(edit(what, others, impl, rate=0.5), expected)
    same(rows, odd_rows())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_ops_pass_opcheck_and_compile_whole(place, impl):
    rows = lay_out([[random_sample(9, 0), random_sample(4, 1)]], 16).to(place.device)
    tables = IS_ORDINARY.to(place.device), ORDINARY_IDS.to(place.device)
    for chosen in ((None, tables[1], None), (None, tables[1], MASK), (tables[0], None, None)):
        arguments = (*rows, 2**31, 5, "s", *chosen, PAD, 20, impl)
        torch.library.opcheck(torch.ops.fused_objectives.edit_tokens, arguments)
    both = ("insert", "delete")
    compiled = torch.compile(
        lambda rows: [edit(what, rows, impl, rate=0.5) for what in both], fullgraph=True, backend="aot_eager"
    )
    for what, new in zip(both, compiled(rows), strict=True):
        same(new, edit(what, rows, rate=0.5))


def test_what_cannot_be_is_refused():
    for rate in (-0.1, 1.1):
        for what in EDITS:
            with pytest.raises(ValueError, match="between 0 and 1"):
                edit(what, odd_rows(), rate=rate)
    with pytest.raises(ValueError, match="no token to insert"):
        edit("insert", odd_rows(), rate=0.1, ordinary_ids=ORDINARY_IDS[:0])
    edit("insert masks", odd_rows(), rate=0.1, ordinary_ids=ORDINARY_IDS[:0])


def test_without_a_capacity_deletion_keeps_the_rows_length():
    rows = odd_rows()
    assert edit("delete", rows, rate=0.3).tokens.shape == rows.tokens.shape


# Statistics


def within(count: int, n: int, p: float) -> bool:
    """Whether a count lies inside the central 99.99 % of its binomial distribution."""
    low, high = stats.binom.interval(0.9999, n, p)
    return low <= count <= high


@pytest.fixture(scope="module")
def million() -> Rows:
    return many(9300, 120)


def test_insertions_come_at_the_rate_and_are_uniform_over_the_ordinary_tokens(million):
    new = edit("insert", million, rate=0.15, capacity=160)
    gaps = int(((million.segments >= 0) & (million.positions > 0)).sum())
    assert gaps > 10**6 and not new.dropped.any()
    assert within(int((new.labels == 1).sum()), gaps, 0.15)
    counts = np.bincount(new.tokens[new.labels == 1].numpy(), minlength=VOCABULARY)
    assert counts[list(SPECIAL)].sum() == 0
    assert stats.chisquare(counts[ORDINARY]).pvalue > 1e-4


def test_deletions_come_at_the_rate_and_spare_special_tokens(million):
    new = edit("delete", million, rate=0.15)
    which = (million.segments >= 0) & IS_ORDINARY[million.tokens]
    n, deleted = int(which.sum()), int((million.segments >= 0).sum() - new.lengths.sum())
    assert n > 10**6 and within(deleted, n, 0.15)
    # A token is labelled if it is kept and the one before is not: 110 ordinary tokens and [SEP] have one before that
    # may be deleted, 109 of them with probability (1 − p)·p, [SEP] with p.
    labelled = int((new.labels == 1).sum())
    expected = len(million.tokens) * (109 * 0.85 * 0.15 + 0.15)
    # Neighbouring labels exclude each other, so their variance is below that of independent ones.
    assert abs(labelled - expected) < stats.norm.isf(0.5e-4) * np.sqrt(expected)
    kept = new.sources[new.sources >= 0]
    special = (~which & (million.segments >= 0)).flatten().nonzero().squeeze(1)
    assert torch.isin(special, kept).all()
