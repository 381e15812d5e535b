import pytest
import torch

from fused_objectives.targets import Targets
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.disentangled import DisentangledEmbedding
from pretrain.model.generator import Generator, GeneratorConfig
from pretrain.objectives.base import parse_objectives
from tests.builders import lay_out, places_of, random_samples, tiny_encoder

ENCODERS = ["bert", "roberta", "electra", "modernbert", "distilbert"]
WITH_A_WIDTH_OF_THEIR_OWN = ["electra", "albert"]
_EMBEDDINGS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_EMBEDDINGS["embedding_size"] = 24


def generator_of(encoder, **keys) -> Generator:
    return Generator(encoder, GeneratorConfig(**keys)).eval()


def token_embedding(encoder) -> torch.nn.Module:
    return encoder.backbone.get_input_embeddings()


def assert_a_masked_language_model_as_transformers_has_it(generator):
    samples = random_samples([5, 37, 16])
    batch = lay_out([samples])
    places = torch.cat([places_of(batch, 2), places_of(batch, 0)])
    count = torch.tensor(len(places))
    logits = generator(batch.tokens, Layout(batch), Targets(places, torch.empty(0), count))
    generator.encoder.pretrained.set_attn_implementation("eager")
    expected = [generator.encoder.pretrained(input_ids=torch.from_numpy(samples[i])[None]).logits[0] for i in (2, 0)]
    assert torch.allclose(logits, torch.cat(expected), atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("keys", [{"depth": 0.5, "embeddings": "shared"}, {"depth": 1.0, "width": 0.5}])
def test_the_generator_is_a_masked_language_model_of_the_family_scaled(family, keys):
    generator = generator_of(tiny_encoder(family), **{"embeddings": "separate", **keys})
    config = generator.encoder.config
    assert config.model_type == family
    assert config.num_hidden_layers == (1 if keys["depth"] == 0.5 else 2)
    assert config.hidden_size == (32 if "width" not in keys else 16)
    assert config.hidden_size // config.num_attention_heads == 16
    assert_a_masked_language_model_as_transformers_has_it(generator)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("kind", ["shared", "separate", "disentangled"])
def test_token_embeddings_are_shared_as_asked_and_nothing_else_is(family, kind):
    encoder = tiny_encoder(family)
    embedding = token_embedding(encoder).weight
    generator = generator_of(encoder, embeddings=kind)
    common = {id(p) for p in generator.parameters()} & {id(p) for p in encoder.parameters()}
    assert common == ({id(embedding)} if kind == "shared" else set())
    assert isinstance(token_embedding(encoder), DisentangledEmbedding) == (kind == "disentangled")
    assert (token_embedding(generator.encoder).weight is embedding) == (kind != "separate")
    assert id(token_embedding(generator.encoder).weight) in {id(p) for p in generator.head.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_A_WIDTH_OF_THEIR_OWN)
@pytest.mark.parametrize("kind", ["shared", "disentangled"])
def test_a_narrow_generator_uses_the_backbones_embeddings_where_they_have_a_width_of_their_own(family, kind):
    encoder = tiny_encoder(family, overrides=_EMBEDDINGS)
    embedding = token_embedding(encoder).weight
    generator = generator_of(encoder, width=0.5, embeddings=kind)
    config = generator.encoder.config
    assert (config.hidden_size, config.embedding_size, config.intermediate_size) == (16, 24, 24)
    assert token_embedding(generator.encoder).weight is embedding and embedding.shape[1] == 24
    assert_a_masked_language_model_as_transformers_has_it(generator)


@pytest.mark.parametrize("kind", ["shared", "disentangled"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_using_embeddings_of_another_width_is_refused(family, kind):
    reason = rf"objectives\.rtd\.generator\.embeddings: '{kind}' with width 0.5 .* which '{family}' has not"
    with pytest.raises(UserError, match=reason):
        generator_of(tiny_encoder(family), width=0.5, embeddings=kind)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"embeddings": "tangled"}, r"embeddings: .*'shared', 'separate' or 'disentangled'"),
        ({"temperature": 0.0}, r"temperature: "),
        ({"share_embeddings": True}, r"share_embeddings"),
    ],
)
def test_wrong_keys_are_refused(keys, reason):
    with pytest.raises(UserError, match=rf"objectives\.rtd\.generator\.{reason}") as refusal:
        parse_objectives({"rtd": {"generator": keys}}, "r.yaml")
    assert len(str(refusal.value).splitlines()) == 1
