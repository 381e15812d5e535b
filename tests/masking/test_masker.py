import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DataCollatorForLanguageModeling

from fused_objectives.targets import IGNORED
from pretrain.config import parse
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig
from pretrain.masking.masker import Masker
from pretrain.model.vocabulary import Vocabulary
from tests.builders import CLS, MASK, PAD, SEP, UNK, VOCABULARY, lay_out, padded, random_samples, word_tokenizer


def masker(seed: int = 1, stream: str = "mlm", vocabulary: Vocabulary = VOCABULARY, **keys) -> Masker:
    return Masker(parse(MaskingConfig, keys, "test"), vocabulary, seed, stream)


def many(samples: int, length: int = 128):
    """Return a batch of random text of many samples, one a row, made without a loop over places."""
    text = torch.from_numpy(np.random.default_rng(0).choice(VOCABULARY.ordinary_ids, (samples, length)))
    text[:, 0], text[:, -9], text[:, -8:] = CLS, SEP, PAD
    batch = padded([np.array([CLS])] * samples, row_length=length)
    real = (torch.arange(length) < length - 8).expand(samples, length)
    return type(batch)(
        tokens=text,
        segment_ids=torch.where(real, torch.arange(samples)[:, None], -1),
        position_ids=torch.where(real, torch.arange(length), 0),
        sample_ids=batch.sample_ids,
        visits=batch.visits,
        lengths=torch.full((samples,), length - 8),
        sample_rows=batch.sample_rows,
    )


def ordinary(batch) -> torch.Tensor:
    """Return which places hold text."""
    return batch.real & ~torch.isin(batch.tokens, torch.from_numpy(VOCABULARY.special_ids))


def kinds(tokens: torch.Tensor, corrupted: torch.Tensor, chosen: torch.Tensor) -> np.ndarray:
    """Count the chosen tokens that became the mask, another token, or stayed; and those not chosen."""
    masked = chosen & (corrupted == MASK)
    other = chosen & ~masked & (corrupted != tokens)
    kept = chosen & (corrupted == tokens)
    return np.array([masked.sum().item(), other.sum().item(), kept.sum().item(), (~chosen).sum().item()])


def within(count: int, n: int, p: float) -> bool:
    """Whether a count lies inside the central 99.99 % of its binomial distribution."""
    low, high = stats.binom.interval(0.9999, n, p)
    return low <= count <= high


def test_statistics_are_those_of_transformers_collator():
    """Over 1.1 million tokens: each within the exact binomial bounds, and alike to each other."""
    batch = many(9300)
    corrupted, labels, *_ = masker()(batch, 0.0)
    collator = DataCollatorForLanguageModeling(word_tokenizer(), seed=3)
    theirs = collator([{"input_ids": row} for row in batch.tokens.tolist()])
    assert ordinary(batch).sum() > 10**6
    # The collator lets the unknown word alone, which is text to us; count it out on both sides.
    counted = ordinary(batch) & (batch.tokens != UNK)
    ours = kinds(batch.tokens[counted], corrupted[counted], (labels != IGNORED)[counted])
    reference = kinds(batch.tokens[counted], theirs["input_ids"][counted], (theirs["labels"] != IGNORED)[counted])
    assert stats.chi2_contingency([ours, reference]).pvalue > 1e-4
    n, vocabulary = int(counted.sum()), len(VOCABULARY.ordinary_ids)
    chosen = ours[:3].sum()
    assert within(chosen, n, 0.15)
    assert within(ours[0], chosen, 0.8)
    assert within(ours[1], chosen, 0.1 * (1 - 1 / vocabulary))


def test_random_replacements_are_uniform_over_ordinary_tokens():
    batch = many(1500)
    corrupted, labels, *_ = masker(rate=0.9, split={"mask": 0.0, "random": 1.0})(batch, 0.0)
    replaced = corrupted[labels != IGNORED].numpy()
    counts = np.bincount(replaced, minlength=VOCABULARY.size)
    assert counts[VOCABULARY.special_ids].sum() == 0
    assert stats.chisquare(counts[VOCABULARY.ordinary_ids]).pvalue > 1e-4


@pytest.mark.parametrize("keys", [{}, {"rate": 1.0}, {"rate": 1.0, "split": {"mask": 0.0, "random": 1.0}}], ids=str)
def test_special_tokens_and_padding_are_never_touched_nor_special_tokens_inserted(keys):
    batch = many(101)
    corrupted, labels, *_ = masker(**keys)(batch, 0.0)
    special = torch.isin(batch.tokens, torch.from_numpy(VOCABULARY.special_ids)) | ~batch.real
    assert torch.equal(corrupted[special], batch.tokens[special])
    assert (labels[special] == IGNORED).all()
    changed = corrupted[corrupted != batch.tokens]
    assert len(changed) > 0 and not torch.isin(changed, torch.tensor([PAD, CLS, SEP])).any()


def test_padding_that_looks_like_text_is_not_touched():
    sample = random_samples([9])[0]
    batch = lay_out([[sample]], row_length=40, pad=77)
    corrupted, labels, *_ = masker(rate=1.0)(batch, 0.0)
    assert (corrupted[0, 9:] == 77).all() and (labels[0, 9:] == IGNORED).all()
    assert (labels[0, 1:8] != IGNORED).all()


def test_labels_are_the_original_tokens_where_chosen_and_only_chosen_tokens_change():
    batch = many(101)
    corrupted, labels, *_ = masker(rate=0.3)(batch, 0.0)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], batch.tokens[chosen])
    assert torch.equal(corrupted[~chosen], batch.tokens[~chosen])


@pytest.mark.parametrize(("rate", "chosen"), [(1.0, True), (2**-33, False)])
def test_rates_at_the_ends_are_exact(rate, chosen):
    batch = many(307)
    split = {"mask": 1.0, "random": 0.0}
    corrupted, labels, *_ = masker(rate=rate, split=split)(batch, 0.0)
    eligible = ordinary(batch)
    assert torch.equal(labels != IGNORED, eligible if chosen else torch.zeros_like(eligible))
    assert torch.equal(corrupted == MASK, labels != IGNORED)


def test_rate_and_split_follow_their_schedules():
    batch = many(801)
    scheduled = masker(
        rate={"schedule": "linear", "from": 0.4, "to": 0.2},
        split={
            "mask": {"schedule": "steps", "from": 0.7, "steps": {0.5: 0.5}},
            "random": {"schedule": "cosine", "from": 0.0, "to": 0.5},
        },
    )
    n = int(ordinary(batch).sum())
    for progress, rate, mask, random in ((0.0, 0.4, 0.7, 0.0), (0.5, 0.3, 0.5, 0.25), (1.0, 0.2, 0.5, 0.5)):
        corrupted, labels, *_ = scheduled(batch, progress)
        counts = kinds(batch.tokens, corrupted, labels != IGNORED)
        chosen = counts[:3].sum()
        assert within(chosen, n, rate)
        assert within(counts[0], chosen, mask)
        assert within(counts[1], chosen, random * (1 - 1 / len(VOCABULARY.ordinary_ids)))


def test_a_mask_share_may_give_way_to_a_random_share():
    linear = {
        "mask": {"schedule": "linear", "from": 1.0, "to": 0.2},
        "random": {"schedule": "linear", "from": 0, "to": 0.8},
    }
    assert parse(MaskingConfig, {"split": linear}, "test").split.random.at(1.0) == 0.8


def test_a_higher_rate_chooses_a_superset():
    batch = many(53)
    low, high = (masker(rate=rate)(batch, 0.0)[1] != IGNORED for rate in (0.15, 0.4))
    assert (low <= high).all() and (high & ~low).any()


def test_corruption_is_a_function_of_seed_stream_sample_and_visit_in_any_layout():
    samples = random_samples([9, 30, 1, 17, 24, 2, 40])
    ids, visits = [5, 2**34 + 5, 7, 8, 9, 10, 11], [0, 0, 1, 2, 0, 0, 3]
    packed = lay_out([samples[:3], samples[3:6], samples[6:]], row_length=60, ids=ids, visits=visits)
    alone = padded(samples, ids=ids, visits=visits)
    for one, other in zip(masker(rate=0.5)(packed, 0.0)[:2], masker(rate=0.5)(alone, 0.0)[:2], strict=True):
        assert torch.equal(one[packed.real], other[alone.real])
    base = masker(rate=0.5)(alone, 0.0)[0]
    later = padded(samples, ids=ids, visits=[visit + 1 for visit in visits])
    for other in (
        masker(2, rate=0.5)(alone, 0.0),
        masker(1, "rtd", rate=0.5)(alone, 0.0),
        masker(rate=0.5)(later, 0.0),
    ):
        assert (base != other[0]).any(1).sum() >= 4


def test_a_batch_without_samples_is_left_as_it_is():
    empty = lay_out([[], []], row_length=5)
    corrupted, labels, *_ = masker(rate=1.0)(empty, 0.0)
    assert torch.equal(corrupted, empty.tokens) and (labels == IGNORED).all()


def test_a_vocabulary_without_a_mask_token_is_refused_unless_nothing_is_masked():
    bare = Vocabulary(size=20, pad_id=0, mask_id=None, special_ids=np.array([0]))
    with pytest.raises(UserError, match=r"no mask token.*split\.mask to 0"):
        masker(vocabulary=bare)
    masker(vocabulary=bare, split={"mask": 0.0, "random": 1.0})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rate": 1.5}, r"^test: rate: must lie between 0 and 1"),
        ({"rate": -0.1}, r"^test: rate: must lie between 0 and 1"),
        ({"rate": 0}, r"rate 0 hides nothing"),
        ({"rate": {"schedule": "linear", "from": 0.3, "to": 1.3}}, r"^test: rate: must lie between 0 and 1"),
        ({"split": {"mask": 0.8, "random": 0.3}}, r"^test: split: mask and random sum to more than 1"),
        ({"split": {"random": {"schedule": "cosine", "from": 0, "to": 0.3}}}, r"^test: split: .*more than 1"),
        ({"policy": "randm"}, r"^test: policy: .*did you mean 'random'\?"),
        ({"split": {"masks": 0.8}}, r"^test: split\.masks: unknown key; did you mean 'mask'\?"),
    ],
    ids=str,
)
def test_a_wrong_masking_key_or_value_is_refused_by_its_name(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        masker(**keys)
    assert "\n" not in str(caught.value)
