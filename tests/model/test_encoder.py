import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import ModelConfig, backbone_config, build_encoder, is_encoder, is_encoder_decoder
from pretrain.model.sizes import SIZES
from tests.builders import TINY, VOCABULARY, padded, places_of, random_samples, tiny_encoder

SAMPLES = random_samples([5, 37, 1, 16])


def build(model: ModelConfig, max_length: int = 64):
    config = backbone_config(model, VOCABULARY, max_length)
    return build_encoder(model, config, device_type="cpu", dtype=torch.float32)


FAMILIES = [*TINY, "albert", "camembert", "data2vec-text", "esm", "xlm-roberta", "qwen3"]


def small_encoder(family: str):
    if family in TINY:
        return tiny_encoder(family)
    keys = {**TINY["bert"], "num_key_value_heads": 2, "embedding_size": 24}
    overrides = {key: value for key, value in keys.items() if hasattr(CONFIG_MAPPING[family](), key)}
    return build(ModelConfig(family=family, size=None, overrides=overrides, dropout=0.0)).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_head_gives_the_logits_of_transformers_model(family):
    encoder = small_encoder(family)
    batch = padded(SAMPLES)
    hidden = encoder(batch.tokens, Layout(batch, causal=encoder.causal_only))
    ours = encoder.vocabulary_head()(hidden).flatten(0, 1)
    encoder.pretrained.set_attn_implementation("eager")
    for number, sample in enumerate(SAMPLES):
        theirs = encoder.pretrained(input_ids=torch.from_numpy(sample)[None]).logits[0]
        assert torch.allclose(ours[places_of(batch, number)], theirs, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_in_the_projections_place_can_form_the_same_logits(family):
    encoder = small_encoder(family)
    head = encoder.vocabulary_head()
    hidden = torch.randn(7, encoder.config.hidden_size)
    logits = head(hidden)
    scored = head(hidden, lambda features, weight, bias: (F.linear(features, weight, bias), weight))
    torch.testing.assert_close(scored[0], logits)
    assert (scored[1] is encoder.pretrained.get_output_embeddings().weight) == (family != "esm")
    assert torch.equal(head(hidden), logits)  # the score is gone


def test_a_score_that_fails_leaves_the_head_as_it_was():
    encoder = tiny_encoder("bert")
    head, hidden = encoder.vocabulary_head(), torch.randn(3, 32)
    with pytest.raises(ZeroDivisionError):
        head(hidden, lambda *_: 1 / 0)
    assert head(hidden).shape == (3, VOCABULARY.size)


def test_a_large_head_that_goes_on_behind_its_projection_is_refused():
    overrides = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    overrides |= {"intra_bottleneck_size": 32, "vocab_size": 4099}
    encoder = build(ModelConfig(family="mobilebert", size=None, overrides=overrides))
    with pytest.raises(UserError, match=r"^model\.family: 'mobilebert' changes its logits behind the projection"):
        encoder.vocabulary_head()


def test_the_head_shares_its_parameters_with_the_model_and_is_tied_as_the_config_says():
    for family in ("bert", "modernbert", "gpt2"):
        encoder = tiny_encoder(family)
        head, embeddings = encoder.vocabulary_head(), encoder.backbone.get_input_embeddings().weight
        assert {id(p) for p in head.parameters()} <= {id(p) for p in encoder.pretrained.parameters()}
        assert id(embeddings) in {id(p) for p in head.parameters()}
    untied = tiny_encoder("llama")
    assert untied.backbone.get_input_embeddings().weight is not untied.vocabulary_head().layers["lm_head"].weight


def test_what_no_objective_uses_is_no_parameter_of_the_encoder():
    encoder = tiny_encoder("bert")
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in encoder.backbone.parameters()}
    assert not any(name.startswith("pretrained") for name in encoder.state_dict())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "llama", "gpt2"])
def test_going_on_from_a_checkpoint_takes_its_weights_and_its_config(family, tmp_path):
    original = tiny_encoder(family, seed=5)
    original.pretrained.set_attn_implementation("sdpa")
    original.pretrained.save_pretrained(tmp_path)
    encoder = build(ModelConfig(checkpoint=str(tmp_path)))
    theirs = original.pretrained.state_dict()
    ours = encoder.pretrained.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert encoder.config.hidden_size == 32 and encoder.packs_rows
    assert encoder.first_position == original.first_position


def test_a_checkpoint_is_trained_with_dropout(tmp_path):
    original = tiny_encoder("bert")
    original.pretrained.save_pretrained(tmp_path)
    encoder = build(ModelConfig(checkpoint=str(tmp_path), dropout=0.3))
    assert all(module.training for module in encoder.modules())
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("family", [name for name in TINY if name not in ("llama", "modernbert")])
def test_dropout_sets_every_rate_of_the_backbone(family):
    def rates(dropout):
        model = ModelConfig(family=family, size=None, overrides=TINY[family], dropout=dropout)
        encoder = build(model).train()
        return encoder, {module.p for module in encoder.backbone.modules() if isinstance(module, nn.Dropout)}

    batch = padded(SAMPLES)
    encoder, found = rates(0.0)
    assert found <= {0.0}
    layout = Layout(batch, causal=encoder.causal_only)
    assert torch.equal(encoder(batch.tokens, layout), encoder(batch.tokens, layout))
    encoder, found = rates(0.37)
    assert found == {0.37}
    assert not torch.equal(encoder(batch.tokens, layout), encoder(batch.tokens, layout))
    assert rates(None)[1] == {0.1}


def test_modernberts_dropouts_are_set_too():
    encoder = build(ModelConfig(family="modernbert", size=None, overrides=TINY["modernbert"], dropout=0.2))
    names = ("embedding_dropout", "mlp_dropout", "attention_dropout")
    assert [getattr(encoder.config, name) for name in names] == [0.2] * 3


def test_the_same_torch_seed_gives_the_same_weights():
    torch.manual_seed(3)
    one = build(ModelConfig(family="bert", size=None, overrides=TINY["bert"])).state_dict()
    torch.manual_seed(3)
    two = build(ModelConfig(family="bert", size=None, overrides=TINY["bert"])).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_every_named_size_is_a_valid_config(family, size):
    config = backbone_config(ModelConfig(family=family, size=size), VOCABULARY, 600)
    assert config.vocab_size == VOCABULARY.size and config.pad_token_id == VOCABULARY.pad_id
    if family not in ("t5", "mt5"):  # whose heads have a size of their own, and whose positions are relative
        assert config.hidden_size % config.num_attention_heads == 0
        assert config.max_position_embeddings >= 600
    assert is_encoder_decoder(config) == (family in ("t5", "mt5", "bart"))
    assert is_encoder_decoder(config) or is_encoder(config) == (family != "llama")


def test_the_published_base_sizes_have_the_published_numbers_of_parameters():
    """BERT base: 110 million with 30,522 tokens; ModernBERT base: 149 million with 50,368 (arXiv 2412.13663)."""
    for family, vocabulary, millions in (("bert", 30_522, 109.5), ("modernbert", 50_368, 149.0)):
        keys = {"vocab_size": vocabulary}
        with torch.device("meta"):
            model = ModelConfig(family=family, size="base", overrides=keys)
            config = backbone_config(model, VOCABULARY, 512)
            count = sum(p.numel() for p in AutoModel.from_config(config).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"family": "brt"}, r"^model\.family: unknown family 'brt'; did you mean 'bert'\?$"),
        ({"family": "whisper", "size": None}, r"^model\.family: 'whisper' is not a language model"),
        ({"family": "vit", "size": None}, r"^model\.family: 'vit' is not a language model"),
        (
            {"family": "cohere", "size": None},
            r"^model\.family: 'cohere' changes its logits after its head \(logit_scale\)",
        ),
        ({"family": "gemma2", "size": None}, r"^model\.family: .*\(final_logit_softcapping\)"),
        ({"family": "gpt2"}, r"^model\.size: 'gpt2' has no named sizes .*bert.*model\.overrides$"),
        ({"overrides": {"hiden_size": 32}}, r"^model\.overrides\.hiden_size: .*did you mean 'hidden_size'\?$"),
        ({"overrides": {"to_dict": 1}}, r"^model\.overrides\.to_dict: no key of BertConfig"),
        ({"overrides": {"hidden_size": "wide"}}, r"^model\.overrides: .*hidden_size.*int.*'wide'"),
        ({"overrides": {"hidden_size": 30, "num_attention_heads": 4}}, r"^model\.overrides: .*multiple"),
        ({"overrides": {"hidden_act": "nope"}}, r"^model\.overrides: .*nope"),
        ({"overrides": {"vocab_size": 100}}, r"^model\.overrides\.vocab_size: .*100 tokens.*tokenizer 211"),
        ({"overrides": {"max_position_embeddings": 63}}, r"^model\.overrides\.max_position_embeddings: .*63.*64"),
        ({"family": "roberta", "overrides": {"max_position_embeddings": 64}}, r"room for samples of 63 tokens"),
        ({"checkpoint": "no-such-folder/at-all"}, r"^model\.checkpoint: 'no-such-folder/at-all' cannot be loaded"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_model_that_cannot_be_is_refused_in_one_line_that_names_its_key(keys, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as caught:
        build(ModelConfig(**{"size": "tiny", **keys} if "checkpoint" not in keys else keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [{"family": "bert"}, {"size": None}, {"overrides": {"vocab_size": 5}}], ids=str)
def test_what_a_checkpoint_decides_cannot_be_set_beside_it(key, tmp_path):
    tiny_encoder("bert").pretrained.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model\.{next(iter(key))}: .*model\.checkpoint"):
        backbone_config(ModelConfig(checkpoint=str(tmp_path), **key), VOCABULARY, 64)


def test_a_checkpoint_with_too_few_tokens_positions_or_no_weights_is_refused(tmp_path):
    original = tiny_encoder("bert", overrides={"max_position_embeddings": 64}).pretrained
    original.save_pretrained(tmp_path)
    model = ModelConfig(checkpoint=str(tmp_path))
    build(model)
    with pytest.raises(UserError, match=r"^model\.checkpoint: room for samples of 64 tokens.*has 65"):
        build(model, max_length=65)
    original.config.vocab_size = 210
    original.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.checkpoint: the model has 210 tokens.*211.*--tokenizer"):
        build(model)
    original.config.vocab_size = 211
    original.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*cannot be loaded") as caught:
        build(model)
    assert "\n" not in str(caught.value)


def test_a_model_config_with_a_checkpoint_survives_being_written_out():
    model = ModelConfig(checkpoint="folder", dropout=0.1)
    again = ModelConfig.model_validate(model.model_dump(mode="json"))
    assert again == model and not again.model_fields_set & {"family", "size", "overrides"}
    scratch = ModelConfig(family="roberta", size=None, overrides={"hidden_size": 8})
    assert ModelConfig.model_validate(scratch.model_dump(mode="json")) == scratch
