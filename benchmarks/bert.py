"""The model of benchmarks that set a plan against a run: a BERT of any width, on masked language modelling."""

from pathlib import Path

SEQUENCE, VOCABULARY = 128, 30522


def document(store: Path, *, width: int, layers: int, batch_rows: int, micro_batch_rows: int) -> dict:
    """Return a recipe without dropout, whose masks a CPU keeps otherwise than a GPU, and with nothing but its steps."""
    overrides = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width,
    }
    return {
        "run": "unused",
        "data": {"store": str(store), "row_length": SEQUENCE},
        "model": {"family": "bert", "size": None, "dropout": 0.0, "overrides": overrides},
        "objectives": {"mlm": {}},
        "training": {"steps": 1000, "batch_rows": batch_rows, "micro_batch_rows": micro_batch_rows},
        "heldout": {"rows": 0},
    }
