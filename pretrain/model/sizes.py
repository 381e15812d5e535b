"""Named sizes of the backbones that are trained from scratch."""

# family → size → keys of its Hugging Face config
_BERT_LIKE = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
# ELECTRA's token embeddings can be narrower than the trunk; ours are as wide, so that a generator can share them.
_ELECTRA = {size: {**keys, "embedding_size": keys["hidden_size"]} for size, keys in _BERT_LIKE.items()}
# Base and large as published (arXiv 2412.13663, table 4); the smaller ones keep their ratio of depth to width.
_MODERNBERT = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 192},
    "small": {"hidden_size": 384, "num_hidden_layers": 13, "num_attention_heads": 6, "intermediate_size": 576},
    "base": {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
    "large": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624},
}

# As published from small on (arXiv 1910.10683, section 3.7): as many layers in the decoder as in the encoder.
_T5 = {
    "tiny": {"d_model": 128, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 2},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
# As published from small on (arXiv 2010.11934, section 3.2).
_MT5 = {
    "tiny": {"d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}


def _bart(width: int, layers: int) -> dict[str, int]:
    """Return BART's keys; base and large as published (arXiv 1910.13461, section 2.1)."""
    sides = ("encoder", "decoder")
    keys = {"layers": layers, "attention_heads": width // 64, "ffn_dim": 4 * width}
    return {"d_model": width} | {f"{side}_{key}": number for side in sides for key, number in keys.items()}


_BART = {"tiny": _bart(128, 2), "small": _bart(512, 4), "base": _bart(768, 6), "large": _bart(1024, 12)}

SIZES = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "electra": _ELECTRA,
    "modernbert": _MODERNBERT,
    "llama": _BERT_LIKE,
    "t5": _T5,
    "mt5": _MT5,
    "bart": _BART,
}
