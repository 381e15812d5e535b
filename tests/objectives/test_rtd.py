from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import ElectraForPreTraining

from fused_objectives.targets import IGNORED, compact
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.objectives import rtd, scores
from tests.builders import VOCABULARY, padded, random_samples
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import COUNTED, detection_sums, gumbel_draw, labels_of, samples_of, unigram

UNSHARED = {"generator": {"embeddings": "separate"}}
SCALES = {"rtd/generator": 0.0, "rtd/discriminator": 0.0}


def gradients(model, term: str, batch) -> dict[str, torch.Tensor | None]:
    view = model.objectives["rtd"].corrupt(batch, 0.0)
    loss, _ = model({"rtd": view}, {**SCALES, term: 1.0})
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_discriminator_reads_the_generators_draws_at_masked_places_and_the_original_elsewhere(temperature):
    model = model_with("rtd", masking={"rate": 0.4}, generator={"temperature": temperature})
    rows = rows_of_samples(6)
    batch = numbered(rows, ids_of(rows), row_length=70)
    view = model.objectives["rtd"].corrupt(batch, 0.0)
    read = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.objectives["rtd"].loss(model, view)
    expected = batch.tokens.clone()
    masked = view.labels != IGNORED
    everywhere = compact(torch.ones(batch.tokens.numel(), dtype=torch.bool))
    logits = model.heads["generator"](view.tokens, Layout(batch), everywhere).view(*batch.tokens.shape, -1)
    for row, column in masked.nonzero().tolist():
        sample = int(batch.segment_ids[row, column])
        identity = int(batch.sample_ids[sample]), int(batch.visits[sample])
        position = int(batch.position_ids[row, column])
        expected[row, column] = gumbel_draw("rtd/sample", logits[row, column] / temperature, position, *identity)
    assert masked.sum() > 15
    assert torch.equal(read[-1], expected)


@torch.no_grad()
@pytest.mark.parametrize("hits", [0, 5, 10_000])
def test_labels_and_loss_are_those_of_transformers_electra_with_hits_counted_as_original(monkeypatch, hits):
    """The generator is made to guess the original at some masked places and something else at the others."""
    model = model_with("rtd", "electra", masking={"rate": 0.4})
    batch = padded(random_samples([9, 31, 17, 24]), row_length=33)
    view = model.objectives["rtd"].corrupt(batch, 0.0)
    masked = view.labels != IGNORED
    originals = view.labels[masked]
    guesses = torch.where(torch.arange(len(originals)) < hits, originals, (originals + 1 - 5) % 206 + 5)
    honest = scores.linear_cross_entropy_and_sample

    def guessing(*arguments, **options):
        return honest(*arguments, **options)._replace(tokens=guesses)

    monkeypatch.setattr(scores, "linear_cross_entropy_and_sample", guessing)
    sums = model.objectives["rtd"].loss(model, view)["rtd/discriminator"].sums

    tokens = batch.tokens.clone()
    tokens[masked] = guesses
    labels = [
        [int(token != original) for token, original in zip(row, originals, strict=True)]
        for row, originals in zip(tokens.tolist(), batch.tokens.tolist(), strict=True)
    ]
    assert sum(map(sum, labels)) == max(0, len(originals) - hits)
    electra = ElectraForPreTraining(model.encoder.config).eval()
    electra.electra = model.encoder.backbone
    electra.discriminator_predictions.load_state_dict(model.heads["detection"].state_dict())
    electra.set_attn_implementation("eager")
    loss = electra(input_ids=tokens, attention_mask=batch.real.long(), labels=torch.tensor(labels)).loss
    assert view.counts["rtd/discriminator"].tolist() == [9, 31, 17, 24]
    assert (sums.sum() / 81).item() == pytest.approx(loss.item(), rel=1e-5)


@torch.no_grad()
def test_the_generators_loss_is_that_of_its_own_masked_language_model():
    model = model_with("rtd", "bert", masking={"rate": 0.4})
    batch = padded(random_samples([9, 31, 17]), row_length=31)
    view = model.objectives["rtd"].corrupt(batch, 0.0)
    sums = model.objectives["rtd"].loss(model, view)["rtd/generator"].sums
    theirs = model.heads["generator"].encoder.pretrained
    theirs.set_attn_implementation("eager")
    loss = theirs(input_ids=view.tokens, attention_mask=batch.real.long(), labels=view.labels).loss
    assert (sums.sum() / view.counts["rtd/generator"].sum()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_every_chosen_token_is_masked_for_the_generator():
    model = model_with("rtd")
    rows = rows_of_samples(30)
    view = model.objectives["rtd"].corrupt(numbered(rows, ids_of(rows)), 0.0)
    assert (view.tokens[view.labels != IGNORED] == model.objectives["rtd"].vocabulary.mask_id).all()


def test_generator_and_discriminator_train_apart():
    model = model_with("rtd", **UNSHARED)
    rows = rows_of_samples(6)
    batch = numbered(rows, ids_of(rows))
    from_detection = gradients(model, "rtd/discriminator", batch)
    from_generator = gradients(model, "rtd/generator", batch)
    for name in from_detection:
        generators = name.startswith("heads.generator")
        idle, busy = (from_detection, from_generator) if generators else (from_generator, from_detection)
        assert idle[name] is None or not idle[name].any(), name
        assert busy[name].any() or "key.bias" in name, name  # softmax does not see the keys' bias


def test_shared_embeddings_get_a_gradient_from_both_and_nothing_else_does():
    model = model_with("rtd")
    rows = rows_of_samples(6)
    batch = numbered(rows, ids_of(rows))
    from_detection = gradients(model, "rtd/discriminator", batch)
    from_generator = gradients(model, "rtd/generator", batch)
    both = {
        name
        for name in from_detection
        if all(found[name] is not None and found[name].any() for found in (from_detection, from_generator))
    }
    assert both == {"encoder.backbone.embeddings.word_embeddings.weight"}


def test_the_terms_weigh_as_in_the_paper():
    assert model_with("rtd").objectives["rtd"].terms == {"rtd/generator": 1.0, "rtd/discriminator": 50.0}
    assert model_with("rtd", discriminator_weight=7).objectives["rtd"].terms["rtd/discriminator"] == 7.0


@torch.no_grad()
def test_draws_change_with_the_visit_and_not_with_the_layout():
    """Masking everything makes the generator blind, so that only the noise tells its samples apart."""
    model = model_with("rtd", masking={"rate": 1.0})
    samples = random_samples([20, 20])
    read = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    for batch in (padded(samples), padded(samples, visits=[1, 1]), padded(samples[::-1], ids=[1, 0])):
        model.objectives["rtd"].loss(model, model.objectives["rtd"].corrupt(batch, 0.0))
    first, second, swapped = read
    assert (first != second).sum() > 20
    assert torch.equal(swapped.flip(0), first)


@pytest.mark.parametrize("masking", [{}, {"rate": 0.2}, {"split": {"random": 0.0}}])
def test_the_generator_sees_only_mask_tokens_unless_the_recipe_says_otherwise(masking):
    split = rtd.RTDConfig.model_validate({"masking": masking}).masking.split
    assert (split.mask.at(0.5), split.random.at(0.5)) == (1.0, 0.0)


def test_with_the_corpus_own_tokens_replacements_and_losses_are_those_of_a_loop():
    model = model_with("rtd", vocabulary=COUNTED, source="unigram", masking={"rate": 0.4})
    objective = model.objectives["rtd"]
    rows = rows_of_samples(9)
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=70)
    chosen = model_with("rtd", masking={"rate": 0.4}).objectives["rtd"].corrupt(batch, 0.0).labels != IGNORED
    expected = batch.tokens.clone()
    for row, column in chosen.nonzero().tolist():
        sample = int(batch.segment_ids[row, column])
        identity = int(batch.sample_ids[sample]), int(batch.visits[sample])
        expected[row, column] = unigram("rtd/unigram", int(batch.position_ids[row, column]), *identity)
    view = objective.corrupt(batch, 0.0)
    assert torch.equal(view.tokens, expected)
    different = (view.tokens != batch.tokens).long()
    assert torch.equal(view.labels, torch.where(batch.real, different, IGNORED))
    assert view.tallies == {"rtd/positives": different.sum()}
    assert 40 < different.sum() <= chosen.sum()
    assert {term: counts.tolist() for term, counts in view.counts.items()} == {
        "rtd/discriminator": batch.lengths.tolist()
    }
    samples, labels = samples_of(replace(batch, tokens=expected)), labels_of(batch, view.labels)
    sums = objective.loss(model, view)["rtd/discriminator"].sums
    assert sums.tolist() == pytest.approx(detection_sums(model, "detection", samples, labels), rel=1e-4)


def test_a_draw_that_hits_the_original_is_no_replacement():
    only = replace(VOCABULARY, counts=np.arange(VOCABULARY.size) == 77)
    sample = random_samples([40])[0]
    sample[1:20] = 77
    objective = model_with("rtd", vocabulary=only, source="unigram", masking={"rate": 1.0}).objectives["rtd"]
    view = objective.corrupt(padded([sample]), 0.0)
    assert (view.tokens[0, 1:-1] == 77).all()
    assert view.labels[0].tolist() == [0] * 20 + [int(token != 77) for token in sample[20:-1]] + [0]


def test_with_the_corpus_own_tokens_there_is_no_generator_and_no_mask_token_is_needed():
    model = model_with("rtd", vocabulary=replace(VOCABULARY, mask_id=None), source="unigram")
    assert model.objectives["rtd"].terms == {"rtd/discriminator": 1.0}
    assert list(model.heads) == ["detection"]
    assert list(model.components()) == ["backbone", "head/detection"] and model.trained_by(["rtd"]) == {
        "backbone",
        "head/detection",
    }


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"generator": {"depth": 0.3}}, "generator"),
        ({"discriminator_weight": 10}, "discriminator_weight"),
        ({"masking": {"split": {"mask": 0.5}}}, "masking.split"),
    ],
    ids=str,
)
def test_keys_of_a_generator_that_is_not_there_are_refused(keys, named):
    with pytest.raises(UserError, match=rf"^test: objectives\.rtd: '{named}' goes with source generator"):
        model_with("rtd", source="unigram", **keys)
    config = rtd.RTDConfig(source="unigram")
    assert rtd.RTDConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config
