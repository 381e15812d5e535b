"""Hugging Face's sequence classifier around a backbone and a head trained here."""

import copy

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.disentangled import folded
from pretrain.model.encoder import Encoder


def sequence_classifier(encoder: Encoder, head: nn.Module) -> PreTrainedModel:
    """Return the family's own sequence classifier with the weights of ``encoder`` and ``head`` (``dense``,
    tanh, ``out_proj`` on the first token), labels and scale of numbers from the config.

    Raises:
        UserError: if the family's head computes something else, as most do; BERT's and RoBERTa's do not.
    """
    family, config = encoder.config.model_type, copy.deepcopy(encoder.config)
    config.classifier_dropout = head.dropout.p
    refusal = UserError(f"--as sequence-classification: the head of family '{family}' is not dense, tanh and linear")
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except ValueError:  # the family has none
        raise refusal from None
    classifier, pooler = getattr(model, "classifier", None), getattr(model.base_model, "pooler", None)
    if hasattr(classifier, "out_proj"):
        dense, out_proj = classifier.dense, classifier.out_proj
    elif isinstance(classifier, nn.Linear) and hasattr(pooler, "dense"):
        dense, out_proj = pooler.dense, classifier
    else:
        raise refusal
    backbone = folded(encoder.pretrained).base_model
    model.base_model.load_state_dict(backbone.state_dict(), strict=False)  # all but the pooler
    dense.load_state_dict(head.dense.state_dict())
    sd, mean = config.label_sd, config.label_mean
    out_proj.load_state_dict({"weight": head.out_proj.weight * sd, "bias": head.out_proj.bias * sd + mean})
    if not _agree(model.eval(), encoder, lambda features: head(features) * sd + mean):
        raise refusal
    return model


@torch.no_grad()
def _agree(model: PreTrainedModel, encoder: Encoder, logits) -> bool:
    """Try whether both compute the same: some families bend the features in between."""
    length = 4
    tokens = (torch.arange(length) + (encoder.config.pad_token_id or 0) + 1) % encoder.config.vocab_size
    zero = torch.zeros(1, dtype=torch.int64)
    places = torch.arange(length)[None]
    batch = Batch(tokens[None], torch.zeros_like(places), places, zero, zero, zero + length, zero)
    hidden = encoder(batch.tokens, Layout(batch))
    return torch.allclose(model(input_ids=batch.tokens).logits, logits(hidden[:, 0]), rtol=1e-3, atol=1e-4)
