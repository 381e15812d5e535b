"""The network of a policy that is trained by its masks: a span extractor's, reading packed rows."""

import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder, ModelConfig, backbone_config, is_encoder
from pretrain.model.vocabulary import Vocabulary


class PolicyNetwork(nn.Module):
    """Batch → scores ``[rows, length]`` float32: of each token as a span by itself, its start and its end together.

    The outputs begin as zeros, so the first masks are drawn at random. There is no dropout: the scores that draw a mask
    are those its gradient meets.

    Args:
        model: one of transformers' models for question answering: two logits a token.

    Raises:
        UserError: if what the family puts behind its encoder is more than one layer after another.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.layers = nn.ModuleList(child for child in model.children() if child is not model.base_model)
        if not self._agrees(model):
            raise UserError(
                f"policy.model: what '{model.config.model_type}' has behind its encoder is more than layers in a row; "
                "use bert, roberta, electra or modernbert"
            )
        outputs = [layer for layer in self.layers.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(outputs.weight)
        nn.init.zeros_(outputs.bias)
        self.encoder = Encoder(model)

    @property
    def extractor(self) -> PreTrainedModel:
        """The model for question answering, whose weights these are."""
        return self.encoder.pretrained

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._outputs(self.encoder(batch.tokens, Layout(batch))).float().sum(-1)

    def _outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    @torch.no_grad()
    def _agrees(self, model: PreTrainedModel) -> bool:
        """Try whether the layers, one after another, compute what the model does."""
        training = model.training
        tokens = (torch.arange(4)[None] + (model.config.pad_token_id or 0) + 1) % model.config.vocab_size
        model.eval()
        try:
            logits = self._outputs(model.base_model(tokens).last_hidden_state)
            wanted = model(tokens)
            return torch.allclose(logits, torch.stack([wanted.start_logits, wanted.end_logits], -1), atol=1e-5)
        except (AttributeError, RuntimeError, TypeError):  # what layers raise that are given another's output
            return False
        finally:
            model.train(training)


def build_policy(model: ModelConfig, vocabulary: Vocabulary, max_length: int) -> PolicyNetwork:
    """Build a policy's network on the CPU in fp32, new or on the encoder of a checkpoint; what is drawn comes from
    torch's generator.

    Raises:
        UserError: for a model that cannot be built or loaded, or cannot be a policy's.
    """
    model = model.model_copy(update={"dropout": 0.0})
    try:
        config = backbone_config(model, vocabulary, max_length)
    except UserError as error:
        raise UserError(f"policy.{error}") from None
    if not is_encoder(config):
        raise UserError(f"policy.model.family: '{config.model_type}' is no encoder, which sees a token's both sides")
    config.num_labels = 2
    try:
        if model.checkpoint:
            built = AutoModelForQuestionAnswering.from_pretrained(model.checkpoint, config=config, dtype=torch.float32)
        else:
            built = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers and torch raise whatever they meet
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"policy.model: '{config.model_type}' cannot be built for spans: {reason}") from None
    return PolicyNetwork(built.train())
