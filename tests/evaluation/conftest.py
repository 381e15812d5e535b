"""A random BERT of one layer, its word tokenizer, and toy tasks it can learn in a second."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

GOOD, BAD = ["splendid", "warm", "lively"], ["dreary", "cold", "stale"]
NEUTRAL = ["the", "a", "of", "house", "river", "letter", "morning", "was", "us", "very", "old", "man", "long", "road"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small are slower on two threads, far slower when the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *NEUTRAL, *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a masked-language model with random weights, as an export would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(rng: random.Random, *marked: str) -> str:
    """Neutral words, an odd number of them now and then, with the marked ones somewhere between."""
    words = [*rng.choices(NEUTRAL, k=rng.randint(1, 9)), *marked]
    rng.shuffle(words)
    return " ".join(words)


def write_task(folder: Path, make_row, sizes: tuple[int, int, int] = (203, 41, 43)) -> Path:
    rng = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        rows = (json.dumps(make_row(rng)) for _ in range(size))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def sentiment_row(rng: random.Random) -> dict:
    """Two thirds good, one third bad: the majority's accuracy is about 0.67."""
    good = rng.random() < 0.67
    return {"text": sentence(rng, rng.choice(GOOD if good else BAD)), "label": "good" if good else "bad"}


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks") / "sentiment", sentiment_row)
