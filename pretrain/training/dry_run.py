"""``--dry-run``: one largest batch before the real thing, to see that it fits."""

import resource
from types import SimpleNamespace

import numpy as np
import torch

from pretrain.data.annotations import PARTS_OF_SPEECH
from pretrain.data.batch import Batch, collate
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.weighing import Weighing


def largest_batch(parts: Parts) -> Batch:
    """Return a micro-batch without a free place: rows full of samples of the store's greatest length."""
    longest, row_length = parts.store.max_length, parts.row_length
    lengths = [longest] * (row_length // longest) + ([row_length % longest] if row_length % longest else [])
    if not parts.recipe.data.packing:
        lengths = [longest]
    rows = parts.recipe.training.micro_batch_rows
    ids = np.arange(rows * len(lengths)).reshape(rows, len(lengths))
    sizes = np.tile(lengths, rows).astype(np.int64)
    ordinary = parts.vocabulary.ordinary_ids
    tokens = ordinary[np.arange(sizes.sum()) % len(ordinary)]
    source = SimpleNamespace(
        index=np.stack([np.cumsum(sizes) - sizes, sizes], axis=1),
        tokens=SimpleNamespace(runs=lambda offsets, lengths: tokens),
    )
    made_up = SimpleNamespace(look_up=lambda ids, offsets, lengths: np.arange(lengths.sum()) % len(PARTS_OF_SPEECH))
    names = {name for objective in parts.model.objectives.values() for name in objective.annotations}
    annotations = dict.fromkeys(names, made_up)
    return collate(source, list(ids), list(np.zeros_like(ids)), 0, row_length, parts.vocabulary.pad_id, annotations)


def dry_run(parts: Parts, engine: Engine) -> str:
    """Run forward, backward and update once for every plan the sampler can make; return a page of facts. All ranks
    call it."""
    batch = largest_batch(parts).to(engine.device)
    names, weighing = list(parts.model.objectives), Weighing(parts, engine)
    for plan in [names] if parts.sampler.mixes else [[name] for name in names]:
        views = {name: parts.model.objectives[name].corrupt(batch, progress=0.0) for name in plan}
        terms = [term for name in plan for term in parts.model.objectives[name].terms]
        scales = dict.fromkeys(terms, 1e-3)
        engine.begin_step()
        weighing.rehearse(views, scales)
        loss, _ = engine(views, scales)
        engine.backward(loss)
        engine.step(0.0, parts.model.trained_by(plan))
    training, recipe = parts.recipe.training, parts.recipe
    accumulation = training.batch_rows // (training.micro_batch_rows * engine.world_size)
    if engine.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of {torch.cuda.get_device_name()}"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (resident, whole process)"
    tokens = parts.store.meta["tokens"]
    lines = [
        f"model          {sum(parts.sizes.values()):,} parameters",
        *(f"  {name:<20} {size:>14,}" for name, size in parts.sizes.items()),
        f"store          {len(parts.store):,} samples, {tokens:,} tokens, longest {parts.store.max_length}",
        f"step           {training.batch_rows} rows × {parts.row_length} tokens = at most "
        f"{training.batch_rows * parts.row_length:,} tokens",
        f"               {engine.world_size} ranks × {accumulation} micro-steps × {training.micro_batch_rows} rows",
        f"ZeRO           stage {engine.stage}, {str(engine.dtype).removeprefix('torch.')}",
        f"attention      {parts.model.encoder.attention}",
        f"peak memory    {memory}, rank {engine.rank}",
        f"run            {training.steps:,} steps into {recipe.run}",
    ]
    return "\n".join(lines)
