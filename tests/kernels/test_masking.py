import warnings
from functools import partial
from itertools import accumulate

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DataCollatorForLanguageModeling

from fused_objectives import masking
from fused_objectives.masking import mask_tokens, start_rate
from fused_objectives.targets import IGNORED
from tests.builders import word_tokenizer
from tests.kernels import corruption
from tests.kernels.corruption import (
    IS_ORDINARY,
    KEY,
    MASK,
    ORDINARY,
    ORDINARY_IDS,
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

GEOMETRIC = tuple(np.array([0.8**k for k in range(10)]) / sum(0.8**k for k in range(10)))
"""SpanBERT's lengths (arXiv 1907.10529)."""
NORMAL = {"rate": 0.15, "mask_share": 0.8, "random_share": 0.1}
# Options, then which of eligible and units are given.
CASES = {
    "usual": (NORMAL, ""),
    "rate above a half": ({"rate": 0.7, "mask_share": 0.3, "random_share": 0.6}, ""),
    "all": ({"rate": 1.0, "mask_share": 0.0, "random_share": 1.0}, ""),
    "all masked": ({"rate": 1.0, "mask_share": 1.0, "random_share": 0.0}, ""),
    "none": ({"rate": 0.0, "mask_share": 0.8, "random_share": 0.1}, ""),
    "eligible": ({**NORMAL, "rate": 0.6}, "eligible"),
    "words": ({**NORMAL, "rate": 0.4}, "units"),
    "spans": ({**NORMAL, "span_lengths": (0.25, 0.0, 0.5, 0.25)}, ""),
    "spans of words": ({**NORMAL, "rate": 0.5, "span_lengths": (0.5, 0.5)}, "units eligible"),
    "spans everywhere": ({**NORMAL, "rate": 1.0, "span_lengths": GEOMETRIC}, ""),
    "spans nowhere": ({**NORMAL, "rate": 0.0, "span_lengths": GEOMETRIC}, "units"),
}


def mask(rows: Rows, impl: str = "torch", **options) -> masking.Masked:
    tables = {"is_ordinary": IS_ORDINARY.to(rows.tokens.device), "ordinary_ids": ORDINARY_IDS.to(rows.tokens.device)}
    return mask_tokens(*rows, **KEY | tables | {"mask_id": MASK} | NORMAL | options, impl=impl)


def words_of(rows: Rows) -> torch.Tensor:
    """Words of 1, 2, 3, 1, 2, 3, … tokens, some of whose tokens are special; every eleventh token is in none."""
    ends = torch.tensor([0, 1, 1, 2, 2, 2], device=rows.positions.device)
    units = 3 * (rows.positions // 6) + ends[rows.positions % 6]
    return torch.where((rows.segments < 0) | (rows.positions % 11 == 10), -1, units)


def eligible_of(rows: Rows) -> torch.Tensor:
    return rows.tokens % 3 != 0


def extras(rows: Rows, names: str) -> dict[str, torch.Tensor]:
    made = {"eligible": eligible_of, "units": words_of}
    return {name: made[name](rows) for name in names.split()}


def oracle(rows: Rows, *, rate, mask_share, random_share, span_lengths=(1.0,), eligible=None, units=None):
    """The same by a loop over tokens, and for each over the spans that might cover it."""
    thresholds = [0, *(int(shorter * 2**32) for shorter in accumulate(span_lengths[:-1]))]
    chance = rate
    if len(span_lengths) > 1:
        coverage = np.polynomial.Polynomial([1.0])
        for shorter in accumulate(span_lengths[:-1], initial=0.0):
            coverage *= np.polynomial.Polynomial([1.0, -(1.0 - shorter)])
        roots = (coverage - (1 - rate)).roots()
        chance = min((root.real for root in roots if abs(root.imag) < 1e-9 and -1e-9 < root.real < 1 + 1e-6), key=abs)
    start = round(chance * 2**32) if len(span_lengths) > 1 else int(chance * 2**32)
    tokens, labels = rows.tokens.clone(), torch.full_like(rows.tokens, IGNORED)
    for place in np.ndindex(*tokens.shape):
        token, segment, position = (int(tensor[place]) for tensor in rows[:3])
        unit = position if units is None else int(units[place])
        if segment < 0 or token in SPECIAL or unit < 0 or (eligible is not None and not eligible[place]):
            continue
        sample = int(rows.sample_ids[segment]), int(rows.visits[segment])
        own = draws(position, *sample)
        spans = [draws(unit - back, *sample) for back in range(len(span_lengths))]
        if any(span[0] < start and span[3] >= threshold for span, threshold in zip(spans, thresholds, strict=True)):
            labels[place] = token
            if below(own[1], mask_share):
                tokens[place] = MASK
            elif below(own[1], mask_share + random_share):
                tokens[place] = pick(own[2])
    return tokens, labels


MASK_TRITON = masking.mask_triton


@pytest.mark.parametrize("case", CASES)
def test_kernel_and_twin_equal_a_loop_over_tokens_bit_for_bit(place, case, monkeypatch):
    options, names = CASES[case]
    rows = odd_rows()
    expected = oracle(rows, **options, **extras(rows, names))
    same(mask(rows, **options, **extras(rows, names)), expected)
    there = rows.to(place.device)
    for block in (32, 256, 1024):
        monkeypatch.setattr(masking, "mask_triton", partial(MASK_TRITON, block=block))
        same(mask(there, "triton", **options, **extras(there, names)), expected)
    same(mask(there, "torch", **options, **extras(there, names)), expected)


@pytest.mark.parametrize("case", CASES)
def test_masks_depend_neither_on_packing_nor_on_order_nor_on_rank(place, case):
    options, names = CASES[case]
    layouts = [rows.to(place.device) for rows in (odd_rows(), padded_rows(), reordered_rows())]
    samples = corruption.SAMPLES
    layouts.append(lay_out([samples[2:5], [samples[8]]], 150).to(place.device))  # what another rank may hold
    for impl in ("torch", "triton"):
        first, *others = (by_sample(rows, *mask(rows, impl, **options, **extras(rows, names))) for rows in layouts)
        assert len(first) == len(samples)
        for other in others:
            assert other == {sample: first[sample] for sample in other}
        assert len(others[-1]) == 4


def test_flat_strided_and_read_only_inputs_are_alike(place):
    rows = odd_rows().to(place.device)
    expected = mask(rows, "torch", **extras(rows, "eligible units"))
    flat = Rows(*(tensor.flatten() for tensor in rows))
    strided = Rows(*(torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in rows))
    transposed = Rows(*(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in rows))
    for impl in ("torch", "triton"):
        for others in (strided, transposed):
            assert not others.tokens.is_contiguous()
            odd = {name: tensor.t().contiguous().t() for name, tensor in extras(rows, "eligible units").items()}
            same(mask(others, impl, **odd), expected)
        result = mask(flat, impl, **extras(flat, "eligible units"))
        same((tensor.view_as(rows.tokens) for tensor in result), expected)
        visits = rows._replace(visits=rows.visits[:1].expand(len(rows.visits)))  # of stride 0
        same(mask(visits, impl), mask(visits._replace(visits=visits.visits.contiguous()), "torch"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tokens_and_no_samples_are_left_as_they_are(place, impl):
    for options in ({}, {"span_lengths": (0.5, 0.5)}):
        for shape in ((0,), (0, 7), (3, 0)):
            nothing = torch.empty(shape, dtype=torch.int64, device=place.device)
            none = nothing.flatten()
            result = mask(Rows(nothing, nothing, nothing, none, none), impl, rate=1.0, **options)
            assert result.tokens.shape == result.labels.shape == shape
        rows = lay_out([[], []], 5, pad=ORDINARY[0]).to(place.device)
        result = mask(rows, impl, rate=1.0, **options)
        assert torch.equal(result.tokens, rows.tokens) and (result.labels == IGNORED).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_inputs_are_not_changed(place, impl):
    rows = odd_rows().to(place.device)
    before = [tensor.clone() for tensor in rows]
    mask(rows, impl, rate=1.0)
    same(rows, before)


def test_seed_stream_sample_and_visit_each_draw_another_mask():
    rows = many(50, 64)
    base = mask(rows, rate=0.5).labels
    later, elsewhere = rows._replace(visits=rows.visits + 1), rows._replace(sample_ids=rows.sample_ids + 2**32)
    others = [mask(rows, rate=0.5, seed=1), mask(rows, rate=0.5, stream="x")]
    others += [mask(later, rate=0.5), mask(elsewhere, rate=0.5)]
    for other in others:
        assert (base != other.labels).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.01}, r"between 0 and 1, not at 1\.01"),
        ({"rate": -0.01}, "between 0 and 1"),
        ({"mask_share": -0.1}, "between 0 and 1"),
        ({"mask_share": 0.8, "random_share": 0.3}, "between 0 and 1"),
        ({"span_lengths": (0.5, 0.4)}, "do not sum to 1"),
        ({"span_lengths": (1.5, -0.5)}, "do not sum to 1"),
        ({"ordinary_ids": torch.empty(0, dtype=torch.int64)}, "no token"),
    ],
    ids=str,
)
def test_what_is_no_probability_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mask(odd_rows(), **options)


def test_without_random_tokens_no_ordinary_ids_are_needed(place):
    rows = odd_rows().to(place.device)
    nothing = torch.empty(0, dtype=torch.int64, device=place.device)
    for impl in ("torch", "triton"):
        same(mask(rows, impl, random_share=0.0, ordinary_ids=nothing), mask(rows, impl, random_share=0.0))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_op_passes_opcheck_and_compiles_whole(place, impl):
    rows = lay_out([[random_sample(9, 0), random_sample(4, 1)]], 16).to(place.device)
    tables = IS_ORDINARY.to(place.device), ORDINARY_IDS.to(place.device)
    for extra, reaches in ((extras(rows, "eligible units").values(), [0, 2**31]), ((None, None), [0])):
        arguments = (*rows, 5, "s", *tables, MASK, [2**31, 2**31, 2**32], *extra, reaches, impl)
        torch.library.opcheck(torch.ops.fused_objectives.mask_tokens, arguments)
    compiled = torch.compile(lambda rows: mask(rows, impl, rate=0.5), fullgraph=True, backend="aot_eager")
    same(compiled(rows), mask(rows, impl, rate=0.5))


# Statistics


def within(count: int, n: int, p: float) -> bool:
    """Whether a count lies inside the central 99.99 % of its binomial distribution."""
    low, high = stats.binom.interval(0.9999, n, p)
    return low <= count <= high


def kinds(tokens: torch.Tensor, corrupted: torch.Tensor, chosen: torch.Tensor) -> np.ndarray:
    """Count the chosen tokens that became the mask, another token, or stayed; and those not chosen."""
    masked, other = chosen & (corrupted == MASK), chosen & (corrupted != MASK) & (corrupted != tokens)
    return np.array([int(which.sum()) for which in (masked, other, chosen & (corrupted == tokens), ~chosen)])


@pytest.fixture(scope="module")
def million() -> Rows:
    return many(9300, 120)


def ordinary(rows: Rows) -> torch.Tensor:
    return (rows.segments >= 0) & IS_ORDINARY[rows.tokens]


def test_rate_and_split_are_those_asked_for_and_those_of_transformers_collator(million):
    tokenizer = word_tokenizer(VOCABULARY)
    specials = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer.add_special_tokens({name: tokenizer.convert_ids_to_tokens(token) for name, token in specials.items()})
    assert tokenizer.mask_token_id == MASK
    special = (~ordinary(million)).long()
    theirs = DataCollatorForLanguageModeling(tokenizer, seed=3)(
        [
            {"input_ids": tokens, "special_tokens_mask": mask}
            for tokens, mask in zip(million.tokens.tolist(), special.tolist(), strict=True)
        ]
    )
    which = ordinary(million)
    n = int(which.sum())
    assert n > 10**6
    corrupted, labels = mask(million)
    ours = kinds(million.tokens[which], corrupted[which], labels[which] != IGNORED)
    reference = kinds(million.tokens[which], theirs["input_ids"][which], theirs["labels"][which] != IGNORED)
    # Their random tokens may be special ones as well.
    assert stats.chi2_contingency([ours, reference]).pvalue > 1e-4
    for counts, vocabulary, masks in ((ours, len(ORDINARY), 0), (reference, VOCABULARY, 1 / VOCABULARY)):
        chosen = counts[:3].sum()
        assert within(chosen, n, 0.15)
        assert within(counts[0], chosen, 0.8 + 0.1 * masks)
        assert within(counts[1], chosen, 0.1 * (1 - 1 / vocabulary - masks))
    assert torch.equal(corrupted[~which], million.tokens[~which]) and (labels[~which] == IGNORED).all()
    assert torch.equal(labels[labels != IGNORED], million.tokens[labels != IGNORED])


def test_random_tokens_are_uniform_over_the_ordinary_ones(million):
    corrupted, labels = mask(million, rate=0.9, mask_share=0.0, random_share=1.0)
    counts = np.bincount(corrupted[labels != IGNORED].numpy(), minlength=VOCABULARY)
    assert counts[list(SPECIAL)].sum() == 0
    assert stats.chisquare(counts[ORDINARY]).pvalue > 1e-4


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4, 0.75, 1.0])
def test_a_rate_that_changes_every_step_is_met_at_every_step(rate, million):
    few = Rows(*(tensor[:1000] for tensor in million))
    chosen = (mask(few, rate=rate).labels != IGNORED)[ordinary(few)]
    assert within(int(chosen.sum()), len(chosen), rate)
    if rate > 0.05:
        lower = mask(few, rate=rate - 0.05).labels != IGNORED
        assert (mask(few, rate=rate).labels != IGNORED)[lower].all()  # a higher rate masks more, but nothing else


def test_words_are_chosen_whole_and_at_the_rate_of_transformers_whole_word_masking(million):
    """Words of 1, 2, 3, 1, … tokens. Each word is one draw, so the words chosen are binomial."""
    which = ordinary(million)
    text = torch.where(which, million.positions - 1, -1)
    units = torch.where(which, 3 * (text // 6) + torch.tensor([0, 1, 1, 2, 2, 2])[text % 6], -1)
    chosen = mask(million, units=units).labels != IGNORED
    owner = (million.segments * 1000 + units)[which]
    words, inverse, sizes = torch.unique(owner, return_inverse=True, return_counts=True)
    hidden = torch.zeros_like(sizes).index_add(0, inverse, chosen[which].long())
    assert ((hidden == 0) | (hidden == sizes)).all()
    assert within(int((hidden > 0).sum()), len(words), 0.15)
    for size in (1, 2, 3):
        assert within(int((hidden > 0)[sizes == size].sum()), int((sizes == size).sum()), 0.15)

    # They tell words apart by the gaps between the tokens' places in the text.
    first = torch.ones_like(which)
    first[:, 1:] = units[:, 1:] != units[:, :-1]
    starts = (1 + first).cumsum(1)
    few = 400
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they mask every chosen token
        collator = DataCollatorForLanguageModeling(word_tokenizer(VOCABULARY), whole_word_mask=True, seed=5)
    theirs = collator(
        [
            {"input_ids": tokens, "special_tokens_mask": mask, "offset_mapping": [(s, s + 1) for s in start]}
            for tokens, mask, start in zip(
                million.tokens[:few].tolist(), (~which[:few]).long().tolist(), starts[:few].tolist(), strict=True
            )
        ]
    )
    theirs = (theirs["labels"] != IGNORED)[which[:few]]
    inside = inverse[: len(theirs)]
    reference = torch.zeros_like(sizes).index_add(0, inside, theirs.long())[: int(inside.max()) + 1]
    assert ((reference == 0) | (reference == sizes[: len(reference)])).all()
    counts = [[int((values > 0).sum()), int((values == 0).sum())] for values in (hidden, reference)]
    assert stats.chi2_contingency(counts).pvalue > 1e-4


@pytest.mark.parametrize("span_lengths", [GEOMETRIC, (0.0, 0.0, 1.0), (0.5, 0.5)], ids=["geometric", "threes", "two"])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_spans_cover_the_rate_and_have_the_lengths_asked_for(rate, span_lengths, million):
    """Bounds that know of the correlation within spans.

    Two units d apart are both uncovered with probability (1 − rate)·Π_{k<d} (1 − q·P(length > k)): the covariance
    gives the variance of the number covered. And how many more units the spans so far cover is a Markov chain, which
    gives the lengths of runs of covered units.
    """
    chosen = mask(million, rate=rate, span_lengths=span_lengths).labels != IGNORED
    text = chosen[:, 1:111]
    assert ordinary(million)[:, 1:111].all()
    q, longest = start_rate(rate, span_lengths), len(span_lengths)
    longer = 1 - np.cumsum([0, *span_lengths])
    free = np.cumprod(1 - q * longer[:longest])
    assert np.isclose(free[-1], 1 - rate, atol=1e-12)
    width = text.shape[1]
    both = (1 - rate) * (free[:-1] - (1 - rate))
    variance = width * rate * (1 - rate) + 2 * sum((width - d) * c for d, c in enumerate(both, 1))
    error = int(text.sum()) - text.numel() * rate
    assert abs(error) < stats.norm.isf(0.5e-4) * np.sqrt(len(text) * variance)
    every = text.double().mean(0)  # the first units of a sample are covered no less than the others
    assert (every - rate).abs().max() < stats.norm.isf(0.5e-4 / width) * np.sqrt(rate * (1 - rate) / len(text))

    seen = 40
    going = text[:, 1:70] & ~text[:, :69]  # runs of which so many units are within the text
    runs, at_least = int(going.sum()), []
    for passed in range(1, seen + 1):
        at_least.append(int(going.sum()))
        going = going & text[:, 1 + passed : 70 + passed]
    counts, expected = -np.diff([*at_least, 0]), -np.diff([*run_lengths_at_least(q, span_lengths, seen), 0]) * runs
    often = expected >= 10
    groups = [np.append(values[often], values[~often].sum()) for values in (counts, expected)]
    if groups[1][-1] < 1e-9:  # lengths that cannot be
        assert groups[0][-1] == 0
        groups = [values[:-1] for values in groups]
    assert stats.chisquare(*groups).pvalue > 1e-4


def run_lengths_at_least(q: float, span_lengths: tuple[float, ...], longest: int) -> list[float]:
    """Return the probabilities that a run of covered units has at least 1, 2, … ``longest`` units."""
    reach = np.array([0, *span_lengths])  # probability that spans cover 0, 1, … units from here on; none ends the run
    started = np.cumsum(q * reach) + 1 - q  # that no span starts at a unit, or one of at most 0, 1, … units
    at_least = []
    for _ in range(longest):
        at_least.append(reach.sum())
        reach = np.diff(np.cumsum(np.append(reach[1:], 0)) * started, prepend=0)
        reach[0] = 0
    return at_least


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.15, 0.5, 0.999, 1.0])
def test_the_rate_of_starts_solves_its_equation(rate):
    for lengths in ((1.0,), (0.0, 1.0), GEOMETRIC, (0.5, 0.25, 0.25, 0.0)):
        q = start_rate(rate, lengths)
        assert 0 <= q <= 1
        longer = 1 - np.cumsum([0, *lengths[:-1]])
        assert np.isclose(1 - np.prod(1 - q * longer), rate, rtol=1e-12, atol=1e-15)
    assert start_rate(0.3, (1.0,)) == 0.3 and start_rate(1.0, GEOMETRIC) == 1.0


def test_special_tokens_padding_and_tokens_in_no_word_are_never_touched(million):
    few = Rows(*(tensor[:300] for tensor in million))
    untouched = ~ordinary(few) | (few.positions % 5 == 0)
    units = torch.where(untouched, -1, few.positions)
    for spans in ((1.0,), GEOMETRIC):
        corrupted, labels = mask(few, rate=1.0, units=units, span_lengths=spans)
        assert torch.equal(labels == IGNORED, untouched)
        assert torch.equal(corrupted[untouched], few.tokens[untouched])
