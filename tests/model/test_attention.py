import pytest
import torch

from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder, ModelConfig, backbone_config, build_encoder
from tests.builders import TINY, VOCABULARY, lay_out, padded, places_of, random_samples, tiny_encoder

PACKING = ["bert", "roberta", "electra", "modernbert", "distilbert", "llama", "gpt2"]
LENGTHS = [5, 37, 1, 16, 17, 2, 23, 9]  # shorter and longer than the sliding window, and around a block's size


@pytest.fixture(scope="module", params=PACKING)
def encoder(request) -> Encoder:
    return tiny_encoder(request.param)


def hidden_states(encoder: Encoder, batch, tokens=None, **layout) -> torch.Tensor:
    """Return ``[rows × length, hidden]``."""
    layout = Layout(batch, **{"causal": encoder.causal_only, **layout})
    return encoder(batch.tokens if tokens is None else tokens, layout).flatten(0, 1)


def scrambled() -> tuple:
    """A batch of two rows and a half-empty third, and its samples."""
    samples = random_samples(LENGTHS)
    return lay_out([[samples[i] for i in (1, 0, 2)], [samples[i] for i in (3, 4, 5)], [], samples[6:]]), [
        samples[i] for i in (1, 0, 2, 3, 4, 5, 6, 7)
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", PACKING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_hidden_states_equal_transformers_own_on_each_sample_alone(family, implementation):
    batch, samples = scrambled()
    encoder = tiny_encoder(family)
    ours = hidden_states(encoder, batch)
    original = encoder.pretrained
    original.set_attn_implementation(implementation)
    for number, sample in enumerate(samples):
        theirs = original.base_model(input_ids=torch.from_numpy(sample)[None]).last_hidden_state[0]
        assert torch.allclose(ours[places_of(batch, number)], theirs, atol=2e-5), (number, len(sample))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_row_mates_their_text_their_order_or_padding(encoder):
    samples = random_samples(LENGTHS)
    others = random_samples([3, 11, 29, 8], seed=9)
    mine = samples[1]
    alone = hidden_states(encoder, padded([mine]))
    rows = {
        "first": [[mine, samples[0], samples[3]]],
        "last": [[samples[0], samples[3], mine]],
        "other mates": [[others[0], others[1], mine, others[2]]],
        "padding": [[others[2]], [mine], [others[3]]],
        "long row": [[others[3], mine]],
    }
    for name, layout in rows.items():
        batch = lay_out(layout, row_length=150)
        number = next(i for i, s in enumerate(s for row in layout for s in row) if s is mine)
        assert torch.allclose(hidden_states(encoder, batch)[places_of(batch, number)], alone, atol=1e-5), name


def test_no_gradient_flows_between_samples_of_a_row(encoder):
    batch, samples = scrambled()
    states = encoder.backbone.get_input_embeddings()(batch.tokens).detach().requires_grad_()
    layout = Layout(batch, causal=encoder.causal_only)
    keys = {"use_cache": False} if encoder.causal_only else {}
    hidden = encoder.backbone(
        inputs_embeds=states, position_ids=batch.position_ids + encoder.first_position, layout=layout, **keys
    ).last_hidden_state
    for number in range(len(samples)):
        places = places_of(batch, number)
        weights = torch.randn(len(places), hidden.shape[-1], generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((hidden.flatten(0, 1)[places] * weights).sum(), states, retain_graph=True)
        reached = gradient.abs().sum(-1).flatten()
        assert (reached[places] > 0).all()
        reached[places] = 0
        assert (reached == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_causal_attention_on_an_encoder_equals_a_causal_mask(family):
    encoder = tiny_encoder(family)
    batch = padded(random_samples([37, 37]))
    ours = hidden_states(encoder, batch, causal=True).view(2, 37, -1)
    steps = torch.arange(37)
    distance = steps[:, None] - steps[None, :]
    minimum = torch.finfo(torch.float32).min

    def additive(allowed):
        return torch.where(allowed, 0.0, minimum)[None, None].expand(2, 1, 37, 37)

    whole = additive(distance >= 0)
    mask = whole
    if family == "modernbert":
        half = encoder.config.local_attention // 2
        mask = {"full_attention": whole, "sliding_attention": additive((distance >= 0) & (distance <= half))}
    encoder.pretrained.set_attn_implementation("eager")
    theirs = encoder.backbone(input_ids=batch.tokens, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours, theirs, atol=2e-5)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_state_under_causal_attention(encoder):
    batch, _ = scrambled()
    tokens = batch.tokens.clone()
    cut = 20
    changed = (batch.position_ids == cut) & batch.real
    assert changed.any()
    tokens[changed] = (tokens[changed] + 1 - 5) % 206 + 5
    before, after = (hidden_states(encoder, batch, t, causal=True) for t in (batch.tokens, tokens))
    moved = (before != after).any(-1).view_as(batch.tokens)
    assert moved[changed].all()
    assert not moved[batch.position_ids < cut].any()


def test_a_sliding_window_limits_what_a_token_sees():
    encoder = tiny_encoder("modernbert", overrides={"num_hidden_layers": 1, "layer_types": ["sliding_attention"]})
    batch = padded(random_samples([37]))
    states = encoder.backbone.get_input_embeddings()(batch.tokens).detach().requires_grad_()
    hidden = encoder.backbone(
        inputs_embeds=states, position_ids=batch.position_ids, layout=Layout(batch)
    ).last_hidden_state
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((hidden[0, 15] * weights).sum(), states)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == list(range(11, 20))


@torch.no_grad()
def test_rows_of_padding_and_batches_without_samples_give_finite_states(encoder):
    batch, _ = scrambled()
    assert hidden_states(encoder, batch).isfinite().all()
    empty = lay_out([[], []], row_length=7)
    assert hidden_states(encoder, empty).shape == (14, 32)
    assert hidden_states(encoder, empty).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_activation_checkpointing_leaves_loss_and_gradients_as_they_are(family):
    batch, _ = scrambled()
    results = []
    for checkpointing in (False, True):
        encoder = tiny_encoder(family, activation_checkpointing=checkpointing).train()
        loss = hidden_states(encoder, batch)[batch.real.flatten()].square().mean()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in encoder.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_attention_dropout_is_applied_in_training_alone():
    rates = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    encoder = tiny_encoder("bert", overrides=rates, dropout=None)
    batch, _ = scrambled()
    assert torch.equal(hidden_states(encoder, batch), hidden_states(encoder, batch))
    encoder.train()
    assert not torch.allclose(hidden_states(encoder, batch), hidden_states(encoder, batch), atol=1e-3)


def test_blocks_hold_every_place_once_and_waste_less_than_half():
    samples = random_samples([1, 2, 15, 16, 17, 32, 33, 64, 3])
    batch = lay_out([samples[:4], samples[7:], samples[4:7]])
    assert batch.real[-1, -1]  # the last sample, shorter than its block, ends where the rows end
    blocks = Layout(batch).blocks()
    assert all(((places >= 0) & (places < batch.tokens.numel())).all() for places, _ in blocks)
    places = torch.cat([places[real] for places, real in blocks])
    assert torch.equal(places.sort().values, batch.real.flatten().nonzero().squeeze(1))
    for _, real in blocks:
        longest, shortest = int(real.sum(1).max()), int(real.sum(1).min())
        assert longest == real.shape[1]
        assert longest <= max(16, 2 * shortest)
    assert Layout(lay_out([[]], row_length=3)).blocks() == []


@torch.no_grad()
def test_a_family_without_the_attention_interface_does_not_pack_but_reads_padded_rows():
    encoder = tiny_encoder("deberta-v2")
    assert not encoder.packs_rows
    samples = random_samples(LENGTHS)
    batch = padded(samples)
    ours = hidden_states(encoder, batch)
    for number, sample in enumerate(samples):
        theirs = encoder.backbone(input_ids=torch.from_numpy(sample)[None]).last_hidden_state[0]
        assert torch.allclose(ours[places_of(batch, number)], theirs, atol=2e-5)


@pytest.mark.parametrize("family", ["fnet", "mamba"])
def test_a_family_that_mixes_tokens_outside_attention_does_not_pack(family):
    """Transformers says of both that their attention can be set."""
    overrides = {"hidden_size": 32, "num_hidden_layers": 2}
    if family == "fnet":
        overrides["intermediate_size"] = 48
    model = ModelConfig(family=family, size=None, overrides=overrides)
    encoder = build_encoder(model, backbone_config(model, VOCABULARY, 64), device_type="cpu", dtype=torch.float32)
    assert encoder.pretrained._can_set_attn_implementation()
    assert not encoder.packs_rows
    assert encoder.config._attn_implementation != "packed_rows"


def test_every_tiny_family_but_deberta_packs():
    assert {family for family in TINY if tiny_encoder(family).packs_rows} == set(PACKING)


@pytest.mark.parametrize(
    ("device_type", "dtype", "dropout"), [("cpu", torch.float32, 0.0), ("cuda", torch.bfloat16, 0.1)]
)
def test_varlen_where_it_cannot_work_is_refused_and_auto_takes_blocks(device_type, dtype, dropout):
    model = ModelConfig(family="bert", size=None, overrides=TINY["bert"], dropout=dropout, attention="varlen")
    config = backbone_config(model, VOCABULARY, 64)
    with pytest.raises(UserError, match=r"^model\.attention: 'varlen'"):
        build_encoder(model, config, device_type=device_type, dtype=dtype)
    auto = model.model_copy(update={"attention": "auto"})
    assert build_encoder(auto, config, device_type=device_type, dtype=dtype).attention == "blocks"
    config = backbone_config(model.model_copy(update={"dropout": 0.0}), VOCABULARY, 64)
    assert build_encoder(auto, config, device_type="cuda", dtype=torch.bfloat16).attention == "varlen"
