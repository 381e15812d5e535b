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

SIZES = {"bert": _BERT_LIKE, "roberta": _BERT_LIKE, "electra": _ELECTRA, "modernbert": _MODERNBERT, "llama": _BERT_LIKE}
