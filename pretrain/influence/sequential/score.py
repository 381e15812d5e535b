"""``medley score``: the self-influence of every sample of a corpus under a trained model."""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pretrain.data.annotations import Annotation
from pretrain.data.batch import Batch, collate
from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, RunError, UserError, unknown
from pretrain.export import load_model, resolve_checkpoint
from pretrain.influence.ghost import GhostNorms
from pretrain.influence.presence import PresenceConfig
from pretrain.influence.sequential.scores import ScoreWriter
from pretrain.masking.config import LIVE
from pretrain.masking.learning.live import LiveExtractor
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import Recipe, load_recipe
from pretrain.training import checkpoint as checkpoints
from pretrain.training.run import share_cores

DEFAULT_NAME = "presence"
BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}  # of a forward and backward pass, padding included
COUNTED_SAMPLES = 512  # by which the terms of an objective are brought to the same scale


class Scorer:
    """Scores samples of a store: the squared norm of the gradient of a sample's loss, over the layers K, without
    dropout.

    Losses are such that their mean over the samples is the objective's. A sample's mask, or other corruption, is drawn
    by its id, and anew for each of ``visits``, over which the scores are averaged.

    Args:
        model: in evaluation mode, on the device that shall compute.
        name: the objective that scores.
        store: whose samples are scored.
        layers, score: K, and how norms over it are found; see :class:`GhostNorms`.
        length_normalised: score the mean of a sample's losses and not their sum.
        visits: how many corruptions of a sample are scored.
        batch_tokens: most tokens of a pass, padding included, if samples are no longer.
    """

    def __init__(
        self,
        model: MultiObjectiveModel,
        name: str,
        store: Store,
        *,
        layers: str | list[str] = "first_block",
        score: str = "gram",
        length_normalised: bool = False,
        visits: int = 1,
        batch_tokens: int | None = None,
    ):
        self.model, self.objective, self.store = model, model.objectives[name], store
        self.length_normalised, self.visits = length_normalised, visits
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        wanted = self.objective.annotations
        self.annotations = {key: _annotation(store, key, kind) for key, kind in wanted.items()}
        measured = {id(each) for each in GhostNorms(model, layers, score).parameters}
        for parameter in model.parameters():  # no other gradient is formed
            parameter.requires_grad_(id(parameter) in measured)
        self.ghost = GhostNorms(model, layers, score)
        self.scales = self._scales()

    def scores(self, begin: int, end: int) -> np.ndarray:
        """Return the scores of the samples from ``begin`` to before ``end``, ``[samples]`` fp64."""
        found = np.zeros(end - begin)
        for visit in range(self.visits):
            for ids in self._batches(begin, end):
                batch = self._batch(ids, visit).to(self.device)
                view = self.objective.corrupt(batch, progress=1.0)
                with self.ghost.recording(view.batch, deferred=False):
                    loss, _ = self.model({self.objective.name: view}, self.scales)
                    loss.backward()
                self.model.zero_grad(set_to_none=True)
                squares = self.ghost.squared_norms().double()
                if self.length_normalised:
                    squares = squares / sum(view.counts.values()).clamp(min=1) ** 2
                found[ids - begin] += squares.cpu().numpy() / self.visits
        if not np.isfinite(found).all():
            bad = begin + int(np.flatnonzero(~np.isfinite(found))[0])
            raise UserError(f"--checkpoint: the gradient of sample {bad} is not finite; score with another one")
        return found

    def _scales(self) -> dict[str, float]:
        """Return term → its weight over its mean number of targets a sample, of the first samples."""
        totals = dict.fromkeys(self.objective.terms, 0.0)
        number = min(len(self.store), COUNTED_SAMPLES)
        for ids in self._batches(0, number):
            counts = self.objective.corrupt(self._batch(ids, 0).to(self.device), progress=1.0).counts
            totals = {term: total + float(counts[term].sum()) for term, total in totals.items()}
        weights = self.objective.terms.items()
        return {term: weight * number / totals[term] if totals[term] else 0.0 for term, weight in weights}

    def _batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Yield samples' ids, those of like length together; the longest first, so that memory is short at once or
        never."""
        lengths = np.array(self.store.lengths[begin:end], np.int64)
        order, at = np.argsort(-lengths, kind="stable"), 0
        while at < len(order):
            rows = max(1, self.batch_tokens // int(lengths[order[at]]))
            yield begin + order[at : at + rows]
            at += rows

    def _batch(self, ids: np.ndarray, visit: int) -> Batch:
        """Lay samples out one a row."""
        rows, visits = list(ids[:, None]), list(np.full_like(ids, visit)[:, None])
        longest = int(self.store.lengths[ids[0]])
        return collate(self.store, rows, visits, 0, longest, self.objective.vocabulary.pad_id, self.annotations)


def score(
    checkpoint: str | Path,
    corpus: str | Path,
    name: str = DEFAULT_NAME,
    *,
    objective: str | None = None,
    layers: str | list[str] | None = None,
    method: str | None = None,
    length_normalised: bool | None = None,
    visits: int = 1,
    overwrite: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> dict:
    """Score the samples of ``train`` of a prepared corpus, or of a view of one; what was interrupted goes on.

    Args:
        checkpoint: a checkpoint, or a run folder, whose newest good one is then taken.
        corpus: what ``medley prepare`` or ``medley filter`` wrote, with the checkpoint's tokenizer.
        name: of the scores, which come to lie in ``corpus/train/scores/NAME``.
        objective, layers, method, length_normalised: as the keys ``score_objective``, ``layers``, ``score`` and
            ``length_normalised`` of ``weigher``; None: those of the checkpoint's recipe, or their defaults if it weighs
            by nothing of the kind.
        visits: how many corruptions of a sample are scored.
        overwrite: replace scores of this name.
        rank, ranks: which share of the work is this process's; the last to end puts the scores in their place.

    Returns:
        ``samples`` scored by this process, ``seconds``, the ``folder``, and whether this process put it in its place
        (``published``). Nothing is done where the very same scores are there.

    Raises:
        UserError: for whatever the user can mend.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"--out {name}: must be a name of letters, digits, '_' and '-'; scores lie beside their store")
    if visits < 1:
        raise UserError(f"--visits {visits}: must be at least 1")
    folder, corpus = resolve_checkpoint(checkpoint), Path(corpus)
    checkpoints.verify(folder)
    recipe = load_recipe(folder / "config.yaml").model_copy(update={"impl": "auto"})
    if not (corpus / "train" / "meta.json").is_file():
        raise UserError(f"--store {corpus}: no prepared corpus: it has no store 'train'; make one with medley prepare")
    store = Store(corpus / "train")
    weigher = recipe.weigher_config if isinstance(recipe.weigher_config, PresenceConfig) else PresenceConfig()
    keys = {
        "layers": weigher.layers if layers is None else layers,
        "score": method or weigher.score,
        "length_normalised": weigher.length_normalised if length_normalised is None else length_normalised,
        "visits": visits,
    }
    model = _model(folder, recipe, corpus, store)
    objective = _objective(model, objective or weigher.score_objective)
    manifest = hashlib.sha256((folder / checkpoints.MANIFEST).read_bytes()).hexdigest()
    made_by = {"checkpoint": str(folder), "manifest_sha256": manifest, "objective": objective, **keys}
    scorer = Scorer(model, objective, store, **keys)
    return _write(scorer, ScoreWriter(store, name, made_by, overwrite), rank, ranks)


def _write(scorer: Scorer, writer: ScoreWriter, rank: int, ranks: int) -> dict:
    """Score the chunks of this rank that are missing, showing how far it is."""
    own = range(rank, len(writer), ranks) if not writer.is_published() else range(0)
    sizes = {chunk: int(np.subtract(*writer.span(chunk)[::-1])) for chunk in own}
    todo = [chunk for chunk in own if not writer.is_done(chunk)]
    began, done = time.monotonic(), sum(sizes.values()) - sum(sizes[chunk] for chunk in todo)
    disable = None if rank == 0 else True
    with tqdm(total=sum(sizes.values()), initial=done, unit="sample", desc="scoring", disable=disable) as bar:
        for chunk in todo:
            writer.write(chunk, scorer.scores(*writer.span(chunk)))
            bar.update(sizes[chunk])
    published = writer.publish()
    return {
        "samples": sum(sizes[chunk] for chunk in todo),
        "seconds": time.monotonic() - began,
        "folder": str(writer.folder),
        "published": published,
    }


def _model(folder: Path, recipe: Recipe, corpus: Path, store: Store) -> MultiObjectiveModel:
    """Return the checkpoint's model, in fp32 without dropout."""
    tokenizer, other = load_tokenizer(folder / "model"), load_tokenizer(corpus / "tokenizer")
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"--store {corpus}: its tokenizer is not the checkpoint's; prepare the corpus with that: "
            f"medley prepare … --tokenizer {folder / 'model'} --out {corpus} --overwrite"
        )
    vocabulary = Vocabulary.of(tokenizer, store.token_counts(len(tokenizer)))
    model = load_model(folder, recipe, vocabulary)
    room = model.encoder.positions
    if room is not None and store.max_length > room:
        raise UserError(
            f"--store {corpus}: has samples of {store.max_length} tokens, the model has room for {room}; prepare it "
            f"with --max-length {room}"
        )
    if torch.cuda.is_available():
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    return model


def _objective(model: MultiObjectiveModel, wanted: str | None) -> str:
    """Return the objective that scores."""
    able = [name for name, each in model.objectives.items() if not (each.couples_samples or each.rows_are_units)]
    if wanted in (None, "each"):
        wanted = "mlm" if "mlm" in able else next(iter(able), None)
    if wanted is None or wanted in set(model.objectives) - set(able):
        raise UserError(
            f"--objective: {wanted or ', '.join(model.objectives)} cannot score the samples of a store one by one; "
            + (f"name one of {', '.join(able)}" if able else "take a checkpoint of a run with another objective")
        )
    if wanted not in able:
        raise unknown("objective", wanted, able, "--objective")
    return wanted


def _annotation(store: Store, name: str, kind: str):
    if name.startswith(LIVE):
        return LiveExtractor(name.removeprefix(LIVE)).on(store)
    return Annotation(store, name, kind)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``medley score``."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="a checkpoint, or a run (its newest good checkpoint)")
    add("--store", required=True, metavar="CORPUS", help="prepared corpus, or a view of one")
    add("--out", default=DEFAULT_NAME, metavar="NAME", help="of the scores, beside the store (default: %(default)s)")
    add("--objective", metavar="NAME", help="that scores (default: the recipe's, mlm, or the first that can)")
    add("--layers", metavar="K", help="names with commas, first_block, layer_norms, all (default: the recipe's)")
    add("--score", dest="method", choices=("gram", "sketch", "layer_norm"), help="how norms are found (default: gram)")
    add("--length-normalised", action="store_true", default=None, help="score the mean of a sample's losses")
    add("--visits", type=int, default=1, metavar="N", help="corruptions to average over (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace scores of this name")


def run(args: argparse.Namespace) -> None:
    """Run ``medley score`` as the only process, or as one of those that a launcher has started."""
    layers = args.layers.split(",") if args.layers and "," in args.layers else args.layers
    names = ("objective", "method", "length_normalised", "visits", "overwrite")
    keys = {name: getattr(args, name) for name in names} | {"layers": layers}
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share_cores()
    summary = score(args.checkpoint, args.store, args.out, **keys, rank=rank, ranks=ranks)
    samples, seconds = summary["samples"], summary["seconds"]
    whose = f"rank {rank}: " if ranks > 1 else ""
    what = f" → {summary['folder']}" if summary["published"] else ""
    if not samples and not summary["published"]:
        what = f", nothing was left to score for {summary['folder']}"
    print(f"{whose}{samples:,} samples in {seconds:,.1f} s ({samples / seconds:,.1f} samples/s){what}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run as one of several ranks; return the exit code."""
    parser = argparse.ArgumentParser(description="Score the samples of a prepared corpus on several ranks.")
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    try:
        run(parser.parse_args(argv))
        return EXIT_DONE
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"score: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RunError as error:
        print(f"score: failed: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
