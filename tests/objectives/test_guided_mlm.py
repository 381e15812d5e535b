from dataclasses import replace

import pytest
import torch

from fused_objectives.targets import IGNORED, capacity_for
from pretrain.config import parse
from pretrain.data.annotations import NO_UNIT
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig
from pretrain.masking.policies import POLICIES
from tests.builders import MASK, VOCABULARY, padded, random_samples
from tests.objectives.builders import annotated, ids_of, model_with, numbered, rows_of_samples
from tests.objectives.oracles import word

MANY = [30] * 300


def bare(batch, sample: int, name: str = "salient"):
    """Take the units from one sample."""
    units = torch.where(batch.segment_ids == sample, NO_UNIT, batch.units[name])
    return replace(batch, units={name: units})


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_chosen_tokens_are_those_of_a_loop_over_the_units(rate):
    objective = model_with("guided_mlm", masking={"rate": rate}).objectives["guided_mlm"]
    rows = rows_of_samples(12)
    batch = numbered(rows, ids_of(rows, first=2**33), row_length=75)
    for long in batch.lengths.topk(3).indices.tolist():
        batch = bare(batch, long)
    view = objective.corrupt(batch, 0.0)
    lost = 0
    for number in range(len(batch.sample_ids)):
        mine = batch.segment_ids == number
        identity = int(batch.sample_ids[number]), int(batch.visits[number])
        tokens, units = batch.tokens[mine].tolist(), batch.units["salient"][mine].tolist()
        text = [token not in VOCABULARY.special_ids for token in tokens]
        without = not any(unit != NO_UNIT and ordinary for unit, ordinary in zip(units, text, strict=True))
        lost += without and any(text)
        expected = []
        for position, (token, unit, ordinary) in enumerate(zip(tokens, units, text, strict=True)):
            counter, limit = (position, 0.15) if without else (unit, rate)
            drawn = word("guided_mlm", counter, *identity) < int(limit * 2**32)
            chosen = ordinary and drawn and (without or unit != NO_UNIT)
            expected.append(token if chosen else IGNORED)
        assert view.labels[mine].tolist() == expected
    assert lost >= 3 and view.tallies == {"guided_mlm/masked_at_random": lost}
    assert int(view.counts["guided_mlm"].sum()) == int((view.labels != IGNORED).sum()) > 5


def test_half_of_the_units_are_chosen_whole_and_mostly_masked():
    objective = model_with("guided_mlm").objectives["guided_mlm"]
    batch = annotated(padded(random_samples(MANY)))
    view = objective.corrupt(batch, 0.0)
    chosen, units = view.labels != IGNORED, batch.units["salient"]
    assert not chosen[units == NO_UNIT].any()
    for number in range(4):
        inside = chosen[units == number].view(len(MANY), -1)
        assert torch.equal(inside.any(1), inside.all(1))
        assert inside[:, 0].double().mean() == pytest.approx(0.5, abs=0.1)
    assert (view.tokens[chosen] == MASK).double().mean() == pytest.approx(0.8, abs=0.03)


def test_another_annotation_can_be_named():
    objective = model_with("guided_mlm", masking={"annotation": "people"}).objectives["guided_mlm"]
    assert objective.annotations == {"people": "spans"}
    batch = annotated(padded(random_samples([30])), "people")
    assert objective.corrupt(batch, 0.0).counts["guided_mlm"].sum() > 0
    assert model_with("guided_mlm").objectives["guided_mlm"].annotations == {"salient": "spans"}


def test_room_for_targets_suffices_where_units_are_rarer_than_what_is_masked_without_them():
    policy = POLICIES["guided"](parse(MaskingConfig, {"policy": "guided"}, "test"), VOCABULARY)
    assert [policy.largest_share(rate) for rate in (0.05, 0.5)] == [0.15, 0.5]
    assert POLICIES["random"](MaskingConfig(), VOCABULARY).largest_share(0.05) == 0.05
    assert capacity_for(30_000, policy.largest_share(0.05)) > 0.15 * 30_000


def test_mlm_and_guided_mlm_share_the_vocabulary_head_and_draw_apart():
    model = model_with("guided_mlm")
    assert list(model.heads) == ["vocabulary"]
    batch = annotated(padded(random_samples(MANY[:40])))
    keys = {"masking": {"policy": "guided", "rate": 0.5}}
    other = model_with("mlm", **keys).objectives["mlm"].corrupt(batch, 0.0)
    assert not torch.equal(model.objectives["guided_mlm"].corrupt(batch, 0.0).labels, other.labels)


def test_another_policy_is_refused():
    with pytest.raises(UserError, match=r"^test: objectives\.guided_mlm\.masking\.policy: input should be 'guided'"):
        model_with("guided_mlm", masking={"policy": "random"})


def test_a_decoder_is_refused_by_the_objectives_own_name():
    with pytest.raises(UserError, match=r"^objectives\.guided_mlm: 'llama' is a decoder"):
        model_with("guided_mlm", "llama")
