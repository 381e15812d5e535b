"""The backbone and its vocabulary head: any Hugging Face encoder or decoder, new or from a checkpoint."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from pretrain.config import Config
from pretrain.errors import UserError, nearest, unknown
from pretrain.model.attention import NAME as PACKED_ATTENTION
from pretrain.model.attention import Layout
from pretrain.model.sizes import SIZES
from pretrain.model.vocabulary import Vocabulary

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


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
    dropout: float | None = None
    """Every dropout rate of the backbone; null keeps the family's own."""
    attention: Literal["auto", "blocks", "varlen"] = "auto"
    """How attention over packed rows is computed; ``auto`` takes ``varlen`` on a GPU in bf16 without attention
    dropout."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more compute."""


class VocabularyHead(nn.Module):
    """The Hugging Face model's own head, hidden states ``[..., hidden]`` → logits ``[..., vocabulary]``."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        children = {name: child for name, child in model.named_children() if child is not model.base_model}
        if model.config.model_type == "distilbert":
            children = {
                name: children[name]
                for name in ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")
            }
        self.layers = nn.ModuleDict(children)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


class Encoder(nn.Module):
    """A backbone that reads packed rows. Decoders are encoders whose attention is causal.

    ``pretrained`` is the Hugging Face model with its vocabulary head, whose parameters are shared with ``backbone`` and
    :meth:`vocabulary_head`; it is not a submodule, so what no objective uses is not trained.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "blocks"):
        super().__init__()
        self.backbone = model.base_model
        self.attention = attention
        object.__setattr__(self, "pretrained", model)
        self.packs_rows = model._can_set_attn_implementation()
        if self.packs_rows:
            model.set_attn_implementation(PACKED_ATTENTION)
        self.first_position = _first_position(model.config.model_type, model.config.pad_token_id)

    @property
    def config(self):
        """The Hugging Face config."""
        return self.pretrained.config

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
        return self.backbone(input_ids=tokens, **inputs).last_hidden_state


def is_encoder(config) -> bool:
    """Whether a Hugging Face config belongs to a masked-language model."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def backbone_config(model: ModelConfig, vocabulary: Vocabulary, max_length: int):
    """Return the Hugging Face config that a recipe asks for; no weights are touched.

    Raises:
        UserError: for an unknown family, size or override, a checkpoint that cannot be read, a vocabulary or positions
            that are too small, or an encoder–decoder.
    """
    config = _from_checkpoint(model) if model.checkpoint else _from_scratch(model, vocabulary, max_length)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model.family: '{config.model_type}' is an encoder–decoder; this program trains encoders and decoders"
        )
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.family: '{config.model_type}' is not a language model that transformers can build")
    if config.vocab_size < vocabulary.size:
        raise UserError(
            f"model.checkpoint: the model has {config.vocab_size} tokens, the store's tokenizer {vocabulary.size}; "
            "prepare the store with the model's own tokenizer (medley prepare --tokenizer)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions - _first_position(config.model_type, config.pad_token_id) < max_length:
        raise UserError(f"model: {positions} positions, but the store's longest sample has {max_length} tokens")
    if model.dropout is not None:
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, model.dropout)
    return config


def _first_position(family: str, pad_id: int | None) -> int:
    """Return the number of a sample's first position: RoBERTa and its kin count from behind the padding token's id."""
    return (pad_id or 0) + 1 if "roberta" in family or family in ("camembert", "mpnet") else 0


def _from_checkpoint(model: ModelConfig):
    changed = sorted(model.model_fields_set & {"family", "size", "overrides"})
    if changed:
        raise UserError(f"model.{changed[0]}: cannot be set together with model.checkpoint, which decides it")
    try:
        return AutoConfig.from_pretrained(model.checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.checkpoint: '{model.checkpoint}' cannot be loaded: {reason}") from None


def _from_scratch(model: ModelConfig, vocabulary: Vocabulary, max_length: int):
    if model.family not in CONFIG_MAPPING:
        raise unknown("family", model.family, CONFIG_MAPPING.keys(), "model.family")
    keys: dict[str, Any] = {}
    if model.size is not None:
        if model.family not in SIZES:
            raise UserError(
                f"model.size: '{model.family}' has no named sizes (those that do: {', '.join(SIZES)}); "
                "set size to null and give its dimensions in model.overrides"
            )
        keys = dict(SIZES[model.family][model.size])
    defaults = CONFIG_MAPPING[model.family]()
    for key in model.overrides:
        if not hasattr(defaults, key):
            match = nearest(key, defaults.to_dict())
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
    try:
        return CONFIG_MAPPING[model.family](**(keys | model.overrides))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.overrides: {str(error).strip().splitlines()[-1]}") from None


def build_encoder(model: ModelConfig, config, *, device_type: str, dtype: torch.dtype) -> Encoder:
    """Build the backbone in fp32 on the CPU, with weights from ``model.checkpoint`` or drawn with torch's generator."""
    auto = AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM
    if model.checkpoint:
        pretrained = auto.from_pretrained(model.checkpoint, config=config, dtype=torch.float32)
    else:
        pretrained = auto.from_config(config, dtype=torch.float32)
    if model.activation_checkpointing:
        pretrained.gradient_checkpointing_enable({"use_reentrant": False})
    return Encoder(pretrained, attention=_attention(model, config, device_type, dtype))


def _attention(model: ModelConfig, config, device_type: str, dtype: torch.dtype) -> str:
    dropout = max(
        float(getattr(config, n, 0) or 0) for n in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    )
    possible = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and dropout == 0
    if model.attention == "auto":
        return "varlen" if possible else "blocks"
    if model.attention == "varlen" and not possible:
        raise UserError("model.attention: 'varlen' needs a GPU, bf16 and no attention dropout; use 'blocks' or 'auto'")
    return model.attention
