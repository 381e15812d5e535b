import pytest
import torch
import torch.nn.functional as F

from fused_objectives.backend import INTERPRETED
from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import VOCABULARY, lay_out, padded, random_samples, tiny_encoder
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


def with_generator(**keys) -> MultiObjectiveModel:
    recipe = {"std": {"generator_weight": 0.5, **keys}, "rtd": {"generator": {"embeddings": "separate"}}}
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed=1)
    return MultiObjectiveModel(tiny_encoder("bert"), objectives).eval()


@torch.no_grad()
def test_the_generator_is_to_restore_what_stood_at_the_swapped_places():
    model, rows = with_generator(rate=0.5), rows_of_samples(7)
    batch = numbered(rows, ids_of(rows), row_length=70)
    view = model.objectives["std"].corrupt(batch, 0.0)
    losses, generator = model.objectives["std"].loss(model, view), model.heads["generator"]
    expected, moved = [], []
    for number, sample in enumerate(sample for row in rows for sample in row):
        tokens = view.tokens[batch.segment_ids == number]
        alone = padded([tokens.numpy()])
        logits = generator.head(generator.encoder(alone.tokens, Layout(alone)))[0]
        places = [place for place, original in enumerate(sample.tolist()) if original != int(tokens[place])]
        expected.append(sum(float(F.cross_entropy(logits[place], torch.tensor(sample[place]))) for place in places))
        moved.append(len(places))
    assert sum(moved) > 20
    assert view.counts["std/generator"].tolist() == moved
    assert losses["std/generator"].sums.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.equal(losses["std"].sums, with_generator(rate=0.5).objectives["std"].loss(model, view)["std"].sums)


def test_what_the_generator_restores_trains_it_and_the_discriminator_gives_it_no_gradient():
    model, batch = with_generator(), padded(random_samples([60, 31]))
    view = model.objectives["std"].corrupt(batch, 0.0)
    assert model.trained_by(["std"]) == {"backbone", "generator", "head/std_detection"}
    found = []
    for discriminator in (0.0, 0.7):
        model.zero_grad(set_to_none=True)
        model({"std": view}, {"std/generator": 0.3, "std": discriminator})[0].backward()
        found.append([p.grad for p in model.heads["generator"].parameters()])
    assert all(torch.equal(one, other) and one.abs().sum() > 0 for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("others", [{}, {"rtd": {"source": "unigram"}}], ids=str)
def test_a_generator_that_nobody_trains_cannot_restore(others):
    objectives = build_objectives(parse_objectives({"std": {"generator_weight": 1}, **others}, "test"), VOCABULARY, 1)
    with pytest.raises(UserError, match=r"^objectives\.std\.generator_weight: no objective .*; add rtd, or leave it"):
        MultiObjectiveModel(tiny_encoder("bert"), objectives)


def test_the_discriminators_weight_is_that_of_the_term():
    assert model_with("std", discriminator_weight=7).objectives["std"].terms == {"std": 7.0}
