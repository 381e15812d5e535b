"""The backbone and its vocabulary head: any Hugging Face encoder or decoder, new or from a checkpoint; and which
backbone a recipe asks for."""

from typing import Any, Literal

import torch
from pydantic import Field, model_serializer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError, nearest, unknown
from pretrain.model.attention import NAME as PACKED_ATTENTION
from pretrain.model.attention import Layout
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.rows import rows_of
from pretrain.model.sizes import SIZES
from pretrain.model.vocabulary import Vocabulary
from pretrain.model.vocabulary_head import VocabularyHead

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "activation_dropout",
    "dropout",
    "dropout_rate",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)

_OF_THE_CHECKPOINT = ("family", "overrides", "size")  # keys that model.checkpoint decides

# Families, besides RoBERTa's own, whose first position comes behind the padding token's id.
_OFFSET_POSITIONS = {"camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "xmod"}


# Keys of decoders that scale or bend the logits outside the head, where VocabularyHead would not see it.
_AFTER_THE_HEAD = ("final_logit_softcapping", "lm_head_multiplier", "logit_scale", "logits_scaling")


class ModelConfig(Config):
    """The backbone: ``family`` and ``size`` for a new one, ``checkpoint`` to go on from a trained one."""

    family: str = "bert"
    """A Hugging Face model type."""
    size: Literal["tiny", "small", "base", "large"] | None = "base"
    """A named size; null takes the family's own defaults and ``overrides``."""
    checkpoint: str | None = None
    """Folder or hub name of a model to continue from; family, size and overrides are then its own."""
    overrides: dict[str, Any] = {}
    """Keys of the Hugging Face config that replace those of ``size``."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Every dropout rate of the backbone; null keeps the family's own."""
    attention: Literal["auto", "blocks", "varlen"] = "auto"
    """How attention over packed rows is computed; ``auto`` takes ``varlen`` on a GPU in bf16 without attention
    dropout."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more compute."""

    @model_serializer(mode="wrap")
    def _without_what_the_checkpoint_decides(self, handler) -> dict[str, Any]:
        values = handler(self)
        return {k: v for k, v in values.items() if k not in _OF_THE_CHECKPOINT} if self.checkpoint else values


class Encoder(nn.Module):
    """A backbone that reads packed rows. Decoders are encoders whose attention is causal.

    ``pretrained`` is the Hugging Face model with its vocabulary head, whose parameters are shared with ``backbone`` and
    :meth:`vocabulary_head`; it is not a submodule, so what no objective uses is not trained.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "blocks", activation_checkpointing: bool = False):
        super().__init__()
        self.backbone = model.base_model
        self.attention, self.activation_checkpointing = attention, activation_checkpointing
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        object.__setattr__(self, "pretrained", model)
        self.first_position = _first_position(model.config.model_type, getattr(model.config, "pad_token_id", None))
        self.packs_rows = model._can_set_attn_implementation()
        if self.packs_rows:
            own = model.config._attn_implementation
            model.set_attn_implementation(PACKED_ATTENTION)
            self.packs_rows = self._keeps_samples_apart()
            if not self.packs_rows:
                model.set_attn_implementation(own)

    @torch.no_grad()
    def _keeps_samples_apart(self) -> bool:
        """Try whether a sample behind another comes out as it does alone: families that mix tokens outside attention
        (convolutions, Fourier transforms, recurrences) cannot share rows, though transformers lets them set the
        attention."""
        training, length = self.backbone.training, 4
        tokens = (torch.arange(2 * length) + (self.config.pad_token_id or 0) + 1) % self.config.vocab_size
        self.backbone.eval()
        try:
            together = self(tokens[None], Layout(_samples_in_a_row(2, length)))
            alone = self(tokens[None, length:], Layout(_samples_in_a_row(1, length)))
        except (RuntimeError, TypeError, ValueError):  # what models raise that cannot take the layout or the positions
            return False
        finally:
            self.backbone.train(training)
        return torch.allclose(together[:, length:], alone, rtol=1e-3, atol=1e-3 * float(alone.std()))

    @property
    def config(self):
        """The Hugging Face config."""
        return self.pretrained.config

    @property
    def positions(self) -> int | None:
        """The most tokens of a sample; None if there is no bound."""
        return _positions(self.config)

    @property
    def causal_only(self) -> bool:
        """Whether this is a decoder, whose attention is always causal."""
        return not is_encoder(self.config)

    def vocabulary_head(self) -> VocabularyHead:
        """Return the model's vocabulary head (tied to the token embeddings where the config says so)."""
        return VocabularyHead(self.pretrained)

    def forward(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the last hidden states ``[rows, length, hidden]`` of ``tokens [rows, length]``."""
        positions = layout.batch.position_ids + self.first_position
        if self.packs_rows:
            inputs = {"position_ids": positions, "layout": layout}
        else:
            inputs = {"position_ids": positions, "attention_mask": layout.batch.real.long()}
        if self.causal_only:
            inputs["use_cache"] = False
        with rows_of(layout.batch.segment_ids):
            return self.backbone(input_ids=tokens, **inputs).last_hidden_state


def _samples_in_a_row(samples: int, length: int) -> Batch:
    """Return a row of equally long samples; what they are called does not matter to the backbone."""
    segments, zeros = torch.arange(samples), torch.zeros(samples, dtype=torch.int64)
    return Batch(
        tokens=torch.zeros(1, samples * length, dtype=torch.int64),
        segment_ids=segments.repeat_interleave(length)[None],
        position_ids=torch.arange(length).repeat(samples)[None],
        sample_ids=segments,
        visits=zeros,
        lengths=torch.full((samples,), length),
        sample_rows=zeros,
    )


def is_encoder_decoder(config) -> bool:
    """Whether a Hugging Face config belongs to a model with an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_encoder(config) -> bool:
    """Whether a Hugging Face config belongs to a masked-language model."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def backbone_config(model: ModelConfig, vocabulary: Vocabulary, max_length: int):
    """Return the Hugging Face config that a recipe asks for; no weights are touched.

    Raises:
        UserError: for an unknown family, size or override, a checkpoint that cannot be read, a vocabulary or positions
            that are too small, or a model that is none for text.
    """
    config = _from_checkpoint(model) if model.checkpoint else _from_scratch(model, vocabulary, max_length)
    _check_kind(config)
    for name in _AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"model.family: '{config.model_type}' changes its logits after its head ({name}): unsupported"
            )
    if config.vocab_size < vocabulary.size:
        found = f"the model has {config.vocab_size} tokens, the store's tokenizer {vocabulary.size}"
        if model.checkpoint is None:
            raise UserError(f"model.overrides.vocab_size: {found}; leave the key out")
        raise UserError(
            f"model.checkpoint: {found}; prepare the store with the model's own tokenizer (medley prepare --tokenizer)"
        )
    room = _positions(config)
    if room is not None and room < max_length:
        key = "checkpoint" if model.checkpoint else "overrides.max_position_embeddings"
        raise UserError(
            f"model.{key}: room for samples of {room} tokens, but the store's longest has {max_length}; "
            "prepare the store with shorter samples (medley prepare --max-length)"
        )
    if model.dropout is not None:
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, model.dropout)
    return config


def _first_position(family: str, pad_id: int | None) -> int:
    """Return the number of a sample's first position: RoBERTa and its kin count from behind the padding token's id."""
    return (pad_id or 0) + 1 if "roberta" in family or family in _OFFSET_POSITIONS else 0


def _positions(config) -> int | None:
    """Return how many tokens of a sample a config has positions for; None if it sets no bound."""
    positions = getattr(config, "max_position_embeddings", None)
    before = _first_position(config.model_type, getattr(config, "pad_token_id", None))
    return None if positions is None else positions - before


def _from_checkpoint(model: ModelConfig):
    changed = sorted(model.model_fields_set.intersection(_OF_THE_CHECKPOINT))
    if changed:
        raise UserError(f"model.{changed[0]}: cannot be set together with model.checkpoint, which decides it")
    try:
        return AutoConfig.from_pretrained(model.checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.checkpoint: '{model.checkpoint}' cannot be loaded: {reason}") from None


def _check_kind(config) -> None:
    if is_encoder_decoder(config):
        known = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    else:
        known = type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known:
        raise UserError(f"model.family: '{config.model_type}' is not a language model that transformers can build")


def _from_scratch(model: ModelConfig, vocabulary: Vocabulary, max_length: int):
    if model.family not in CONFIG_MAPPING:
        raise unknown("family", model.family, CONFIG_MAPPING.keys(), "model.family")
    defaults = CONFIG_MAPPING[model.family]()
    _check_kind(defaults)
    keys: dict[str, Any] = {}
    if model.size is not None:
        if model.family not in SIZES:
            raise UserError(
                f"model.size: '{model.family}' has no named sizes (those that do: {', '.join(SIZES)}); "
                "set size to null and give its dimensions in model.overrides"
            )
        keys = dict(SIZES[model.family][model.size])
    valid = {*defaults.to_dict(), *defaults.attribute_map}
    for key in model.overrides:
        if key not in valid:
            match = nearest(key, valid)
            raise UserError(
                f"model.overrides.{key}: no key of {type(defaults).__name__}"
                + (f"; did you mean '{match}'?" if match else "")
            )
    keys |= {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad_id}
    if hasattr(defaults, "max_position_embeddings"):
        keys["max_position_embeddings"] = max(512, max_length) + _first_position(model.family, vocabulary.pad_id)
    if model.family == "llama" and "num_key_value_heads" not in model.overrides:
        keys["num_key_value_heads"] = model.overrides.get("num_attention_heads", keys.get("num_attention_heads"))
    keys |= {
        name: None
        for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        if hasattr(defaults, name)
    }
    if is_encoder_decoder(defaults):
        keys |= _roles(defaults, vocabulary)
    try:
        return CONFIG_MAPPING[model.family](**(keys | model.overrides))
    except Exception as error:  # the config classes raise whatever they meet
        raise UserError(f"model.overrides: {str(error).strip().splitlines()[-1].strip()}") from None


def _roles(defaults, vocabulary: Vocabulary) -> dict[str, int | None]:
    """Return the tokens that begin and end what a decoder writes: BART begins with the end token, T5 with padding."""
    eos = vocabulary.eos_id
    begins_with_end = getattr(defaults, "decoder_start_token_id", None) == defaults.eos_token_id and eos is not None
    roles = {"eos_token_id": eos, "decoder_start_token_id": eos if begins_with_end else vocabulary.pad_id}
    others = {"bos_token_id": vocabulary.bos_id, "forced_eos_token_id": eos}
    return roles | {name: index for name, index in others.items() if getattr(defaults, name, None) is not None}


def build_encoder(model: ModelConfig, config, *, device_type: str, dtype: torch.dtype) -> Encoder | EncoderDecoder:
    """Build the backbone in fp32 on the CPU, with weights from ``model.checkpoint`` or drawn with torch's generator; it
    is in training mode.

    Raises:
        UserError: if the weights cannot be read, or there is no model of these dimensions.
    """
    paired = is_encoder_decoder(config)
    auto = AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM
    if paired:
        auto = AutoModelForSeq2SeqLM
    try:
        if model.checkpoint:
            pretrained = auto.from_pretrained(model.checkpoint, config=config, dtype=torch.float32)
        else:
            pretrained = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers and torch raise whatever they meet
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if model.checkpoint:
            raise UserError(f"model.checkpoint: '{model.checkpoint}' cannot be loaded: {reason}") from None
        raise UserError(f"model.overrides: no '{model.family}' can be built with them: {reason}") from None
    pretrained.train()  # a checkpoint comes without dropout
    if model.activation_checkpointing and not pretrained.supports_gradient_checkpointing:
        raise UserError(f"model.activation_checkpointing: '{config.model_type}' does not support it; set it to false")
    if paired:
        if model.attention == "varlen":
            raise UserError(f"model.attention: '{config.model_type}' is an encoder–decoder and has its own; use 'auto'")
        return EncoderDecoder(pretrained, activation_checkpointing=model.activation_checkpointing)
    attention = _attention(model, config, device_type, dtype)
    return Encoder(pretrained, attention=attention, activation_checkpointing=model.activation_checkpointing)


def _flash_fits(config) -> bool:
    """Whether flash attention has a kernel for the heads of a config and for this machine's GPU."""
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    modern = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    return modern and 0 < size <= 256 and size % 8 == 0


def _attention(model: ModelConfig, config, device_type: str, dtype: torch.dtype) -> str:
    dropout = max(
        float(getattr(config, n, 0) or 0) for n in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    )
    possible = device_type == "cuda" and dtype == torch.bfloat16 and dropout == 0 and _flash_fits(config)
    if model.attention == "auto":
        return "varlen" if possible else "blocks"
    if model.attention == "varlen" and not possible:
        raise UserError(
            "model.attention: 'varlen' needs a GPU of capability 8.0, bf16, no attention dropout and a head size that "
            "is a multiple of 8 up to 256; use 'blocks' or 'auto'"
        )
    return model.attention
