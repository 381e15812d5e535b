import pytest
import torch

from fused_objectives.targets import Targets
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.generator import Generator
from pretrain.objectives.base import parse_objectives
from tests.builders import lay_out, places_of, random_samples, tiny_encoder

ENCODERS = ["bert", "roberta", "electra", "modernbert", "distilbert"]


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("keys", [{"depth": 0.5, "width": 1.0, "share_embeddings": True}, {"depth": 1.0, "width": 0.5}])
def test_the_generator_is_a_masked_language_model_of_the_family_scaled(family, keys):
    encoder = tiny_encoder(family)
    generator = Generator(encoder, **{"share_embeddings": False, **keys}).eval()
    config = generator.encoder.config
    assert config.model_type == family
    assert config.num_hidden_layers == (1 if keys["depth"] == 0.5 else 2)
    assert config.hidden_size == (32 if keys["width"] == 1.0 else 16)
    assert config.hidden_size // config.num_attention_heads == 16
    samples = random_samples([5, 37, 16])
    batch = lay_out([samples])
    places = torch.cat([places_of(batch, 2), places_of(batch, 0)])
    count = torch.tensor(len(places))
    logits = generator(batch.tokens, Layout(batch), Targets(places, torch.empty(0), count))
    generator.encoder.pretrained.set_attn_implementation("eager")
    expected = [generator.encoder.pretrained(input_ids=torch.from_numpy(samples[i])[None]).logits[0] for i in (2, 0)]
    assert torch.allclose(logits, torch.cat(expected), atol=5e-5)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("shared", [True, False])
def test_token_embeddings_are_shared_as_asked_and_nothing_else_is(family, shared):
    encoder = tiny_encoder(family)
    generator = Generator(encoder, depth=0.5, width=1.0, share_embeddings=shared)
    common = {id(p) for p in generator.parameters()} & {id(p) for p in encoder.parameters()}
    embedding = encoder.backbone.get_input_embeddings().weight
    assert common == ({id(embedding)} if shared else set())
    assert id(generator.encoder.backbone.get_input_embeddings().weight) in {id(p) for p in generator.head.parameters()}


def test_sharing_embeddings_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"objectives\.rtd\.generator: share_embeddings needs width 1"):
        parse_objectives({"rtd": {"generator": {"width": 0.5}}}, "r.yaml")
