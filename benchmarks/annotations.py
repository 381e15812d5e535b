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
    parser.add_argument("--batches", type=int, default=60, metavar="N", help="a round")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each system")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.size, args.batches, args.rounds)
    print_table(rows)
    setup = {"size": args.size, "batches": args.batches, "rounds": args.rounds, "row_length": ROW_LENGTH}
    print(f"added to {append_result('annotations', {**environment(), 'setup': setup, 'cost': rows})}")


def measure(folder: Path, size: str, batches: int, rounds: int) -> list[dict]:
    """Return a row without the annotation and one with it: CPU time a token, and by how much of a step that is more."""
    synthesise(folder / "store", 4_000_000)
    store = Store(folder / "store")
    annotate_tenth(store, "learned")
    keys = {"row_length": ROW_LENGTH, "batch_rows": 8, "micro_batch_rows": 8}
    policies = {WITHOUT: {}, WITH: {"masking": {"policy": "learned"}}}
    objectives, loaders = {}, {}
    for name, config in policies.items():
        objectives[name] = build_objectives(parse_objectives({"mlm": config}, "benchmark"), VOCABULARY, seed=0)["mlm"]
        wanted = {its: Annotation(store, its, kind) for its, kind in objectives[name].annotations.items()}
        loaders[name] = Loader(store, seed=0, annotations=wanted, **keys)
        loaders[name].next()  # packs the first window
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
    steps = []
    for _ in range(rounds):
        for name in policies:
            made = [loaders[name].next for _ in range(batches)]
            found, nanoseconds = timed(made)
            loading[name].append(nanoseconds)
            views = [lambda each=each, its=objectives[name]: its.corrupt(each.micro_batches[0], 0.0) for each in found]
            masking[name].append(timed(views, sum(each.tokens for each in found))[1])
        batch = loaders[WITHOUT].next()
        steps.append(timed([partial(step, batch.micro_batches[0])], batch.tokens)[1])
    rows, whole = [], statistics.median(steps)
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


def timed(calls: list[Callable], tokens: int | None = None) -> tuple[list, float]:
    """Return what the calls return, and their CPU nanoseconds for each of ``tokens``, by default those they return."""
    began = time.process_time_ns()
    made = [call() for call in calls]
    taken = time.process_time_ns() - began
    return made, taken / (tokens or sum(each.tokens for each in made))


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
