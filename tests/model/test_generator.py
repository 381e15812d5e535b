import pytest
import torch
from scipy import stats

from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.generator import Generator, sample_tokens
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
    logits = generator(batch.tokens, Layout(batch), places)
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


def test_samples_follow_the_softmax():
    logits = torch.tensor([[2.0, -1.0, 0.5, -torch.inf, 1.0, 0.0, -3.0]])
    draws = 40_009
    noise = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    counts = sample_tokens(logits.expand(draws, -1), noise).bincount(minlength=7)
    assert counts[3] == 0
    possible = torch.arange(7) != 3
    expected = logits[0].double().softmax(0)[possible] * draws
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-4


def test_each_place_draws_from_its_own_distribution():
    logits = torch.full((5, 11), -torch.inf)
    logits[torch.arange(5), torch.tensor([3, 0, 10, 7, 3])] = 0.0
    noise = torch.tensor([0.0, 0.999999, 0.5, 0.0, 1 - 2**-32], dtype=torch.float64)
    assert sample_tokens(logits, noise).tolist() == [3, 0, 10, 7, 3]


@pytest.mark.parametrize("noise", [0.0, 2**-32, 1 - 2**-25, 1 - 2**-32])
def test_a_token_of_probability_zero_is_never_drawn(noise):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(301, 67, generator=generator) * 3
    impossible = torch.rand(301, 67, generator=generator) < 0.5
    impossible[:, 0] = impossible[:, -1] = True
    impossible[:, 33] = False
    logits[impossible] = -torch.inf
    drawn = sample_tokens(logits, torch.full((301,), noise, dtype=torch.float64))
    assert (logits.softmax(-1).gather(1, drawn[:, None]) > 0).all()


def test_no_places_draw_nothing_and_broken_logits_give_a_token_that_exists():
    assert sample_tokens(torch.empty(0, 7), torch.empty(0, dtype=torch.float64)).shape == (0,)
    drawn = sample_tokens(torch.full((3, 7), torch.nan), torch.full((3,), 0.5, dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < 7)).all()


def test_no_gradient_flows_through_the_draw():
    logits = torch.randn(3, 7, requires_grad=True)
    assert not sample_tokens(logits, torch.rand(3)).requires_grad


def test_sharing_embeddings_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"objectives\.rtd\.generator: share_embeddings needs width 1"):
        parse_objectives({"rtd": {"generator": {"width": 0.5}}}, "r.yaml")
