"""Sources and targets are those of plain loops, and in number and length those of T5's own spans."""

import numpy as np
import pytest
import torch

from fused_objectives.targets import IGNORED
from pretrain.data.annotations import NO_UNIT
from pretrain.errors import UserError
from pretrain.masking.masker import Chooser, ChosenTokens
from pretrain.objectives import span_corruption, spans
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import CLS, PAD, PAIRED_VOCABULARY, SENTINELS, SEP, VOCABULARY, lay_out, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples

T5_SENTINELS = np.arange(300, 400)


def objective(vocabulary=PAIRED_VOCABULARY, **keys) -> span_corruption.SpanCorruption:
    configs = parse_objectives({"span_corruption": keys}, "test")
    return build_objectives(configs, vocabulary, seed=1)["span_corruption"]


def vocabulary_with(**changes):
    return type(VOCABULARY)(**{**vars(PAIRED_VOCABULARY), **changes})


def view_of(chosen, batch, **keys):
    """Return the view of a batch in which exactly the places ``chosen [rows, length]`` bool are chosen."""
    made = objective(**keys)
    made.chooser.choose = lambda *_: ChosenTokens(chosen, None, torch.zeros((), dtype=torch.int64))
    return made.corrupt(batch, 0.0)


def runs_of(chosen: list[bool]) -> list[tuple[int, int]]:
    """Return (start, end) of every run of chosen places."""
    found, start = [], None
    for place, flag in enumerate([*chosen, False]):
        if flag and start is None:
            start = place
        if not flag and start is not None:
            found.append((start, place))
            start = None
    return found


def expected_pair(tokens, chosen, most: int, room: float, output: str) -> tuple[list[int], list[int], int]:
    """Build one sample's source and target token by token; also count the spans that stay."""
    taken, used = [], 2
    runs = runs_of(chosen)
    for start, end in runs:
        used += 1 + end - start
        if len(taken) == most or used > room:
            break
        taken.append((start, end))
    source, target = list(tokens), []
    for number, (start, end) in reversed(list(enumerate(taken))):
        source[start:end] = [SENTINELS[number]]
    for number, (start, end) in enumerate(taken):
        target += [SENTINELS[number], *tokens[start:end]]
    target += [SENTINELS[len(taken)], SEP] if output == "spans" else []
    if output == "sentence":
        target = list(tokens)
    return source, target if taken else [], len(runs) - len(taken)


@pytest.mark.parametrize("output", ["spans", "sentence"])
@pytest.mark.parametrize("target_length", [None, 4, 9, 16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_source_and_target_are_those_of_a_plain_loop(rate, target_length, output):
    """Packed samples, some of a single token; many have more spans than there are sentinels."""
    rng = np.random.default_rng(3)
    rows = [*rows_of_samples(7), random_samples([50, 61]), []]
    batch = numbered(rows, ids_of(rows), row_length=113)
    special = torch.isin(batch.tokens, torch.from_numpy(VOCABULARY.special_ids))
    chosen = torch.from_numpy(rng.random(batch.tokens.shape) < rate) & batch.real & ~special
    view = view_of(chosen, batch, target_length=target_length, output=output)
    room = target_length if target_length is not None and output == "spans" else np.inf
    left, most = 0, len(SENTINELS) - (output == "spans")
    for number, sample in enumerate(sample for row in rows for sample in row):
        mine = batch.segment_ids == number
        source, target, stayed = expected_pair(sample.tolist(), chosen[mine].tolist(), most, room, output)
        assert view.tokens[number][view.real[number]].tolist() == source
        assert view.labels[number][view.labels[number] != IGNORED].tolist() == target
        assert view.labels[number, : len(target)].tolist() == target  # nothing before it
        assert view.counts["span_corruption"][number] == len(target)
        left += stayed
    assert len(view.tokens) == len(view.labels) == len(batch.sample_ids)
    assert (view.tokens[~view.real] == PAD).all()
    assert view.tallies["span_corruption/spans_left"] == left
    if rate == 0.5:
        assert left > 0
    if room < np.inf:
        assert view.labels.shape[1] <= room


def random_spans_noise_mask(length: int, density: float, mean: float, rng) -> np.ndarray:
    """T5's choice, from the description of its segmentation: as many noise tokens and spans as rounding allows, cut at
    random; text and noise take turns, text first."""
    noise = min(max(round(length * density), 1), length - 1)
    count = max(round(noise / mean), 1)

    def cut(total: int) -> np.ndarray:
        borders = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
        return np.diff([0, *borders, total])

    lengths = np.stack([cut(length - noise), cut(noise)], 1).reshape(-1)
    return np.repeat(np.arange(2 * count) % 2 == 1, lengths)


def t5_collator(tokens: np.ndarray, mask: np.ndarray) -> tuple[list[int], list[int]]:
    """T5's way to a pair: each run of noise in the input, and of text in the target, becomes the next sentinel."""

    def replaced(flags):
        first = flags & ~np.concatenate([[False], flags[:-1]])
        marked = np.where(first, T5_SENTINELS[np.cumsum(first) - 1], tokens)
        return marked[~flags | first].tolist()

    return replaced(mask), replaced(~mask)


def text_of(lengths, seed: int = 0):
    """Return a padded batch of text without special tokens."""
    rng = np.random.default_rng(seed)
    return padded([rng.choice(VOCABULARY.ordinary_ids, length) for length in lengths])


def test_pairs_are_those_of_t5_and_end_with_one_more_sentinel_as_in_the_paper():
    rng = np.random.default_rng(0)
    lengths = [9, 20, 64, 111, 200]
    batch = text_of(lengths)
    chosen = torch.zeros_like(batch.tokens, dtype=torch.bool)
    masks = [random_spans_noise_mask(length, 0.15, 3.0, rng) for length in lengths]
    for row, mask in enumerate(masks):
        chosen[row, : len(mask)] = torch.from_numpy(mask)
    vocabulary = vocabulary_with(size=400, sentinel_ids=T5_SENTINELS, special_ids=T5_SENTINELS)
    view = view_of(chosen, batch, vocabulary=vocabulary)
    for row, mask in enumerate(masks):
        source, target = t5_collator(batch.tokens[row, : len(mask)].numpy(), mask)
        spans_there = sum(token >= 300 for token in target)
        assert view.tokens[row][view.real[row]].tolist() == source
        assert view.labels[row][view.labels[row] != IGNORED].tolist() == [*target, 300 + spans_there, SEP]
    assert view.tallies["span_corruption/spans_left"] == 0


def test_density_and_mean_span_length_are_those_of_t5_over_a_million_tokens():
    """T5 takes out the same number of tokens of every sample, in as many spans; here every token starts a span with a
    probability, so the numbers scatter about the same means. Samples are independent, which bounds the means' error."""
    samples, length = 2600, 400  # T5 has nothing to round here
    rng = np.random.default_rng(0)
    theirs = np.stack([random_spans_noise_mask(length, 0.15, 3.0, rng) for _ in range(samples)])
    batch = text_of([length])
    many = type(batch)(
        tokens=batch.tokens.expand(samples, length).contiguous(),
        segment_ids=torch.arange(samples)[:, None].expand(samples, length).contiguous(),
        position_ids=torch.arange(length).expand(samples, length).contiguous(),
        sample_ids=torch.arange(samples),
        visits=torch.zeros(samples, dtype=torch.int64),
        lengths=torch.full((samples,), length),
        sample_rows=torch.arange(samples),
    )
    ours = objective().chooser.choose(many, 0.0).chosen.numpy()
    assert ours.size > 10**6

    def tokens_and_spans(masks):
        return masks.sum(1), (masks & ~np.pad(masks[:, :-1], ((0, 0), (1, 0)))).sum(1)

    def four_errors(counts):
        return 4 * counts.std() / np.sqrt(samples)

    (tokens, runs), (their_tokens, their_runs) = tokens_and_spans(ours), tokens_and_spans(theirs)
    assert set(their_tokens) == {60} and set(their_runs) == {20}
    assert tokens.mean() == pytest.approx(60, abs=four_errors(tokens))
    # A span may begin with the sample here, and there never: 0.15 at the first place, 0.05 at each of the others.
    assert runs.mean() == pytest.approx(0.15 + 0.05 * (length - 1), abs=four_errors(runs))
    assert tokens.sum() / runs.sum() == pytest.approx(3.0, rel=0.02)
    assert 10 < tokens.std() < 20 and 3 < runs.std() < 6


def test_a_rate_that_changes_over_the_run_changes_how_much_is_taken_out():
    rows = [random_samples([60, 60]) for _ in range(40)]
    batch = numbered(rows, ids_of(rows))
    made = objective(masking={"rate": {"schedule": "linear", "from": 0.05, "to": 0.4}})
    early, late = (int(made.corrupt(batch, progress).counts["span_corruption"].sum()) for progress in (0.0, 1.0))
    assert late > 3 * early > 0


@pytest.mark.parametrize("policy", ["random", "whole_word", "span", "salient", "learned", "frequency", "pos_weighted"])
def test_every_policy_chooses_the_spans_that_its_choice_makes(policy):
    rows = [random_samples([40, 30], seed=row) for row in range(6)]
    batch = numbered(rows, ids_of(rows))
    units = torch.where(batch.position_ids % 7 > 3, batch.position_ids // 7, NO_UNIT)
    if policy == "pos_weighted":
        units = batch.position_ids % 5
    name = {"salient": "salient", "learned": "learned", "pos_weighted": "pos"}.get(policy)
    batch = type(batch)(**{**vars(batch), "units": {name: units} if name else {}})
    made = objective(masking={"policy": policy, "rate": 0.2})
    assert made.annotations == ({name: "classes" if name == "pos" else "spans"} if name else {})
    view = made.corrupt(batch, 0.0)
    chosen = made.chooser.choose(batch, 0.0).chosen
    assert chosen.any()
    for number, sample in enumerate(sample for row in rows for sample in row):
        mine = batch.segment_ids == number
        flags = chosen[mine].tolist()
        source, target, _ = expected_pair(sample.tolist(), flags, len(SENTINELS) - 1, np.inf, "spans")
        assert view.tokens[number][view.real[number]].tolist() == source
        assert view.labels[number][view.labels[number] != IGNORED].tolist() == target
    assert ("span_corruption/chosen_at_random" in view.tallies) == bool(name)


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"target_length": 12}, {"output": "sentence"}])
def test_widths_that_are_known_without_looking_at_the_batch_change_nothing(monkeypatch, keys):
    """As on a GPU, where the host must not wait for the longest source and target."""
    model = model_with("span_corruption", "t5", masking={"rate": 0.4}, **keys)
    made = model.objectives["span_corruption"]
    rows = rows_of_samples(5)
    batch = numbered(rows, ids_of(rows), row_length=75)
    exact = made.corrupt(batch, 0.0)
    monkeypatch.setattr(spans, "width_for", lambda lengths, bound: bound)
    monkeypatch.setattr(span_corruption, "width_for", lambda lengths, bound: bound)
    choose = Chooser.choose
    monkeypatch.setattr(Chooser, "choose", lambda *given: choose(*given)._replace(capacity=150))
    fixed = made.corrupt(batch, 0.0)
    assert fixed.tokens.shape == (len(batch.sample_ids), 75)
    assert fixed.labels.shape[1] == (keys.get("target_length") or (75 if keys else 78))
    assert fixed.capacity is None if "output" in keys else fixed.capacity >= exact.counts["span_corruption"].sum()
    for part in ("tokens", "labels", "real"):
        narrow, wide = getattr(exact, part), getattr(fixed, part)
        assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    ours, theirs = (made.loss(model, view)["span_corruption"] for view in (fixed, exact))
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["span_corruption", "denoise"])
def test_nothing_is_asked_of_the_device_but_widths(monkeypatch, name):
    """On the meta device, which has no values to give: what asks for one fails."""
    monkeypatch.setattr(spans, "width_for", lambda lengths, bound: bound)
    monkeypatch.setattr(span_corruption, "width_for", lambda lengths, bound: bound)
    rows = rows_of_samples(5)
    batch = numbered(rows, ids_of(rows), row_length=75).to(torch.device("meta"))
    made = build_objectives(parse_objectives({name: {}}, "test"), PAIRED_VOCABULARY, seed=1)[name]
    chosen = ChosenTokens(batch.real, 150, batch.visits.new_zeros(()))
    made.chooser.choose = lambda *_: chosen
    view = made.corrupt(batch, 0.0)
    assert view.tokens.is_meta and view.labels.is_meta
    assert len(view.tokens) == len(view.labels) == len(batch.sample_ids)


def test_a_target_with_as_many_spans_as_can_be_has_room():
    """Every other token of a sample is a span of its own."""
    sample = random_samples([41])[0][1:-1]
    batch = padded([sample])
    chosen = batch.position_ids % 2 == 0
    vocabulary = vocabulary_with(size=400, sentinel_ids=T5_SENTINELS, special_ids=T5_SENTINELS)
    view = view_of(chosen, batch, vocabulary=vocabulary)
    assert view.counts["span_corruption"].tolist() == [20 + 20 + 2] == [len(sample) + 3]


def test_spans_end_with_their_sample_though_the_next_begins_with_a_chosen_token():
    text = [np.random.default_rng(row).choice(VOCABULARY.ordinary_ids, 6) for row in range(3)]
    batch = lay_out([text])
    everything = torch.ones_like(batch.tokens, dtype=torch.bool)
    view = view_of(everything, batch)
    assert view.tokens.tolist() == [[SENTINELS[0]]] * 3
    assert view.labels.tolist() == [[SENTINELS[0], *sample.tolist(), SENTINELS[1], SEP] for sample in text]


def test_the_positions_of_the_model_bound_the_target():
    model = model_with("span_corruption", "bart", masking={"rate": 0.9})
    assert model.objectives["span_corruption"].target_length == model.encoder.positions == 512
    assert model_with("span_corruption", "t5").objectives["span_corruption"].target_length is None
    with pytest.raises(UserError, match=r"^objectives\.span_corruption\.target_length: 513 .*512 or less$"):
        model_with("span_corruption", "bart", target_length=513)


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({"sentinel_ids": np.array([], np.int64)}, {}, "no sentinels.*medley prepare --sentinels 100"),
        ({"sentinel_ids": np.array([211])}, {}, "only 1 of the sentinels.*--sentinels"),
        ({"eos_id": None}, {}, "no end token"),
    ],
)
def test_a_tokenizer_that_lacks_something_is_refused_with_the_remedy(changes, keys, message):
    with pytest.raises(UserError, match=rf"^objectives\.span_corruption: .*{message}") as error:
        objective(vocabulary_with(**changes), **keys)
    assert "\n" not in str(error.value)


def test_one_sentinel_and_no_end_token_suffice_to_write_the_sentence():
    vocabulary = vocabulary_with(sentinel_ids=np.array(SENTINELS[:1]), eos_id=None)
    batch = padded(random_samples([12]))
    chosen = torch.isin(batch.position_ids, torch.tensor([2, 3, 7]))
    view = view_of(chosen, batch, vocabulary=vocabulary, output="sentence")
    sample = batch.tokens[0].tolist()
    assert view.tokens[0].tolist() == [*sample[:2], SENTINELS[0], *sample[4:]]
    assert view.labels[0].tolist() == sample and sample[0] == CLS
    assert view.tallies["span_corruption/spans_left"] == 1


def test_what_becomes_of_chosen_tokens_is_no_key_of_this_objective():
    with pytest.raises(UserError, match=r"objectives\.span_corruption\.masking\.split: unknown key"):
        objective(masking={"split": {"mask": 1.0}})


def test_a_batch_without_samples_has_a_row_that_holds_nothing():
    view = objective().corrupt(lay_out([[], []], row_length=9), 0.0)
    assert view.counts["span_corruption"].shape == (0,)
    assert view.tokens.shape[0] == view.labels.shape[0] == 1 and view.real.any()
    assert (view.labels == IGNORED).all()
