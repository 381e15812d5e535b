"""Disentangled embeddings against two explicit matrices in plain torch."""

import copy

import pytest
import torch
from torch.func import functional_call

from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.classifier import sequence_classifier
from pretrain.model.disentangled import DisentangledEmbedding, folded
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import PAD, VOCABULARY, lay_out, random_samples, tiny_encoder
from tests.objectives.builders import model_with

UNTIED = {"tie_word_embeddings": False}
OWN_PART = "encoder.backbone.embeddings.word_embeddings"
OF_THE_GENERATOR = "heads.generator.encoder.backbone.embeddings.word_embeddings.weight"
SCALES = {"rtd/generator": 0.02, "rtd/discriminator": 0.3}


def build(family: str, kind: str, others: dict | None = None, **generator) -> MultiObjectiveModel:
    """Return a model of ``rtd`` and others, whose weights do not depend on the kind of embeddings."""
    recipe = {**(others or {}), "rtd": {"masking": {"rate": 0.4}, "generator": {"embeddings": kind, **generator}}}
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MultiObjectiveModel(tiny_encoder(family), objectives).eval()


def batch_of(seed: int = 0):
    samples = random_samples([5, 37, 3, 16, 17, 1], seed=seed)
    return lay_out([samples[:2], samples[2:5], samples[5:]])


def views_of(model, seed: int = 0):
    return {"rtd": model.objectives["rtd"].corrupt(batch_of(seed), 0.0)}


def losses_of(model, seed: int = 0):
    return model.objectives["rtd"].loss(model, views_of(model, seed)["rtd"])


def gradients(model, total) -> dict[str, torch.Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


def separated(model) -> None:
    """Move the part of the backbone away from zero, as training does."""
    with torch.no_grad():
        delta = model.encoder.backbone.get_input_embeddings().delta.weight
        delta.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(3))
        delta[PAD] = 0


def hidden_of(encoder, batch) -> torch.Tensor:
    return encoder(batch.tokens, Layout(batch))[batch.real]


@pytest.mark.parametrize(("family", "keys"), [("bert", {"depth": 0.5}), ("electra", {"width": 0.5})])
def test_training_is_that_of_two_explicit_matrices(family, keys):
    model, plain = build(family, "disentangled", **keys), build(family, "shared", **keys)
    start = plain.encoder.backbone.get_input_embeddings()
    plain.encoder.backbone.set_input_embeddings(copy.deepcopy(start))  # whose matrix is another one in every step
    names = plain.named_parameters(remove_duplicate=False)
    places = [name for name, each in names if each is start.weight]
    rest = {name: each for name, each in plain.named_parameters() if each is not start.weight}
    del rest[OWN_PART + ".weight"]
    common = start.weight.detach().clone().requires_grad_()
    own = torch.zeros_like(common, requires_grad=True)
    oracles = {**rest, OWN_PART + ".delta.weight": own, OF_THE_GENERATOR: common}
    assert oracles.keys() == dict(model.named_parameters()).keys()
    optimizers = [torch.optim.AdamW(each, lr=0.01, weight_decay=0.1) for each in (oracles.values(), model.parameters())]
    for step in range(3):
        matrices = {OWN_PART + ".weight": common.detach() + own, **dict.fromkeys(places, common)}
        arguments = views_of(plain, step), SCALES
        expected, _ = functional_call(plain, {**rest, **matrices}, arguments, tie_weights=False)
        found, _ = model(*arguments)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for optimizer, loss in zip(optimizers, (expected, found), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, oracles[name].grad, rtol=1e-5, atol=1e-8, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, oracles[name], rtol=1e-5, atol=1e-7, msg=name)
    assert own.detach().abs().max() > 0.01 and not own[PAD].any()


def test_the_discriminators_loss_has_no_gradient_by_the_generators_embedding_and_a_whole_one_by_its_own():
    model, shared = build("bert", "disentangled"), build("bert", "shared")
    found = gradients(model, losses_of(model)["rtd/discriminator"].total)
    assert all(each is None for name, each in found.items() if name.startswith("heads.generator"))
    expected = gradients(shared, losses_of(shared)["rtd/discriminator"].total)[OWN_PART + ".weight"]
    torch.testing.assert_close(found[OWN_PART + ".delta.weight"], expected)


@pytest.mark.parametrize("kind", ["shared", "separate", "disentangled"])
def test_the_discriminators_loss_changes_no_bit_of_the_generators_gradients_but_of_a_shared_embedding(kind):
    model = build("electra", kind)
    if kind == "disentangled":
        separated(model)
    generator = {id(each): name for name, each in model.heads["generator"].named_parameters()}
    both, alone = [], []
    for found, terms in ((both, ("rtd/generator", "rtd/discriminator")), (alone, ("rtd/generator",))):
        losses = losses_of(model)
        model.zero_grad(set_to_none=True)
        sum(losses[term].total for term in terms).backward()
        found += [(generator[id(each)], each.grad) for each in model.heads["generator"].parameters()]
    changed = {name for (name, one), (_, other) in zip(both, alone, strict=True) if not torch.equal(one, other)}
    assert changed == ({"encoder.backbone.embeddings.word_embeddings.weight"} if kind == "shared" else set())


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "electra", "modernbert", "distilbert"])
def test_a_folded_model_computes_the_same_and_the_training_model_stays(family):
    model = build(family, "disentangled")
    separated(model)
    before = {name: (id(each), each.clone()) for name, each in model.named_parameters()}
    batch, embedding = batch_of(), model.encoder.backbone.get_input_embeddings()
    expected = hidden_of(model.encoder, batch)
    whole = folded(model.encoder.pretrained)
    assert model.encoder.backbone.get_input_embeddings() is embedding
    assert type(whole.get_input_embeddings()) is torch.nn.Embedding
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    backbone = {name for name, _ in model.encoder.backbone.named_parameters()} - {"delta.weight"}
    kept = {id(each) for each in whole.base_model.parameters()}
    assert len(kept & {id(each) for each in model.encoder.backbone.parameters()}) == len(backbone) - 1

    twin = copy.copy(model.encoder)
    twin._modules = {**model.encoder._modules, "backbone": whole.base_model}
    torch.testing.assert_close(hidden_of(twin, batch), expected, rtol=1e-6, atol=1e-6)
    whole.get_input_embeddings().weight.zero_()
    after = {name: (id(each), each) for name, each in model.named_parameters()}
    assert all(after[name][0] == old[0] and torch.equal(after[name][1], old[1]) for name, old in before.items())


@torch.no_grad()
def test_an_end_tasks_classifier_has_the_folded_embedding():
    model = model_with("end_task")
    embedding = DisentangledEmbedding(model.encoder.backbone.get_input_embeddings())
    model.encoder.backbone.set_input_embeddings(embedding)
    separated(model)
    classifier = sequence_classifier(model.encoder, model.heads["end_task"])
    assert torch.equal(classifier.get_input_embeddings().weight, embedding.common.weight + embedding.delta.weight)


def test_a_model_without_disentangled_embeddings_is_folded_already():
    pretrained = build("bert", "shared").encoder.pretrained
    assert folded(pretrained) is pretrained


def test_an_embedding_of_nothing_is_empty():
    embedding = DisentangledEmbedding(torch.nn.Embedding(7, 3, padding_idx=2))
    assert embedding(torch.empty(0, 5, dtype=torch.int64)).shape == (0, 5, 3)
    assert embedding.delta.padding_idx == 2 and not embedding.delta.weight.any()


@pytest.mark.parametrize("order", [("mlm", "rtd"), ("rtd", "mlm")])
def test_a_trained_vocabulary_head_must_not_be_tied_to_disentangled_embeddings(order):
    recipe = {"mlm": {}, "rtd": {"generator": {"embeddings": "disentangled"}}}
    recipe = {name: recipe[name] for name in order}
    objectives = build_objectives(parse_objectives(recipe, "test"), VOCABULARY, seed=1)
    with pytest.raises(UserError, match=r"objectives\.rtd\.generator\.embeddings: 'disentangled' .*tie_word_embedd"):
        MultiObjectiveModel(tiny_encoder("bert"), objectives)
    model = MultiObjectiveModel(tiny_encoder("bert", overrides=UNTIED), objectives)
    listed = [id(each) for parameters in model.components().values() for each in parameters]
    assert sorted(listed) == sorted({id(each) for each in model.parameters()})
    embedding = model.encoder.backbone.get_input_embeddings()
    assert any(each is embedding.delta.weight for each in model.components()["backbone"])
    assert any(each is embedding.common.weight for each in model.components()["generator"])
