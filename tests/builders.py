"""What many tests need: random samples, stores, batches laid out by a plain loop, a tokenizer, tiny encoders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pretrain.data.batch import Batch
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.model.encoder import Encoder, ModelConfig, backbone_config, build_encoder
from pretrain.model.vocabulary import Vocabulary

PAD, UNK, CLS, SEP, MASK = range(5)
VOCABULARY = Vocabulary(size=211, pad_id=PAD, mask_id=MASK, special_ids=np.array([PAD, CLS, SEP, MASK]))

SENTINELS = tuple(range(VOCABULARY.size, VOCABULARY.size + 9))
PAIRED_VOCABULARY = replace(
    VOCABULARY,
    size=VOCABULARY.size + len(SENTINELS),
    special_ids=np.array([*VOCABULARY.special_ids, *SENTINELS]),
    bos_id=CLS,
    eos_id=SEP,
    sentinel_ids=np.array(SENTINELS),
)
"""The same, and what an encoder–decoder needs."""

_BERT_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY: dict[str, dict] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "electra": {**_BERT_LIKE, "embedding_size": 24},
    # One global layer, one that sees 4 tokens to either side.
    "modernbert": {**_BERT_LIKE, "layer_types": ["full_attention", "sliding_attention"], "local_attention": 8},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "deberta-v2": {**_BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "llama": {**_BERT_LIKE, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}
"""Family → overrides that make a model of about ten thousand weights besides its embeddings."""
_T5_LIKE = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "initializer_factor": 2.0}
_BART_SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
TINY_PAIRED: dict[str, dict] = {
    "t5": _T5_LIKE,
    "mt5": _T5_LIKE,
    "bart": {
        "d_model": 32,
        "init_std": 0.2,
        **{f"{side}_{key}": number for side in ("encoder", "decoder") for key, number in _BART_SIDE.items()},
    },
}
"""The same for encoder–decoders."""


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small are slower on two threads, far slower when the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Return samples of the given lengths: [CLS], random text, [SEP], as far as the length allows."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        sample = rng.choice(VOCABULARY.ordinary_ids, length)
        sample[0] = CLS
        if length > 1:
            sample[-1] = SEP
        samples.append(sample)
    return samples


def write_store(folder: Path, samples: Sequence[np.ndarray], vocabulary_size: int = VOCABULARY.size) -> Store:
    """Write and open a store of ``samples``."""
    writer = StoreWriter(folder, vocabulary_size)
    if samples:
        writer.append(np.concatenate(samples), np.array([len(sample) for sample in samples]))
    writer.close()
    return Store(folder)


def lay_out(
    rows: Sequence[Sequence[np.ndarray]],
    row_length: int | None = None,
    ids: Sequence[int] | None = None,
    visits: Sequence[int] | None = None,
    first_row: int = 0,
    pad: int = PAD,
) -> Batch:
    """Return the batch whose rows hold the given samples, built place by place.

    ``ids`` (default 0, 1, …) and ``visits`` (default 0) are the samples', row after row.
    """
    samples = [sample for row in rows for sample in row]
    row_length = row_length or max((sum(map(len, row)) for row in rows), default=0)
    tokens = torch.full((len(rows), row_length), pad)
    segment_ids, position_ids = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    segment, sample_rows = 0, []
    for number, row in enumerate(rows):
        column = 0
        for sample in row:
            for position, token in enumerate(sample):
                tokens[number, column] = int(token)
                segment_ids[number, column] = segment
                position_ids[number, column] = position
                column += 1
            segment += 1
            sample_rows.append(first_row + number)
    return Batch(
        tokens=tokens,
        segment_ids=segment_ids,
        position_ids=position_ids,
        sample_ids=torch.tensor(range(len(samples)) if ids is None else ids, dtype=torch.int64),
        visits=torch.tensor([0] * len(samples) if visits is None else visits, dtype=torch.int64),
        lengths=torch.tensor([len(sample) for sample in samples], dtype=torch.int64),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
    )


def padded(samples: Sequence[np.ndarray], **kwargs) -> Batch:
    """Return the batch with one sample a row."""
    return lay_out([[sample] for sample in samples], **kwargs)


def places_of(batch: Batch, sample: int) -> torch.Tensor:
    """Return the places of one sample in the flattened rows, in order of position."""
    return (batch.segment_ids.reshape(-1) == sample).nonzero().squeeze(1)


def tiny_encoder(family: str, seed: int = 0, *, dropout: float | None = 0.0, max_length: int = 64, **keys) -> Encoder:
    """Return a small random backbone of a family, in evaluation mode; ``keys`` go to :class:`ModelConfig`.

    The weights are drawn wider than usual, so that attention and positions matter to the hidden states.
    """
    paired = family in TINY_PAIRED
    vocabulary, families = (PAIRED_VOCABULARY, TINY_PAIRED) if paired else (VOCABULARY, TINY)
    width = {} if paired else {"initializer_range": 0.2}
    overrides = {**families.get(family, {}), **width, **keys.pop("overrides", {})}
    model = ModelConfig(family=family, size=None, overrides=overrides, dropout=dropout, **keys)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = backbone_config(model, vocabulary, max_length)
        encoder = build_encoder(model, config, device_type="cpu", dtype=torch.float32)
        for parameter in encoder.pretrained.parameters():
            if parameter.dim() == 1:  # biases of zero and gains of one would hide that they are used
                parameter.data += 0.1 * torch.randn_like(parameter)
    encoder.pretrained.eval()
    return encoder.eval()


def word_tokenizer(size: int = VOCABULARY.size) -> PreTrainedTokenizerFast:
    """Return a tokenizer of BERT's kind whose ids are those of :data:`VOCABULARY`; its words are ``w5``, ``w6``, …"""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["mask_token"] = "[MASK]"
    words = [*names.values(), *(f"w{i}" for i in range(len(names), size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
