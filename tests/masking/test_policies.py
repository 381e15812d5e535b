from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DataCollatorForLanguageModeling

from fused_objectives.targets import IGNORED
from pretrain.config import parse
from pretrain.data.annotations import NO_UNIT, PARTS_OF_SPEECH
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig, SpanConfig
from pretrain.masking.masker import Masker
from pretrain.masking.policies import POLICIES, proportional, words
from tests.builders import CLS, MASK, SEP, VOCABULARY, lay_out, padded, random_samples, word_tokenizer

# Every third ordinary id goes on with the word before it.
WORDS = replace(VOCABULARY, continuing_ids=VOCABULARY.ordinary_ids[::3])
LENGTHS = [60, 1, 37, 2, 90, 17, 44]


def masker(policy: str, vocabulary=WORDS, seed: int = 1, **keys) -> Masker:
    return Masker(parse(MaskingConfig, {"policy": policy, **keys}, "test"), vocabulary, seed, "mlm")


def chosen_by(policy: str, batch, **keys) -> torch.Tensor:
    return masker(policy, **keys)(batch, 0.0).labels != IGNORED


def text_of(batch) -> torch.Tensor:
    return batch.real & ~torch.isin(batch.tokens, torch.from_numpy(VOCABULARY.special_ids))


def annotated(batch, spans: dict[int, list[tuple[int, int]]], name: str = "salient"):
    """Mark spans, given by sample as (first position, one behind the last), as units."""
    units = torch.full_like(batch.tokens, NO_UNIT)
    for sample, pairs in spans.items():
        for number, (start, end) in enumerate(pairs):
            inside = (batch.segment_ids == sample) & (batch.position_ids >= start) & (batch.position_ids < end)
            units[inside] = number
    return replace(batch, units={name: units})


def many(samples: int = 300, length: int = 62, seed: int = 0):
    return padded(random_samples([length] * samples, seed=seed))


def tiled(batch, times: int):
    """Repeat the rows of a batch, each time as samples of their own."""
    rows, samples = len(batch.tokens), len(batch.sample_ids)
    again = torch.arange(times).repeat_interleave(rows)[:, None]
    return replace(
        batch,
        tokens=batch.tokens.repeat(times, 1),
        segment_ids=torch.where(batch.real.repeat(times, 1), batch.segment_ids.repeat(times, 1) + samples * again, -1),
        position_ids=batch.position_ids.repeat(times, 1),
        sample_ids=torch.arange(samples * times),
        visits=batch.visits.repeat(times),
        lengths=batch.lengths.repeat(times),
        sample_rows=torch.arange(rows * times),
    )


def with_units(batch, name: str):
    """Give every sample of a batch a few units, whatever the policy makes of them."""
    units = torch.where(batch.position_ids % 7 < 3, batch.position_ids // 7, NO_UNIT)
    return replace(batch, units={name: torch.where(batch.real, units, NO_UNIT)})


def test_words_are_numbered_within_each_sample_and_special_tokens_are_in_none():
    samples = random_samples(LENGTHS)
    packed = lay_out([samples[:3], samples[3:5], [], samples[5:]], row_length=101)
    continuing = set(WORDS.continuing_ids.tolist())
    found = words(packed, WORDS)
    for number, sample in enumerate(samples):
        word, expected, after_text = -1, [], False
        for token in sample.tolist():
            if token in (CLS, SEP, MASK):
                expected.append(-1)
                after_text = False
                continue
            word += not (after_text and token in continuing)
            expected.append(word)
            after_text = True
        assert found[packed.segment_ids == number].tolist() == expected
    assert (found[~packed.real] == -1).all()
    assert words(lay_out([[], []], row_length=5), WORDS).tolist() == [[-1] * 5] * 2


def test_whole_words_are_chosen_with_all_of_their_tokens_at_the_rate():
    batch = many(2000)
    chosen, unit = chosen_by("whole_word", batch), words(batch, WORDS)
    same_word = (unit[:, 1:] == unit[:, :-1]) & (unit[:, 1:] >= 0)
    assert torch.equal(chosen[:, 1:][same_word], chosen[:, :-1][same_word]) and same_word.any()
    count = int((unit.amax(1) + 1).sum())
    first = unit.diff(dim=1, prepend=torch.full_like(unit[:, :1], -1)) > 0
    low, high = stats.binom.interval(0.9999, count, 0.15)
    assert low <= int((chosen & first).sum()) <= high


def test_whole_words_are_masked_as_transformers_collator_does():
    """Over a million tokens: words are chosen whole, and as many words and tokens as the collator chooses."""
    batch, collator = (
        tiled(many(500), 34),
        DataCollatorForLanguageModeling(word_tokenizer(), whole_word_mask=True, seed=3),
    )
    unit = words(batch, WORDS)
    first = unit.diff(dim=1, prepend=torch.full_like(unit[:, :1], -1)) > 0
    assert text_of(batch).sum() > 10**6
    ours = masker("whole_word", split={"mask": 1.0, "random": 0.0})(batch, 0.0).tokens == MASK
    places = torch.arange(batch.tokens.shape[1]) + 100 * unit.clamp(min=0)  # what touches belongs to one word
    offsets, special = torch.stack([places, places + 1], -1), ~text_of(batch)
    theirs = torch.cat(
        [
            collator.torch_mask_tokens(batch.tokens[part], special[part].int(), offsets[part])[0] == MASK
            for part in torch.arange(len(unit)).split(500)
        ]
    )
    for which in (text_of(batch), first):
        count = int(which.sum())
        table = [[int((chosen & which).sum()) for chosen in (ours, theirs)]]
        table.append([count - chosen for chosen in table[0]])
        if which is first:  # words are independent draws, tokens are not
            assert stats.chi2_contingency(table).pvalue > 1e-4
        assert abs(table[0][0] - table[0][1]) / count < 0.003
    within = (unit[:, 1:] == unit[:, :-1]) & (unit[:, 1:] >= 0)
    assert torch.equal(theirs[:, 1:][within], theirs[:, :-1][within])


@pytest.mark.parametrize("whole_words", [True, False])
def test_spans_cover_the_rate_and_run_longer_than_single_tokens(whole_words):
    batch = many(2000)
    chosen = chosen_by("span", batch, rate=0.3, span={"whole_words": whole_words})
    assert chosen[text_of(batch)].double().mean() == pytest.approx(0.3, abs=0.01)
    goes_on = (chosen[:, 1:] & chosen[:, :-1]).sum() / chosen[:, :-1].sum()
    assert goes_on > 0.6  # independent tokens: 0.3


def test_span_lengths_are_geometric_up_to_the_longest():
    lengths = SpanConfig(stop=0.2, longest=10).lengths
    assert sum(lengths) == pytest.approx(1) and len(lengths) == 10
    assert lengths[3] / lengths[2] == pytest.approx(0.8)
    assert sum(k * p for k, p in enumerate(lengths, 1)) == pytest.approx(3.8, abs=0.02)  # the paper's mean


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rarer_tokens_are_chosen_more_often_at_the_same_rate(power):
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, len(VOCABULARY.ordinary_ids) + 1)
    shares /= shares.sum()
    text = torch.from_numpy(rng.choice(VOCABULARY.ordinary_ids, (3000, 64), p=shares))
    batch = replace(many(3000, 64), tokens=text)
    counts = np.bincount(text.flatten(), minlength=VOCABULARY.size)
    vocabulary = replace(WORDS, counts=counts)
    chosen = chosen_by("frequency", batch, vocabulary=vocabulary, power=power)
    assert chosen.double().mean() == pytest.approx(0.15, abs=0.003)
    often, seldom = (chosen[text == VOCABULARY.ordinary_ids[rank]].double().mean() for rank in (0, 99))
    expected = (counts[VOCABULARY.ordinary_ids[0]] / counts[VOCABULARY.ordinary_ids[99]]) ** power
    assert seldom / often == pytest.approx(min(expected, 1 / float(often)), rel=0.25)


def test_probabilities_in_proportion_keep_their_mean_where_some_reach_one():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for rate in (0.1, 0.4, 0.9):
        odds = proportional(shares, torch.tensor([1.0, 2.0, 8.0, 64.0]), rate)
        assert float((shares * odds).sum()) == pytest.approx(rate, rel=1e-6)
        assert (odds <= 1).all() and (odds.diff() >= 0).all()
    assert float(proportional(shares, torch.tensor([1.0, 2.0, 8.0, 64.0]), 0.4)[3]) == 1.0


def test_parts_of_speech_are_chosen_in_proportion_to_their_weights():
    batch = many(2000)
    nouns = words(batch, VOCABULARY) % 2 == 0
    classes = torch.where(nouns, PARTS_OF_SPEECH.index("NOUN"), PARTS_OF_SPEECH.index("DET"))
    batch = replace(batch, units={"pos": torch.where(text_of(batch), classes, NO_UNIT)})
    chosen = chosen_by("pos_weighted", batch, vocabulary=VOCABULARY, weights={"NOUN": 3.0, "DET": 1.0})
    text = text_of(batch)
    assert chosen[text].double().mean() == pytest.approx(0.15, abs=0.005)
    assert chosen[text & nouns].double().mean() / chosen[text & ~nouns].double().mean() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("policy", ["salient", "learned"])
def test_units_are_chosen_whole_and_at_the_rate_of_all_tokens(policy):
    plain = many(3000)
    spans = {sample: [(3, 6), (10, 11), (20, 28), (40, 45)] for sample in range(3000)}  # 17 of 60 tokens
    batch = annotated(plain, spans, policy)
    chosen = chosen_by(policy, batch, rate=0.1)
    units = batch.units[policy]
    assert not chosen[units == NO_UNIT].any()
    for number in range(4):
        inside = chosen[units == number].view(3000, -1)
        assert torch.equal(inside.any(1), inside.all(1))
        assert inside[:, 0].double().mean() == pytest.approx(0.1 * 60 / 17, abs=0.035)


def test_a_sample_with_too_few_units_has_all_of_them_chosen():
    batch = annotated(many(5), {sample: [(4, 6)] for sample in range(5)})
    chosen = chosen_by("salient", batch, rate=0.3)
    assert torch.equal(chosen, batch.units["salient"] != NO_UNIT)


def test_a_sample_without_units_is_masked_at_random_and_counted():
    samples = random_samples([60] * 400 + [1, 2])
    batch = annotated(padded(samples), {sample: [(4, 60)] for sample in range(0, 400, 2)})
    result = masker("salient")(batch, 0.0)
    chosen = result.labels != IGNORED
    assert result.fallbacks == 200  # [CLS] alone, and [CLS] [SEP], hold nothing to choose from
    odd = (batch.segment_ids % 2 == 1) & text_of(batch)
    assert chosen[odd].double().mean() == pytest.approx(0.15, abs=0.02)
    assert masker("random")(batch, 0.0).fallbacks == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_is_a_function_of_the_sample_and_never_touches_special_tokens(policy):
    samples = random_samples(LENGTHS)
    ids, visits = [5, 2**34 + 5, 7, 8, 9, 10, 11], [0, 0, 1, 2, 0, 0, 3]
    packed = lay_out([samples[:3], samples[3:5], [], samples[5:]], row_length=101, ids=ids, visits=visits)
    alone = padded(samples, ids=ids, visits=visits)
    later = padded(samples, ids=ids, visits=[visit + 1 for visit in visits])
    name = masker(policy).config.annotation_name or "none"
    results = [masker(policy, rate=0.4)(with_units(batch, name), 0.0) for batch in (packed, alone, later)]
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(one[packed.real], other[alone.real])
    assert not torch.equal(results[1].labels, results[2].labels)
    assert results[0].fallbacks == results[1].fallbacks
    assert (results[0].labels[~text_of(packed)] == IGNORED).all()
    assert torch.equal(results[0].tokens[~text_of(packed)], packed.tokens[~text_of(packed)])
    empty = with_units(lay_out([[], []], row_length=5), name)
    assert (masker(policy)(empty, 0.0).labels == IGNORED).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy": "spam"}, r"policy: .*did you mean 'span'"),
        ({"policy": "random", "power": 1.0}, r"'power' goes with policy frequency, not with random"),
        ({"policy": "span", "annotation": "x"}, r"'annotation' goes with policy salient or learned or pos_weighted"),
        ({"policy": "pos_weighted", "weights": {"NOON": 2}}, r"weights: 'NOON' is none of ADJ, .*NOUN"),
        ({"policy": "pos_weighted", "weights": {"NOUN": -1}}, r"weights: NOUN must not be negative"),
        ({"policy": "salient", "annotation": "../x"}, r"annotation: "),
        ({"policy": "span", "span": {"longest": 0}}, r"span\.longest"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_its_key(keys, message):
    with pytest.raises(UserError, match=message):
        parse(MaskingConfig, keys, "test")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_configuration_with_every_default_spelled_out_is_read_back(policy):
    config = parse(MaskingConfig, {"policy": policy}, "test")
    assert parse(MaskingConfig, config.model_dump(mode="json", by_alias=True), "test") == config
