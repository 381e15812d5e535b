import pytest
import torch

from fused_objectives.backend import INTERPRETED
from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from tests.builders import VOCABULARY, lay_out, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import detection_sums, labels_of, samples_of, word

IMPLS = ("torch", "triton")


def swapped(tokens: list[int], sample_id: int, visit: int, rate: float) -> tuple[list[int], list[int]]:
    """Let every chosen token take that of the next in a random order, the last that of the first."""
    chosen = []
    for position, token in enumerate(tokens):
        if token not in VOCABULARY.special_ids and word("std", position, sample_id, visit) < int(rate * 2**32):
            chosen.append((word("std", position, sample_id, visit, 1), position))
    chosen.sort()
    result = list(tokens)
    for (_, place), (_, successor) in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        result[place] = tokens[successor]
    return result, [int(new != old) for new, old in zip(result, tokens, strict=True)]


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_tokens_labels_and_losses_are_those_of_a_loop_over_the_samples(rate):
    model = model_with("std", rate=rate)
    rows = rows_of_samples(9)
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=70)
    view = model.objectives["std"].corrupt(batch, 0.0)
    originals = [sample.tolist() for row in rows for sample in row]
    identities = zip(originals, batch.sample_ids.tolist(), batch.visits.tolist(), strict=True)
    expected = [swapped(tokens, number, visit, rate) for tokens, number, visit in identities]
    samples, labels = zip(*expected, strict=True)
    assert samples_of(view.batch) == list(samples)
    assert torch.equal(view.tokens, view.batch.tokens)
    assert labels_of(batch, view.labels) == list(labels)
    assert (view.labels[~batch.real] == IGNORED).all()
    assert view.tallies["std/positives"] == sum(map(sum, labels)) > 5
    assert view.counts["std"].tolist() == [len(tokens) for tokens in originals]
    sums = model.objectives["std"].loss(model, view)["std"].sums
    assert sums.tolist() == pytest.approx(detection_sums(model, "std_detection", samples, labels), rel=1e-4)


def test_each_sample_keeps_its_tokens_and_about_the_rate_of_them_move():
    samples = random_samples([60] * 200)
    view = model_with("std").objectives["std"].corrupt(padded(samples), 0.0)
    assert [sorted(tokens) for tokens in samples_of(view.batch)] == [sorted(sample.tolist()) for sample in samples]
    moved = int((view.labels == 1).sum()) / (58 * 200)
    assert 0.12 < moved < 0.16  # a token alone stays


def test_a_token_in_the_place_of_its_equal_is_not_positive():
    sample = random_samples([30])[0]
    sample[1:-1] = 77
    view = model_with("std", rate=1.0).objectives["std"].corrupt(padded([sample]), 0.0)
    assert view.tallies["std/positives"] == 0 and (view.labels == 0).all()


def test_the_rate_follows_the_run():
    objective = model_with("std", rate={"schedule": "linear", "from": 0.6, "to": 0.1}).objectives["std"]
    batch = padded(random_samples([60] * 20))
    start, end = (objective.corrupt(batch, progress).tallies["std/positives"] for progress in (0.0, 1.0))
    assert start > 4 * end > 0


def test_rows_without_samples_have_no_positives():
    view = model_with("std").objectives["std"].corrupt(lay_out([[], []], row_length=7), 0.0)
    assert view.tallies["std/positives"] == 0 and view.counts["std"].shape == (0,)


@pytest.mark.parametrize("name", ["std", "itd", "dtd"])
def test_a_rate_that_does_nothing_is_refused(name):
    with pytest.raises(UserError, match=rf"^test: objectives\.{name}: rate 0 leaves nothing to detect"):
        model_with(name, rate=0)


@pytest.mark.parametrize("name", ["std", "itd", "dtd"])
def test_a_decoder_is_refused(name):
    with pytest.raises(UserError, match=rf"^objectives\.{name}: 'llama' is a decoder"):
        model_with(name, "llama")


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["std", "itd", "dtd"])
def test_kernels_and_twins_corrupt_alike(name):
    rows = rows_of_samples(5)
    batch = numbered(rows, ids_of(rows), row_length=70)
    plain, fused = (model_with(name, rate=0.4, impl=impl).objectives[name].corrupt(batch, 0.0) for impl in IMPLS)
    assert torch.equal(plain.labels, fused.labels) and plain.tallies == fused.tallies
    for field in ("tokens", "segment_ids", "position_ids", "lengths"):
        assert torch.equal(getattr(plain.batch, field), getattr(fused.batch, field)), field
