"""What an annotation costs at training time: batches without and with it, masked at random and by it, and beside them
the forward and backward pass that they feed, in CPU time of one thread.

    python -m benchmarks.annotations
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import append_result, environment, print_table
from benchmarks.loader import synthesise
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import NO_UNIT, Annotation, folder_of
from pretrain.data.loader import Loader
from pretrain.data.store import Store
from pretrain.model.encoder import ModelConfig, backbone_config, build_encoder
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.vocabulary import Vocabulary
from pretrain.objectives import build_objectives
from pretrain.objectives.base import parse_objectives

VOCABULARY = Vocabulary(size=30522, pad_id=0, mask_id=4, special_ids=np.arange(5))
ROW_LENGTH = 512
WITHOUT, WITH = "random, no annotation", "learned, annotation"


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/annotations.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base"), help="of the model")
    parser.add_argument("--batches", type=int, default=400, metavar="N", help="turns of each system")
    parser.add_argument("--steps", type=int, default=7, metavar="N", help="of the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.size, args.batches, args.steps)
    print_table(rows)
    setup = {"size": args.size, "batches": args.batches, "steps": args.steps, "row_length": ROW_LENGTH}
    print(f"added to {append_result('annotations', {**environment(), 'setup': setup, 'cost': rows})}")


def measure(folder: Path, size: str, batches: int, steps: int) -> list[dict]:
    """Return a row without the annotation and one with it: medians of CPU time a token, and of the difference between
    neighbours, as a part of a step."""
    synthesise(folder / "store", 1_000_000)
    store = Store(folder / "store")
    annotate_tenth(store, "learned")
    keys = {"row_length": ROW_LENGTH, "batch_rows": 8, "micro_batch_rows": 8}
    policies = {WITHOUT: {}, WITH: {"masking": {"policy": "learned"}}}
    objectives, loaders = {}, {}
    for seed, (name, config) in enumerate(policies.items()):
        objectives[name] = build_objectives(parse_objectives({"mlm": config}, "benchmark"), VOCABULARY, seed=0)["mlm"]
        wanted = {its: Annotation(store, its, kind) for its, kind in objectives[name].annotations.items()}
        loaders[name] = Loader(store, seed=seed, annotations=wanted, **keys)  # other samples each
        for _ in range(batches):  # so that the files are in the system's cache
            loaders[name].next()
    config = backbone_config(ModelConfig(size=size, dropout=0.0), VOCABULARY, 128)
    encoder = build_encoder(ModelConfig(size=size), config, device_type="cpu", dtype=torch.float32)
    model = MultiObjectiveModel(encoder, {"mlm": objectives[WITHOUT]})

    def step(batch) -> None:
        view = objectives[WITHOUT].corrupt(batch, 0.0)
        loss, _ = model({"mlm": view}, {term: 1.0 for term in view.counts})
        loss.backward()
        model.zero_grad()

    loading = {name: [] for name in policies}
    masking = {name: [] for name in policies}
    for turn in range(batches):
        for name in list(policies)[:: 1 if turn % 2 else -1]:
            batch, nanoseconds = timed(loaders[name].next)
            loading[name].append(nanoseconds / batch.tokens)
    batch = loaders[WITH].next()
    for turn in range(batches):
        for name in list(policies)[:: 1 if turn % 2 else -1]:
            _, nanoseconds = timed(partial(objectives[name].corrupt, batch.micro_batches[0], 0.0))
            masking[name].append(nanoseconds / batch.tokens)
    whole = statistics.median(timed(partial(step, batch.micro_batches[0]))[1] / batch.tokens for _ in range(steps))
    rows = []
    for name in policies:
        more = statistics.median(
            a + b - c - d
            for a, b, c, d in zip(loading[name], masking[name], loading[WITHOUT], masking[WITHOUT], strict=True)
        )
        rows.append(
            {
                "masking": name,
                "batch, ns/token": statistics.median(loading[name]),
                "choice, ns/token": statistics.median(masking[name]),
                "step, ns/token": whole,
                "more, % of a step": 100 * more / whole,
            }
        )
    return rows


def timed(call: Callable) -> tuple:
    """Return what a call returns, and its CPU time in nanoseconds."""
    began = time.process_time_ns()
    made = call()
    return made, time.process_time_ns() - began


def annotate_tenth(store: Store, name: str) -> None:
    """Mark two tokens of every twenty as a unit."""
    writer = AnnotationWriter(folder_of(store, name), "spans", {}, store.fingerprint)
    lengths = np.array(store.lengths, np.int64)
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    writer.append(np.where(places % 20 < 2, places // 20, NO_UNIT), lengths)
    writer.finish()
    writer.publish()


if __name__ == "__main__":
    main()
