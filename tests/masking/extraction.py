"""A toy in which the right spans are known: a few words are always the answer, after a cue, and occur nowhere else."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PLAIN, ANSWERS, PARTS = [f"w{i}" for i in range(40)], [f"a{i}" for i in range(10)], ["##x", "##y"]


def wordpiece(words: list[str], lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of BERT's kind with these entries behind the special ones."""
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    return wordpiece([*PLAIN, *ANSWERS, "cue", *PARTS])


def tiny_bert(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, positions: int = 64) -> Path:
    """Write a masked-language model with random weights, as an export would be."""
    tokenizer = tokenizer or toy_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def context(rng: random.Random, most: int = 25) -> dict:
    """A context of 9 to ``most`` words, some of two tokens, and its answer: a word of one or two tokens."""
    words = [rng.choice(PLAIN) + rng.choice(["", "", "x"]) for _ in range(rng.randint(9, most))]
    at, answer = rng.randrange(len(words)), rng.choice(ANSWERS) + rng.choice(["", "y"])
    before = " ".join([*words[:at], "cue", ""])
    return {
        "context": before + " ".join([answer, *words[at:]]),
        "answers": [{"text": answer, "start": len(before)}],
    }


def toy_data(file: Path, contexts: int = 300, seed: int = 0) -> Path:
    rng = random.Random(seed)
    file.write_text("".join(json.dumps(context(rng)) + "\n" for _ in range(contexts)))
    return file
