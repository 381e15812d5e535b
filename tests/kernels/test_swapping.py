import os
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from fused_objectives import swapping
from fused_objectives.swapping import swap_tokens
from fused_objectives.targets import IGNORED
from tests.kernels import corruption
from tests.kernels.corruption import (
    IS_ORDINARY,
    KEY,
    ORDINARY,
    SPECIAL,
    Rows,
    below,
    by_sample,
    draws,
    lay_out,
    many,
    odd_rows,
    padded_rows,
    poisoned_memory,  # noqa: F401  (a fixture)
    random_sample,
    reordered_rows,
    same,
)

SWAP_TRITON = swapping.swap_triton


def swap(rows: Rows, impl: str = "torch", **options) -> swapping.Swapped:
    options = KEY | {"is_ordinary": IS_ORDINARY.to(rows.tokens.device)} | options
    return swap_tokens(*rows, **options, impl=impl)


def eligible_of(rows: Rows) -> torch.Tensor:
    return rows.tokens % 3 != 0


def oracle(rows: Rows, rate: float, eligible: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a loop over samples and tokens, on Python's integers."""
    tokens, labels = rows.tokens.clone(), torch.where(rows.segments < 0, IGNORED, 0)
    for segment in range(len(rows.sample_ids)):
        sample = int(rows.sample_ids[segment]), int(rows.visits[segment])
        chosen = []
        for place in (rows.segments == segment).nonzero().tolist():
            place = tuple(place)
            token, position = int(rows.tokens[place]), int(rows.positions[place])
            choose, order, _, _ = draws(position, *sample)
            if token not in SPECIAL and below(choose, rate) and (eligible is None or eligible[place]):
                chosen.append((order, position, place, token))
        chosen.sort()
        for one, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
            tokens[one[2]], labels[one[2]] = other[3], int(one[3] != other[3])
    return tokens, labels


@pytest.mark.parametrize(
    ("rate", "with_eligible"), [(0.0, False), (0.05, False), (0.3, True), (0.8, False), (1.0, False), (1.0, True)]
)
def test_kernel_and_twin_equal_a_loop_over_samples_bit_for_bit(place, rate, with_eligible, monkeypatch):
    rows = odd_rows()
    extra = {"eligible": eligible_of(rows)} if with_eligible else {}
    expected = oracle(rows, rate, **extra)
    same(swap(rows, rate=rate, **extra), expected)
    there, extra = rows.to(place.device), {name: tensor.to(place.device) for name, tensor in extra.items()}
    same(swap(there, rate=rate, **extra), expected)
    for block, tile in ((32, 64), (256, 16)):
        monkeypatch.setattr(swapping, "swap_triton", partial(SWAP_TRITON, block=block, tile=tile))
        same(swap(there, "triton", rate=rate, **extra), expected)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_swaps_depend_neither_on_packing_nor_on_order_nor_on_rank(place, rate):
    samples = corruption.SAMPLES
    layouts = [odd_rows(), padded_rows(), reordered_rows(), lay_out([samples[2:5], [samples[8]]], 150)]
    for impl in ("torch", "triton"):
        first, *others = (
            by_sample(rows, *swap(rows, impl, rate=rate)) for rows in (r.to(place.device) for r in layouts)
        )
        assert len(first) == len(samples) and len(others[-1]) == 4
        for other in others:
            assert other == {sample: first[sample] for sample in other}


def test_samples_longer_than_many_blocks_are_swapped_as_a_loop_does(place):
    rows = lay_out([[random_sample(700, 31), random_sample(5, 32)], [random_sample(699, 33)]], 710)
    expected = oracle(rows, 0.5)
    same(swap(rows, rate=0.5), expected)
    same(swap(rows.to(place.device), "triton", rate=0.5), expected)


def test_places_that_draw_the_same_order_are_told_apart_by_the_text(place, monkeypatch):
    """Which with 32 bits hardly happens: so let all draw the same."""
    rows = odd_rows().to(place.device)

    def constant(seed, stream, counters, *_):
        return (torch.zeros_like(counters),) * 4

    monkeypatch.setattr(swapping, "words", constant)
    tokens, labels = swap(rows, rate=1.0)
    for segment in range(len(rows.sample_ids)):
        mine = (rows.segments == segment) & IS_ORDINARY.to(place.device)[rows.tokens]
        assert torch.equal(tokens[mine], rows.tokens[mine].roll(-1))
        assert torch.equal(labels[mine], (tokens[mine] != rows.tokens[mine]).long())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_flat_and_strided_inputs_are_alike(place, impl):
    rows = odd_rows().to(place.device)
    expected = swap(rows, rate=0.5, eligible=eligible_of(rows))
    flat = Rows(*(tensor.flatten() for tensor in rows))
    result = swap(flat, impl, rate=0.5, eligible=eligible_of(flat))
    same((tensor.view_as(rows.tokens) for tensor in result), expected)
    strided = Rows(*(torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in rows))
    transposed = Rows(*(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in rows))
    for others in (strided, transposed):
        same(swap(others, impl, rate=0.5, eligible=eligible_of(rows).t().contiguous().t()), expected)
    same(rows, odd_rows().to(place.device))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tokens_and_no_samples_are_left_as_they_are(place, impl):
    for shape in ((0,), (0, 7), (3, 0)):
        nothing = torch.empty(shape, dtype=torch.int64, device=place.device)
        none = nothing.flatten()
        result = swap(Rows(nothing, nothing, nothing, none, none), impl, rate=1.0)
        assert result.tokens.shape == result.labels.shape == shape
    rows = lay_out([[], []], 5, pad=ORDINARY[0]).to(place.device)
    result = swap(rows, impl, rate=1.0)
    assert torch.equal(result.tokens, rows.tokens) and (result.labels == IGNORED).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_op_passes_opcheck_and_compiles_whole(place, impl):
    rows = lay_out([[random_sample(9, 0), random_sample(4, 1)]], 16).to(place.device)
    for eligible in (None, eligible_of(rows)):
        arguments = (*rows, 2**31, 5, "s", IS_ORDINARY.to(place.device), eligible, impl)
        torch.library.opcheck(torch.ops.fused_objectives.swap_tokens, arguments)
    compiled = torch.compile(lambda rows: swap(rows, impl, rate=0.7), fullgraph=True, backend="aot_eager")
    same(compiled(rows), swap(rows, rate=0.7))


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        swap(odd_rows(), rate=rate)


def test_tokens_stay_in_their_sample_and_chosen_ones_never_keep_their_place_unless_alone():
    rows = many(300, 60)
    distinct = rows._replace(tokens=torch.where(IS_ORDINARY[rows.tokens], 1000 + rows.positions, rows.tokens))
    is_ordinary = torch.ones(2000, dtype=torch.bool)
    is_ordinary[list(SPECIAL)] = False
    for rate in (0.02, 0.15, 1.0):
        tokens, labels = swap(distinct, rate=rate, is_ordinary=is_ordinary)
        assert torch.equal(tokens.sort(1).values, distinct.tokens.sort(1).values)
        moved = tokens != distinct.tokens
        assert torch.equal(labels == 1, moved) and torch.equal(labels == IGNORED, rows.segments < 0)
        chosen = np.array([[below(draws(p, 2**33 + s, 1)[0], rate) for p in range(1, 51)] for s in range(10)])
        expected = torch.from_numpy(chosen & (chosen.sum(1, keepdims=True) > 1))
        assert torch.equal(moved[:10, 1:51], expected)
        assert not moved[:, 0].any() and not moved[:, 51:].any()


def test_exchanged_equal_tokens_are_labelled_as_unchanged():
    rows = many(2000, 60)
    tokens, labels = swap(
        rows._replace(tokens=torch.where(rows.tokens > 50, 50 + rows.tokens % 2, rows.tokens)), rate=1.0
    )
    original = torch.where(rows.tokens > 50, 50 + rows.tokens % 2, rows.tokens)
    assert torch.equal(labels == 1, tokens != original)
    ordinary = IS_ORDINARY[original] & (rows.segments >= 0)
    assert (labels[ordinary] == 0).float().mean() > 0.1


def test_the_share_of_chosen_places_is_the_rate():
    """Of places told apart by their tokens; a sample with one chosen place is rare at this length."""
    rows = many(9300, 120)
    is_ordinary = torch.ones(2000, dtype=torch.bool)
    is_ordinary[list(SPECIAL)] = False
    distinct = rows._replace(tokens=torch.where(IS_ORDINARY[rows.tokens], 1000 + rows.positions, rows.tokens))
    _, labels = swap(distinct, rate=0.15, is_ordinary=is_ordinary)
    n = int((IS_ORDINARY[rows.tokens] & (rows.segments >= 0)).sum())
    assert n > 10**6
    low, high = stats.binom.interval(0.9999, n, 0.15)
    assert low <= int((labels == 1).sum()) <= high


def test_all_cyclic_permutations_of_four_places_are_equally_frequent():
    rows = many(12_000, 14)  # [CLS], four tokens, [SEP]
    tokens = rows.tokens.clone()
    tokens[:, 1:5] = torch.tensor(ORDINARY[:4])
    swapped, labels = swap(rows._replace(tokens=tokens), rate=1.0)
    assert (labels[:, 1:5] == 1).all()
    seen = Counter(tuple(ORDINARY.index(token) for token in row) for row in swapped[:, 1:5].tolist())
    assert set(seen) == {
        p for p in permutations(range(4)) if p[0] and p[p[0]] and p[p[p[0]]]
    }  # back to 0 after 4 steps
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_a_barrier_stands_between_writing_the_keys_and_reading_them(tmp_path):
    """In the code compiled for a GPU, which the interpreter does not run: it knows no threads, so no races."""
    pytest.importorskip("triton")
    script = tmp_path / "compile.py"
    script.write_text(
        "import triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from fused_objectives.swapping import CONFIGURATIONS\n"
        "kernel, signature, constants, warps = CONFIGURATIONS[0]\n"
        "types = {name: signature.get(name, 'constexpr') for name in kernel.arg_names}\n"
        "source = ASTSource(kernel, types, dict(constants))\n"
        "code = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': warps})\n"
        "print(code.asm['ttgir'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    operations = [line.split(" loc(")[0] for line in result.stdout.splitlines()]
    barriers = [i for i, line in enumerate(operations) if "barrier" in line]
    assert len(barriers) == 1
    memory = [i for i, line in enumerate(operations) if "tt.store" in line or "tt.load" in line]
    before = [operations[i] for i in memory if i < barriers[0]]
    behind = [operations[i] for i in memory if i > barriers[0]]
    assert (
        sum("tt.store" in line for line in before) == 5
    )  # padding's two, the keys, the tokens that stay, their labels
    assert "tt.load" in behind[0] and sum("tt.store" in line for line in behind) == 2
