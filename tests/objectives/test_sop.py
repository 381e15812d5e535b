from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_objectives.targets import IGNORED, compact
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.vocabulary import Vocabulary
from pretrain.objectives import sop
from tests.builders import CLS, MASK, SEP, VOCABULARY, lay_out, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import labels_of, samples_of, word

STOP, REST = 20, 21  # ends a sentence; goes on with the word before
TEXT = replace(
    VOCABULARY, separator_id=SEP, sentence_end_ids=np.arange(10, STOP + 1), continuing_ids=np.arange(REST, 90)
)


def border(text: list[int], places: list[int], vocabulary: Vocabulary) -> int | None:
    """Return how many tokens stand before the split: at a sentence end, else between words, nearest the middle."""
    goes_on = [token in vocabulary.continuing_ids and i - 1 in places for token, i in zip(text, places, strict=True)]
    words = [i for i in range(2, len(text) - 1) if not goes_on[i]]
    sentences = [i for i in words if text[i - 1] in vocabulary.sentence_end_ids]
    return min(sentences or words, key=lambda i: (abs(i - len(text) / 2), i), default=None)


def arranged(tokens: list[int], sample_id: int, visit: int, vocabulary: Vocabulary = TEXT) -> tuple[list[int], int]:
    """Exchange the halves by the throw of a coin and put the separator between them."""
    places = [i for i, token in enumerate(tokens) if token not in vocabulary.special_ids]
    text = [tokens[i] for i in places]
    split = border(text, places, vocabulary)
    if split is None:
        return tokens, IGNORED
    first, second = text[:split], text[split:]
    exchanged = word("sop", 0, sample_id, visit) < 2**31
    if exchanged:
        first, second = second, first
    if vocabulary.separator_id is not None:
        first = [*first[:-1], vocabulary.separator_id]
    result = list(tokens)
    for place, token in zip(places, first + second, strict=True):
        result[place] = token
    return result, int(exchanged)


def text_of(*tokens: int) -> np.ndarray:
    return np.array([CLS, *tokens, SEP])


def both_orders(sample: np.ndarray, vocabulary: Vocabulary = TEXT) -> set[tuple[int, tuple[int, ...]]]:
    """Return what becomes of the text of a sample over many visits, with its labels."""
    objective = model_with("sop", vocabulary=vocabulary).objectives["sop"]
    view = objective.corrupt(padded([sample] * 40, visits=range(40)), 0.0)
    labels = view.labels.tolist()
    return {(label, tuple(tokens[1:-1])) for label, tokens in zip(labels, samples_of(view.batch), strict=True)}


@pytest.mark.parametrize("separator", [SEP, None])
def test_tokens_labels_and_losses_are_those_of_a_loop_over_the_samples(separator):
    vocabulary = replace(TEXT, separator_id=separator)
    model = model_with("sop", vocabulary=vocabulary)
    rows = [*rows_of_samples(20), random_samples([60, 41], seed=5), random_samples([4, 5, 6, 7], seed=6)]
    rows[3][0][len(rows[3][0]) // 2] = MASK  # a special token amid the text stays where it is
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=110)
    originals = [sample.tolist() for row in rows for sample in row]
    identities = zip(originals, batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)
    expected = [arranged(tokens, number, visit, vocabulary) for tokens, number, visit in identities]
    samples, labels = map(list, zip(*expected, strict=True))
    view = model.objectives["sop"].corrupt(batch, 0.0)
    assert samples_of(view.batch) == samples and torch.equal(view.tokens, view.batch.tokens)
    assert torch.equal(view.tokens[~batch.real], batch.tokens[~batch.real])
    assert view.labels.tolist() == labels
    assert {IGNORED, 0, 1} == set(labels)
    assert view.counts["sop"].tolist() == [int(label != IGNORED) for label in labels]
    assert view.tallies == {"sop/positives": labels.count(1)}
    sums = model.objectives["sop"].loss(model, view)["sop"].sums.tolist()
    with torch.no_grad():
        for tokens, label, found in zip(samples, labels, sums, strict=True):
            alone = padded([np.array(tokens)])
            logit = model.heads["order"](model.encoder(alone.tokens, Layout(alone))[:, 0])[0, 0]
            loss = F.binary_cross_entropy_with_logits(logit, torch.tensor(float(label)))
            assert found == pytest.approx(0.0 if label == IGNORED else loss.item(), rel=1e-4)


def test_the_sentence_end_nearest_the_middle_parts_the_halves():
    sample = text_of(100, STOP, 101, 102, 103, STOP, 104, 105, 106)
    found = both_orders(sample)
    assert found == {
        (0, (100, STOP, 101, 102, 103, SEP, 104, 105, 106)),
        (1, (104, 105, SEP, 100, STOP, 101, 102, 103, STOP)),
    }


def test_without_a_sentence_end_a_word_border_near_the_middle_parts_them():
    assert both_orders(text_of(100, 101, REST, REST, REST, 102)) == {(IGNORED, (100, 101, REST, REST, REST, 102))}
    found = both_orders(text_of(100, 101, 102, REST, REST, 103, 104))
    assert found == {(0, (100, SEP, 102, REST, REST, 103, 104)), (1, (102, REST, REST, 103, SEP, 100, 101))}


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_fewer_than_four_tokens_of_text_are_no_target(length):
    text = list(range(100, 100 + length))
    assert both_orders(text_of(*text)) == {(IGNORED, tuple(text))}
    assert len(both_orders(text_of(100, 101, 102, 103))) == 2


def test_without_a_separator_every_token_stays():
    found = both_orders(text_of(100, 101, 102, 103, 104), replace(TEXT, separator_id=None))
    assert found == {(0, (100, 101, 102, 103, 104)), (1, (102, 103, 104, 100, 101))}


def test_half_of_the_samples_are_exchanged_and_visits_draw_anew():
    objective = model_with("sop", vocabulary=TEXT).objectives["sop"]
    samples = random_samples([12] * 1000)
    labels = [objective.corrupt(padded(samples, visits=[visit] * 1000), 0.0).labels for visit in (0, 1)]
    for drawn in labels:
        assert 0.45 < drawn[drawn != IGNORED].double().mean() < 0.55
    assert not torch.equal(*labels)


def test_room_for_more_text_than_there_is_changes_nothing(monkeypatch):
    """On a GPU the number of text tokens is not known to the host."""
    objective = model_with("sop", vocabulary=TEXT).objectives["sop"]
    rows = rows_of_samples(10)
    batch = numbered(rows, ids_of(rows), row_length=75)
    exact = objective.corrupt(batch, 0.0)
    monkeypatch.setattr(sop, "compact", lambda is_text: compact(is_text, len(is_text)))
    roomy = objective.corrupt(batch, 0.0)
    assert torch.equal(exact.tokens, roomy.tokens) and torch.equal(exact.labels, roomy.labels)


def test_rows_without_samples_have_no_target():
    view = model_with("sop", vocabulary=TEXT).objectives["sop"].corrupt(lay_out([[], []], row_length=7), 0.0)
    assert view.labels.shape == (0,) and view.tallies["sop/positives"] == 0
    assert labels_of(view.batch, view.tokens) == []


def test_a_decoder_is_refused():
    with pytest.raises(UserError, match=r"^objectives\.sop: 'llama' is a decoder"):
        model_with("sop", "llama")
