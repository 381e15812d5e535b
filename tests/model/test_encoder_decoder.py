"""Encoder–decoders: the states, logits and losses of transformers' own models."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config
from transformers.models.bart.modeling_bart import shift_tokens_right

from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.model.encoder import ModelConfig, backbone_config, build_encoder
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives import REGISTRY
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import CLS, PAD, PAIRED_VOCABULARY, SEP, TINY, TINY_PAIRED, tiny_encoder
from tests.objectives.builders import ids_of, model_with, numbered, rows_of_samples

OTHERS = {
    "mbart": TINY_PAIRED["bart"],
    "marian": TINY_PAIRED["bart"],
    "pegasus": TINY_PAIRED["bart"],
    "blenderbot": TINY_PAIRED["bart"],
    "m2m_100": TINY_PAIRED["bart"],
    "umt5": TINY_PAIRED["t5"],
    "longt5": TINY_PAIRED["t5"],
}


PROPHETNET = {"hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 48}


def build(**keys) -> EncoderDecoder:
    model = ModelConfig(size=None, dropout=0.0, **keys)
    config = backbone_config(model, PAIRED_VOCABULARY, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_encoder(model, config, device_type="cpu", dtype=torch.float32).eval()


def small(family: str) -> EncoderDecoder:
    return tiny_encoder(family) if family in TINY_PAIRED else build(family=family, overrides=OTHERS[family])


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for rounding, which these wide weights make coarse."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def pairs(seed: int = 0):
    """Return sources of 17, 9 and 1 tokens, where they hold tokens, and labels of 11, 1 and 0."""
    random = torch.Generator().manual_seed(seed)
    source, labels = (torch.randint(5, 200, (3, length), generator=random) for length in (17, 11))
    real = torch.arange(17) < torch.tensor([[17], [9], [1]])
    written = torch.arange(11) < torch.tensor([[11], [1], [0]])
    return torch.where(real, source, PAD), real, torch.where(written, labels, IGNORED)


@torch.no_grad()
@pytest.mark.parametrize("family", [*TINY_PAIRED, *OTHERS])
def test_the_head_on_the_states_gives_the_logits_of_transformers_model(family):
    encoder = small(family)
    if (bias := getattr(encoder.pretrained, "final_logits_bias", None)) is not None:
        bias.copy_(torch.linspace(-1, 1, bias.numel()))
    source, real, labels = pairs()
    inputs = encoder.decoder_inputs(labels)
    head = encoder.vocabulary_head()
    logits = head(encoder(source, real, inputs))
    expected = encoder.pretrained(input_ids=source, attention_mask=real.long(), decoder_input_ids=inputs).logits
    assert_alike(logits, expected)
    hidden = torch.randn(7, encoder.config.hidden_size)
    scored = head(hidden, lambda features, weight, bias: nn.functional.linear(features, weight, bias))
    assert_alike(scored, head(hidden))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(name for name, each in REGISTRY.items() if each.paired))
@pytest.mark.parametrize("family", TINY_PAIRED)
def test_an_objectives_loss_is_the_mean_that_transformers_computes_from_labels(family, name):
    model = model_with(name, family)
    rows = rows_of_samples(9)
    view = model.objectives[name].corrupt(numbered(rows, ids_of(rows)), 0.0)
    loss = model.objectives[name].loss(model, view)[name]
    assert view.counts[name].sum() == (view.labels != IGNORED).sum() > 20
    theirs = model.encoder.pretrained(input_ids=view.tokens, attention_mask=view.real.long(), labels=view.labels)
    assert loss.total.item() / int(view.counts[name].sum()) == pytest.approx(theirs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", TINY_PAIRED)
def test_the_decoder_reads_what_transformers_makes_of_labels(family):
    encoder, (_, _, labels) = tiny_encoder(family), pairs()
    expected = shift_tokens_right(labels, PAD, SEP) if family == "bart" else encoder.pretrained._shift_right(labels)
    assert torch.equal(encoder.decoder_inputs(labels), expected)
    assert encoder.config.decoder_start_token_id == (SEP if family == "bart" else PAD)


def test_a_new_bart_knows_its_tokens_by_role():
    config = tiny_encoder("bart").config
    assert (config.bos_token_id, config.eos_token_id, config.forced_eos_token_id) == (CLS, SEP, SEP)


@torch.no_grad()
@pytest.mark.parametrize("family", TINY_PAIRED)
def test_padding_changes_no_state(family):
    encoder, (source, real, labels) = tiny_encoder(family), pairs()
    states = encoder(source, real, encoder.decoder_inputs(labels))
    wider = nn.functional.pad(source, (0, 6), value=7), nn.functional.pad(real, (0, 6))
    padded = encoder(*wider, encoder.decoder_inputs(nn.functional.pad(labels, (0, 5), value=IGNORED)))
    assert_alike(padded[:, :11], states)
    short = encoder(source[1:2, :9], real[1:2, :9], encoder.decoder_inputs(labels[1:2, :1]))
    assert_alike(short[0, 0], states[1, 0])
    other = source.clone()
    other[1, 3] += 1
    changed = encoder(other, real, encoder.decoder_inputs(labels)) != states
    assert changed[1].all() and not changed[[0, 2]].any()


def test_t5_scales_its_states_where_the_checkpoint_did_and_goes_on_from_it(tmp_path):
    """The first T5 scales, version 1.1 does not; a saved folder says which."""
    source, real, labels = pairs()
    for tied, scale in ((True, 32**-0.5), (False, 1.0)):
        torch.manual_seed(0)
        keys = {**TINY_PAIRED["t5"], "vocab_size": 223, "tie_word_embeddings": tied, "decoder_start_token_id": PAD}
        theirs = AutoModelForSeq2SeqLM.from_config(T5Config(**keys, pad_token_id=PAD)).eval()
        theirs.save_pretrained(tmp_path / str(tied))
        model = ModelConfig(checkpoint=str(tmp_path / str(tied)))
        config = backbone_config(model, PAIRED_VOCABULARY, 64)
        ours = build_encoder(model, config, device_type="cpu", dtype=torch.float32)
        assert ours.scale == pytest.approx(scale) and ours.training
        states = ours.eval()(source, real, ours.decoder_inputs(labels))
        logits = theirs(input_ids=source, attention_mask=real.long(), labels=labels).logits
        assert_alike(ours.vocabulary_head()(states), logits)


def test_activation_checkpointing_changes_no_gradient():
    for family in ("t5", "bart"):
        source, real, labels = pairs()
        found = []
        for on in (False, True):
            encoder = tiny_encoder(family, activation_checkpointing=on).train()
            encoder(source, real, encoder.decoder_inputs(labels)).square().sum().backward()
            found.append([parameter.grad for parameter in encoder.parameters()])
        for off, on in zip(*found, strict=True):
            assert_alike(on, off)


@pytest.mark.parametrize("family", TINY_PAIRED)
def test_components_hold_every_parameter_once_and_all_of_them_learn(family):
    model = MultiObjectiveModel(
        tiny_encoder(family),
        build_objectives(parse_objectives({"span_corruption": {}, "denoise": {}}, "test"), PAIRED_VOCABULARY, seed=1),
    )
    components = model.components()
    listed = [id(parameter) for parameter in itertools.chain(*components.values())]
    assert len(listed) == len(set(listed)) and set(listed) == {id(parameter) for parameter in model.parameters()}
    assert list(components) == ["backbone"]  # the head's weights are the embeddings
    own = {id(parameter) for parameter in model.encoder.pretrained.parameters()}
    assert own == set(listed)


def test_the_published_base_sizes_have_the_published_numbers_of_parameters():
    """T5 base: 220 million with 32,128 tokens (arXiv 1910.10683); BART base: 139 million with 50,265."""
    for family, vocabulary, millions in (("t5", 32_128, 222.9), ("bart", 50_265, 139.4), ("mt5", 250_112, 390.3)):
        keys = {"vocab_size": vocabulary} | ({"max_position_embeddings": 1024} if family == "bart" else {})
        with torch.device("meta"):
            config = backbone_config(ModelConfig(family=family, size="base", overrides=keys), PAIRED_VOCABULARY, 512)
            count = sum(parameter.numel() for parameter in AutoModelForSeq2SeqLM.from_config(config).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.6)


def test_objectives_and_backbones_that_do_not_fit_are_refused_in_one_line():
    for name in REGISTRY:
        refusing = TINY if REGISTRY[name].paired else TINY_PAIRED
        for family in refusing:
            objective = object.__new__(REGISTRY[name])  # refused before it is asked for anything
            with pytest.raises(UserError, match=rf"^objectives\.{name}: .*encoder–decoder") as error:
                MultiObjectiveModel(tiny_encoder(family), {name: objective})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"family": "t5", "attention": "varlen"}, r"^model\.attention: 't5' is an encoder–decoder"),
        ({"family": "whisper"}, r"^model\.family: 'whisper' is not a language model"),
        ({"family": "prophetnet", "overrides": PROPHETNET}, r"^model\.family: 'prophetnet' .*unsupported$"),
        ({"family": "t5", "overrides": {"d_modell": 3}}, r"^model\.overrides\.d_modell: .*did you mean 'd_model'\?$"),
        ({"family": "bart", "overrides": {"max_position_embeddings": 63}}, r"max_position_embeddings: .*63.*64"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_with_one_line(keys, message):
    overrides = {**TINY_PAIRED.get(keys["family"], {}), **keys.pop("overrides", {})}
    with pytest.raises(UserError, match=message) as error:
        build(**keys, overrides=overrides)
    assert "\n" not in str(error.value)


def test_dropout_reaches_every_part_of_t5_and_bart():
    for family in ("t5", "bart"):
        rates = [m.p for m in tiny_encoder(family, dropout=0.3).modules() if isinstance(m, nn.Dropout)]
        config = tiny_encoder(family, dropout=0.3).config
        rates += [getattr(config, name) for name in ("dropout", "attention_dropout") if hasattr(config, name)]
        assert rates and set(rates) == {0.3}
