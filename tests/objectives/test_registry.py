"""What holds of every objective that is registered, whatever it does."""

from dataclasses import fields

import pytest
import torch

from pretrain.errors import UserError
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives import REGISTRY
from tests.builders import TINY, TINY_PAIRED, VOCABULARY, lay_out, padded, random_samples
from tests.objectives.builders import annotated, ids_of, model_with, numbered, rows_of_samples

ROWS = 16


OTHERS = [("rtd", {"source": "unigram"}), ("std", {"generator_weight": 0.5})]
CONFIGURATIONS = [*((name, {}) for name in sorted(REGISTRY)), *OTHERS]


@pytest.fixture(params=CONFIGURATIONS, ids=lambda pair: "-".join([pair[0], *pair[1]]), scope="module")
def configuration(request) -> tuple[str, dict]:
    """An objective and its keys: those registered as they are, and those whose heads depend on the keys."""
    return request.param


@pytest.fixture(scope="module")
def name(configuration) -> str:
    return configuration[0]


@pytest.fixture(params=["bert", "modernbert", "llama", "t5", "bart"], scope="module")
def model(configuration, request) -> MultiObjectiveModel:
    """The objective on each backbone that it fits."""
    name, keys = configuration
    try:
        return model_with(name, request.param, **keys)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def objective(model, name):
    return model.objectives[name]


@pytest.fixture(scope="module")
def whole(objective):
    """A global batch of whole groups, packed."""
    rows = rows_of_samples(ROWS)
    assert ROWS % objective.rows_together == 0
    return numbered(rows, ids_of(rows))


def scales_of(objective, counts: dict[str, torch.Tensor]) -> dict[str, float]:
    """What the trainer multiplies a term's sums with, for these counts of the whole step."""
    return {term: weight / max(1, int(counts[term].sum())) for term, weight in objective.terms.items()}


def gradients(model: MultiObjectiveModel, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-5 * largest)


@torch.no_grad()
def results(model: MultiObjectiveModel, batch) -> dict[tuple[str, int], tuple[float, int]]:
    """Return (term, sample id) → (sum of losses, number of targets)."""
    *_, objective = model.objectives.values()
    view = objective.corrupt(batch, 0.25)
    losses = objective.loss(model, view)
    return {
        (term, int(sample)): (float(total), int(count))
        for term in objective.terms
        for sample, total, count in zip(batch.sample_ids, losses[term].sums, view.counts[term], strict=True)
    }


def assert_same_results(ours: dict, theirs: dict) -> None:
    assert ours.keys() <= theirs.keys()
    for key, (total, count) in ours.items():
        assert count == theirs[key][1], key
        assert total == pytest.approx(theirs[key][0], rel=1e-4, abs=1e-4), key


def test_terms_counts_and_sums_have_the_same_keys_and_one_number_a_sample(model, objective, name, whole):
    view = objective.corrupt(whole, 0.0)
    losses = objective.loss(model, view)
    assert set(objective.terms) == set(view.counts) == {term for term in losses if losses[term].total is not None}
    assert all(term.split("/")[0] == name for term in losses)
    assert all(weight > 0 for weight in objective.terms.values())
    assert set(objective.fractions) <= set(view.tallies) | set(losses)
    assert set(objective.fractions.values()) <= set(objective.terms)
    for term in objective.terms:
        total, sums = losses[term]
        assert sums.shape == view.counts[term].shape == whole.sample_ids.shape
        assert total.shape == () and total.requires_grad and not sums.requires_grad
        assert total.dtype == sums.dtype == torch.float32
        assert total.item() == pytest.approx(float(sums.sum()), rel=1e-5)
        assert view.counts[term].dtype == torch.int64
        assert (view.counts[term] >= 0).all() and view.counts[term].sum() > 0
        assert sums.isfinite().all() and (sums >= 0).all() and sums.sum() > 0
        assert (sums[view.counts[term] == 0] == 0).all()


def test_a_batch_without_samples_has_loss_zero_and_zero_gradients(model, objective, name):
    batch = annotated(lay_out([[] for _ in range(objective.rows_together)], row_length=11))
    view = objective.corrupt(batch, 0.0)
    loss, sums = model({name: view}, scales_of(objective, view.counts))
    assert loss.item() == 0.0
    assert all(total.shape == (0,) for total in sums.values())
    assert all((gradient == 0).all() for gradient in gradients(model, loss))


def test_samples_without_a_target_add_no_loss_and_no_gradient(model, objective, name):
    """A lone [CLS] is nothing to hide, to predict or to compare."""
    if objective.rows_are_units:
        pytest.skip("a row has targets whatever its samples are")
    batch = annotated(padded(random_samples([1])))
    view = objective.corrupt(batch, 0.0)
    if all(torch.equal(counts, batch.lengths) for counts in view.counts.values()):
        pytest.skip("every token is a target")
    idle = [term for term in objective.terms if view.counts[term].sum() == 0]
    assert idle
    scales = {term: 1.0 if term in idle else 0.0 for term in objective.terms}
    loss, _ = model({name: view}, scales)
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(model, loss))


def test_a_samples_sum_does_not_depend_on_the_layout_of_its_row(model, objective, whole):
    expected = results(model, whole)
    rows = rows_of_samples(ROWS)
    step = 1 if objective.rows_are_units else -1
    backwards = numbered([row[::step] for row in rows], [row[::step] for row in ids_of(rows)], row_length=97)
    assert_same_results(results(model, backwards), expected)


def test_a_samples_sum_does_not_depend_on_its_row_mates(model, objective, whole):
    if objective.rows_together > 1:
        pytest.skip("samples of a group are compared with each other")
    if objective.rows_are_units:
        pytest.skip("a row's first sample decides what the row draws")
    expected = results(model, whole)
    rows = rows_of_samples(ROWS)
    samples, numbers = [s for row in rows for s in row], [n for row in ids_of(rows) for n in row]
    assert_same_results(results(model, numbered([[s] for s in samples], [[n] for n in numbers])), expected)
    mates = random_samples([13, 7], seed=77)
    for chosen in (0, 5, len(samples) - 1):
        ours = results(model, numbered([[samples[chosen]]], [[numbers[chosen]]]))
        assert_same_results(ours, expected)
        among = numbered([[mates[0], samples[chosen], mates[1]]], [[901, numbers[chosen], 902]])
        ours = {key: value for key, value in results(model, among).items() if key[1] < 900}
        assert_same_results(ours, expected)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_losses_and_gradients_add_up_over_micro_batches(model, objective, name, whole, micro_batches):
    size = max(ROWS // micro_batches, objective.rows_together)
    counts = objective.corrupt(whole, 0.25).counts
    scales = scales_of(objective, counts)
    loss, sums = model({name: objective.corrupt(whole, 0.25)}, scales)
    expected = gradients(model, loss)
    rows = rows_of_samples(ROWS)
    numbers = ids_of(rows)
    total, parts, found = 0.0, {}, [torch.zeros_like(g) for g in expected]
    for start in range(0, ROWS, size):
        part = slice(start, start + size)
        batch = numbered(rows[part], numbers[part], first_row=start)
        partial, partial_sums = model({name: objective.corrupt(batch, 0.25)}, scales)
        found = [a + b for a, b in zip(found, gradients(model, partial), strict=True)]
        total += partial.item()
        for term, values in partial_sums.items():
            parts.setdefault(term, []).append(values)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for term, values in sums.items():
        assert torch.allclose(torch.cat(parts[term]), values, rtol=1e-4, atol=1e-4)
    assert_close(found, expected)


def test_a_weight_scales_its_samples_part_of_loss_and_gradient(model, objective, name, whole):
    view = objective.corrupt(whole, 0.25)
    scales = scales_of(objective, view.counts)
    samples = len(whole.sample_ids)
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(0)) * 2
    weights[::3] = 0.0
    loss, sums = model({name: view}, scales, {name: weights})
    expected = sum(scale * float((weights * sums[term]).sum()) for term, scale in scales.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = gradients(model, loss)
    halves = [weights.clone(), weights.clone()]
    halves[0][samples // 2 :] = 0
    halves[1][: samples // 2] = 0
    parts = [gradients(model, model({name: view}, scales, {name: half})[0]) for half in halves]
    assert_close([a + b for a, b in zip(*parts, strict=True)], found)
    nothing, _ = model({name: view}, scales, {name: torch.zeros(samples)})
    assert all((gradient == 0).all() for gradient in gradients(model, nothing))


def test_a_weighted_gradient_is_that_of_the_sample_alone(model, objective, name, whole):
    if objective.rows_together > 1:
        pytest.skip("samples of a group couple: there is no gradient of one sample")
    scales = dict.fromkeys(objective.terms, 1.0)
    rows = rows_of_samples(ROWS)
    samples = [s for row in rows for s in row]
    starts = [row[0] for row in ids_of(rows)]  # what a row has as a unit, its first sample has
    chosen = max(starts if objective.rows_are_units else range(len(samples)), key=lambda i: len(samples[i]))
    weights = torch.zeros(len(samples))
    weights[chosen] = 1.0
    ours = gradients(model, model({name: objective.corrupt(whole, 0.25)}, scales, {name: weights})[0])
    alone = numbered([[samples[chosen]]], [[chosen]])
    assert_close(ours, gradients(model, model({name: objective.corrupt(alone, 0.25)}, scales)[0]))


def test_corruption_is_the_same_in_any_layout_and_leaves_the_batch_as_it_was(objective, whole):
    rows = rows_of_samples(ROWS)
    samples = [[s] for row in rows for s in row]
    alone = numbered(samples, ids_of(samples))
    before = whole.tokens.clone()
    views = [objective.corrupt(batch, 0.25) for batch in (whole, alone, whole)]
    assert torch.equal(whole.tokens, before)
    batches, compared = [view.batch for view in views], 0  # an edit lays a batch out anew
    for field in ("segment_ids", "position_ids"):
        assert torch.equal(*(getattr(batch, field)[batch.real] for batch in batches[:2])), field
    assert torch.equal(batches[0].lengths, batches[1].lengths)
    for field in fields(views[0]):
        values = [getattr(view, field.name) for view in views]
        if isinstance(values[0], torch.Tensor) and values[0].shape == batches[0].tokens.shape:
            assert torch.equal(values[0][batches[0].real], values[1][batches[1].real]), field.name
            assert torch.equal(values[0], values[2]), field.name
            compared += 1
        elif objective.paired and isinstance(values[0], torch.Tensor):  # a row is a sample
            assert all(torch.equal(values[0], value) for value in values[1:]), field.name
            compared += 1
    assert compared >= 1
    if objective.rows_together == 1 and not objective.rows_are_units:
        assert all(torch.equal(views[0].counts[term], views[1].counts[term]) for term in objective.terms)


def test_corruption_never_touches_special_tokens_or_padding(objective):
    samples = random_samples([30] * 40, seed=3)
    batch = annotated(lay_out([samples[i : i + 2] for i in range(0, 40, 2)], row_length=71))
    special = torch.isin(batch.tokens, torch.from_numpy(VOCABULARY.special_ids)) | ~batch.real
    view = objective.corrupt(batch, 0.0)
    if objective.paired:
        kept = torch.isin(view.tokens, torch.from_numpy(VOCABULARY.special_ids[1:3]))
        expected = [batch.tokens[special & (batch.segment_ids == number)] for number in range(len(samples))]
        assert torch.equal(view.tokens[kept], torch.cat(expected))
        assert torch.equal(view.tokens == VOCABULARY.pad_id, ~view.real)
        return
    if not torch.equal(view.batch.segment_ids, batch.segment_ids):  # tokens moved
        for number in range(len(samples)):
            tokens = view.tokens[view.batch.segment_ids == number].tolist()
            assert [token for token in tokens if token in VOCABULARY.special_ids[:3]] == [tokens[0], tokens[-1]]
            assert (tokens[0], tokens[-1]) == (samples[number][0], samples[number][-1])
        assert (view.tokens[~view.batch.real] == VOCABULARY.pad_id).all()
        return
    assert torch.equal(view.tokens[special], batch.tokens[special])
    assert not torch.isin(view.tokens[~special], torch.from_numpy(VOCABULARY.special_ids[:3])).any()


def test_heads_are_those_declared_and_get_a_gradient(model, objective, name, whole):
    assert set(model.heads) == {head for each in model.objectives.values() for head in each.heads}
    assert set(objective.heads) <= set(model.heads)
    view = objective.corrupt(whole, 0.0)
    loss, _ = model({name: view}, scales_of(objective, view.counts))
    components = model.components()
    trained = [p for component in model.trained_by([name]) for p in components[component]]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)


def test_sums_are_float32_under_autocast_and_with_16_bit_weights(name):
    for family in ("bert", "llama", "t5", "bart"):
        try:
            model = model_with(name, family)
        except UserError:
            continue
        rows = rows_of_samples(8)
        view = model.objectives[name].corrupt(numbered(rows, ids_of(rows)), 0.0)
        model.requires_grad_(False)
        exact = model.objectives[name].loss(model, view)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.objectives[name].loss(model, view)
        model.bfloat16()
        narrow = model.objectives[name].loss(model, view)
        for term in exact:
            for sums in (cast[term].sums, narrow[term].sums):
                assert sums.dtype == torch.float32 and sums.isfinite().all()
                if not REGISTRY[name].follows:  # what those do turns on hard decisions
                    assert float(sums.sum()) == pytest.approx(float(exact[term].sums.sum()), rel=0.1)


def test_every_tiny_family_trains_on_every_objective_that_accepts_it(name):
    rows = [[sample] for row in rows_of_samples(8) for sample in row][:8]
    accepted = []
    for family in (*TINY, *TINY_PAIRED):
        try:
            model = model_with(name, family)
        except UserError as error:
            assert str(error).startswith("objectives.") and "\n" not in str(error)
            continue
        view = model.objectives[name].corrupt(numbered(rows, ids_of(rows)), 0.0)
        loss, _ = model({name: view}, scales_of(model.objectives[name], view.counts))
        loss.backward()
        assert loss.isfinite() and loss > 0
        accepted.append(family)
    assert ("t5" if REGISTRY[name].paired else "bert") in accepted


def test_an_unknown_key_of_an_objective_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=rf"^test: objectives\.{name}\.no_such_key: unknown key"):
        model_with(name, no_such_key=1)
