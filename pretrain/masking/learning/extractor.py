"""A span extractor: an encoder with two outputs a token, how well a span starts there and how well one ends there."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

from pretrain.errors import UserError
from pretrain.evaluation.model import load_tokenizer, load_with_head, longest_input, quiet
from pretrain.masking.learning.spans import Borders, Spans, borders, span_scores, top_spans
from pretrain.model.vocabulary import Vocabulary

FORMAT_VERSION = 1
CARD = "extractor.json"  # what tells an extractor from another model
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Card:
    """What ``extractor.json`` says of an extractor."""

    method: str
    """How it was learnt."""
    max_length: int
    """The most tokens it reads at once, special ones included."""
    max_span: int
    """The longest span it was made for, in tokens."""
    top_k: int
    """Spans of a window that it was judged by."""


class Extractor:
    """Scores and chooses spans.

    Args:
        model: one of transformers' models for question answering: two logits a token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.model, self.tokenizer = model.to(self.device), tokenizer
        self.vocabulary = Vocabulary.of(tokenizer)
        self.longest = longest_input(model, tokenizer)
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters

    @classmethod
    def on(cls, source: str) -> tuple["Extractor", list[str]]:
        """Put fresh outputs, drawn from torch's current random state, on the encoder of a Hugging Face folder or name.

        Returns:
            The extractor, and the names of the encoder's weights that the source lacks, which are therefore random.

        Raises:
            UserError: if it cannot be loaded, or its tokenizer is not a fast one.
        """
        tokenizer = load_tokenizer(source)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(f"{source}: its tokenizer is not a fast one (no tokenizer.json), which tells words' places")
        model, random = load_with_head(AutoModelForQuestionAnswering, source, tokenizer, 2)
        return cls(model, tokenizer), random

    def save(self, folder: Path, card: Card) -> None:
        """Write weights, config, tokenizer and card into a folder."""
        with quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(card)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> tuple["Extractor", Card]:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the folder holds no extractor, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / CARD).is_file():
            raise UserError(f"{folder}: no span extractor: no {CARD}; make one with 'medley learn-mask supervised'")
        try:
            document = json.loads((folder / CARD).read_text())
            version = document.pop("format_version")
            if version != FORMAT_VERSION:
                raise UserError(f"{folder / CARD}: format version {version}, this program reads {FORMAT_VERSION}")
            card = Card(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / CARD}: is damaged ({error!r}); learn the extractor again") from None
        try:
            extractor, random = cls.on(str(folder))
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS}: is damaged ({error}); learn the extractor again") from None
        if random:
            raise UserError(f"{folder}: {len(random)} weights are missing, such as {random[0]}; learn it again")
        extractor.model.eval()
        return extractor, card

    def pad(self, samples: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay samples out, one a row: tokens ``[rows, length]`` int64, and which places hold one, on the device."""
        lengths = [len(sample) for sample in samples]
        tokens = np.full((len(samples), max(lengths)), self.vocabulary.pad_id, np.int64)
        for row, sample in zip(tokens, samples, strict=True):
            row[: len(sample)] = sample
        places = torch.arange(tokens.shape[1], device=self.device)
        real = places < torch.tensor(lengths, device=self.device)[:, None]
        return torch.from_numpy(tokens).to(self.device), real

    def logits(self, tokens: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of start and end, each ``[rows, length]`` fp32."""
        mask = {"attention_mask": real.long()} if self._takes_mask else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(input_ids=tokens, **mask)
        return out.start_logits.float(), out.end_logits.float()

    def borders(self, tokens: torch.Tensor, real: torch.Tensor) -> Borders:
        """Return where spans of the padded samples may begin and end."""
        return borders(tokens, real, self.vocabulary.tables(tokens.device))

    @torch.no_grad()
    def spans(self, tokens: torch.Tensor, real: torch.Tensor, k: int, max_span: int) -> Spans:
        """Choose at most ``k`` spans of at most ``max_span`` tokens in each row; none overlap."""
        return top_spans(span_scores(*self.logits(tokens, real), self.borders(tokens, real), max_span), k)
