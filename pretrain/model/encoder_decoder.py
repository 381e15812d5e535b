"""Encoder–decoder backbones: any Hugging Face model for sequence-to-sequence language modelling, new or trained."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fused_objectives.targets import IGNORED
from pretrain.errors import UserError
from pretrain.model.projection import Score, Shifted, scored


class EncoderDecoder(nn.Module):
    """A backbone that reads a source and writes a target; a row of either holds one sample.

    ``pretrained`` is the Hugging Face model, whose parameters are shared with ``encoder``, ``decoder`` and
    :meth:`vocabulary_head`; it is not a submodule, so what no objective uses is not trained.

    Raises:
        UserError: if the model does more than to hand its decoder's states to one projection, scaled at most.
    """

    causal_only = False
    packs_rows = False
    """A row holds one sample: neither decoder nor cross attention keeps several apart."""

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False):
        super().__init__()
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        self.attention, self.activation_checkpointing = model.config._attn_implementation, activation_checkpointing
        object.__setattr__(self, "pretrained", model)
        self.scale = 1.0
        self.scale = self._find_scale()
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def config(self):
        """The Hugging Face config."""
        return self.pretrained.config

    @property
    def positions(self) -> int | None:
        """The most places of a source or a target; None if there is no bound."""
        return getattr(self.config, "max_position_embeddings", None)

    def vocabulary_head(self) -> "ProjectionHead":
        """Return the model's vocabulary head (tied to the token embeddings where the config says so)."""
        return ProjectionHead(self.pretrained)

    def decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the decoder reads while it learns to write ``labels [rows, target length]``: the token before."""
        before = torch.full_like(labels, self.config.decoder_start_token_id)
        before[:, 1:] = labels[:, :-1]
        return torch.where(before == IGNORED, self.config.pad_token_id, before)

    def forward(self, source: torch.Tensor, real: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return the decoder's last states ``[rows, target length, hidden]``, as the vocabulary head reads them.

        Args:
            source: ``[rows, source length]`` int64, what the encoder reads.
            real: like ``source``, bool: where it holds a token; at least one a row.
            inputs: ``[rows, target length]`` int64, what the decoder reads; padding stands behind, where causal
                attention never looks.
        """
        mask = real.long()
        memory = self.encoder(input_ids=source, attention_mask=mask).last_hidden_state
        hidden = self.decoder(
            input_ids=inputs, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden * self.scale

    @torch.no_grad()
    def _find_scale(self) -> float:
        """Return what the model multiplies its decoder's states with before the projection: T5 where it ties its
        embeddings takes width ** −½."""
        model, training = self.pretrained, self.pretrained.training
        family = f"model.family: '{self.config.model_type}'"
        source = (torch.arange(5) + (self.config.pad_token_id or 0) + 1)[None] % self.config.vocab_size
        inputs = source.flip(1)[:, :4]
        model.eval()
        try:
            expected = model(input_ids=source, decoder_input_ids=inputs, use_cache=False).logits
            hidden = self(source, torch.ones_like(source, dtype=torch.bool), inputs)
            for scale in (1.0, self.config.hidden_size**-0.5):
                logits = ProjectionHead(model)(hidden * scale)
                if torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.std())):
                    return scale
        except (
            AttributeError,
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:  # what models raise
            raise UserError(f"{family} is an encoder–decoder of another kind than T5 and BART: unsupported") from error
        finally:
            model.train(training)
        raise UserError(f"{family} changes its states or logits around its vocabulary head: unsupported")


class ProjectionHead(nn.Module):
    """Hidden states ``[..., hidden]`` → logits ``[..., vocabulary]``, or what a score makes of the projection.

    BART and its kin have a bias that is no parameter.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.projection, self.hidden_size = model.get_output_embeddings(), model.config.hidden_size
        self.register_buffer("bias", getattr(model, "final_logits_bias", None))

    def forward(self, hidden: torch.Tensor, score: Score | None = None) -> Any:
        if score is None:
            logits = self.projection(hidden)
            return logits if self.bias is None else logits + self.bias
        with scored(self.projection, score if self.bias is None else Shifted(score, self.bias[0])):
            return self.projection(hidden)
