"""From a recipe to everything a run needs. Whatever is wrong with the input comes out here, before any process
group."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fused_objectives.backend import why_no_triton
from pretrain.data.annotations import Annotation
from pretrain.data.loader import Loader
from pretrain.data.local_cache import LocalCache
from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.influence import Weigher, build_weigher
from pretrain.masking.config import LIVE
from pretrain.masking.learning.live import LiveExtractor, LiveSpans
from pretrain.model.encoder import Encoder, backbone_config, build_encoder
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.initialisation import fingerprint
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.model.vocabulary import Vocabulary
from pretrain.objectives import Objective, build_objectives
from pretrain.recipe import Recipe
from pretrain.sampling import Sampler, build_sampler
from pretrain.sampling.tartan import END_TASK, MetaTartanSampler


@dataclass(frozen=True)
class Parts:
    """What the trainer is made of."""

    recipe: Recipe
    store: Store
    heldout: Store | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    model: MultiObjectiveModel
    initialisation: str
    """Fingerprint of the backbone's weights before the first step."""
    components: dict[str, list[torch.nn.Parameter]]
    sizes: dict[str, int]
    """Component → number of parameters."""
    sampler: Sampler
    weigher: Weigher
    row_length: int
    extractors: dict[str, LiveExtractor]
    """Those that compute an annotation while training, by its name."""
    cache: LocalCache | None
    """Of the training samples, on this node's disk."""

    def loader(self, *, rank: int, world_size: int) -> Loader:
        """Build the loader of the training samples for one rank; from now on they are copied to the node's disk, if the
        recipe says so."""
        if self.cache is not None:
            self.cache.start()
        return self._loader(self.store, self.recipe.training.batch_rows, self.recipe.seed, rank, world_size)

    def heldout_loader(self, *, rank: int, world_size: int) -> Loader | None:
        """Build the loader whose first global batch is the held-out rows, or None if there is nothing to measure."""
        return self._rows_of_heldout(self.recipe.heldout.rows, 1, rank, world_size)

    def probe_loader(self, *, rank: int, world_size: int) -> Loader | None:
        """Build the loader of the held-out rows that the sampler's measurements take, or None if it has none; a rank's
        micro-batches can be halved."""
        if not self.sampler.probes:
            return None
        rows = self.sampler.config.probe_rows or self.recipe.training.batch_rows // 4
        return self._rows_of_heldout(rows, 2, rank, world_size)

    def _rows_of_heldout(self, rows: int, parts: int, rank: int, world_size: int) -> Loader | None:
        """Build a loader of held-out rows, rounded up to a multiple of ``parts`` micro-batches of all ranks."""
        if self.heldout is None or rows == 0:
            return None
        whole = parts * self.recipe.training.micro_batch_rows * world_size
        return self._loader(self.heldout, -(-rows // whole) * whole, 0, rank, world_size)

    def annotations(self, store: Store) -> dict[str, Annotation | LiveSpans]:
        """Open what the objectives read of a store beside its tokens, by name."""
        wanted = {name: kind for one in self.model.objectives.values() for name, kind in one.annotations.items()}
        live = {name: self.extractors[name].on(store) for name in wanted if name in self.extractors}
        return live | {name: Annotation(store, name, kind) for name, kind in wanted.items() if name not in live}

    def _loader(self, store: Store, batch_rows: int, seed: int, rank: int, world_size: int) -> Loader:
        return Loader(
            store,
            annotations=self.annotations(store),
            seed=seed,
            row_length=self.row_length,
            batch_rows=batch_rows,
            micro_batch_rows=self.recipe.training.micro_batch_rows,
            rank=rank,
            world_size=world_size,
            pad_id=self.vocabulary.pad_id,
            packing=self.recipe.data.packing,
            window=self.recipe.data.packing_window,
        )


def device_type() -> str:
    """Return what the run computes on: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(recipe: Recipe, *, dtype: torch.dtype) -> Parts:
    """Open the store, build model, objectives and sampler; ``dtype`` is what the weights will be under DeepSpeed.

    Raises:
        UserError: for anything in the recipe, the store or the checkpoint that cannot work.
    """
    store, heldout = _open_stores(recipe)
    tokenizer = _load_own_tokenizer(Path(recipe.data.store) / "tokenizer", store)
    vocabulary = Vocabulary.of(tokenizer, store.token_counts(len(tokenizer)))
    sampler = build_sampler(recipe.sampler_config, list(recipe.objective_configs), recipe.seed, recipe.training.steps)
    torch.manual_seed(recipe.seed)
    longest = max(store.max_length, heldout.max_length if heldout is not None else 0)
    config = backbone_config(recipe.model, vocabulary, longest)
    objectives = _objectives(recipe, vocabulary, prepare=(tokenizer, store.max_length))
    encoder = _encoder(recipe, config, dtype)
    initialisation = fingerprint(encoder)
    model = MultiObjectiveModel(encoder, objectives)
    components = model.components()
    parts = Parts(
        recipe=recipe,
        store=store,
        heldout=heldout,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        model=model,
        initialisation=initialisation,
        components=components,
        sizes={name: sum(p.numel() for p in params) for name, params in components.items()},  # ZeRO-3 empties them
        sampler=sampler,
        weigher=_weigher(recipe, model, sampler),
        row_length=_row_length(recipe, longest, model),
        extractors=_load_extractors(model),
        cache=LocalCache(recipe.data.cache, [store.index, store.tokens]) if recipe.data.cache else None,
    )
    parts._loader(store, recipe.training.batch_rows, recipe.seed, 0, 1).check_fills_a_batch()
    parts.heldout_loader(rank=0, world_size=1)  # its samples must fit as well
    _check_probe(parts)
    return parts


def build_model(recipe: Recipe, vocabulary: Vocabulary, config, *, dtype: torch.dtype) -> MultiObjectiveModel:
    """Build the model of a recipe around a Hugging Face ``config``, on the CPU in fp32. Its objectives have not read
    their own data, so it is not to be trained."""
    objectives = _objectives(recipe, vocabulary)
    return MultiObjectiveModel(_encoder(recipe, config, dtype), objectives)


def _encoder(recipe: Recipe, config, dtype: torch.dtype) -> Encoder | EncoderDecoder:
    return build_encoder(recipe.model, config, device_type=device_type(), dtype=dtype)


def _objectives(
    recipe: Recipe, vocabulary: Vocabulary, prepare: tuple[PreTrainedTokenizerBase, int] | None = None
) -> dict[str, Objective]:
    """Build the objectives of a recipe. With ``prepare``, the store's tokenizer and the length of its longest sample,
    they read their own data."""
    reason = why_no_triton(device_type()) if recipe.impl == "triton" else None
    if reason:
        raise UserError(f"impl: {reason}; set it to auto")
    objectives = build_objectives(recipe.objective_configs, vocabulary, recipe.seed, recipe.impl)
    for name, objective in objectives.items():
        if prepare:
            objective.prepare(*prepare)
        if recipe.training.micro_batch_rows % objective.rows_together:
            raise UserError(
                f"training.micro_batch_rows: {recipe.training.micro_batch_rows} is no multiple of the "
                f"{objective.rows_together} rows that '{name}' needs together (objectives.{name}.group_rows)"
            )
    return objectives


def _load_extractors(model: MultiObjectiveModel) -> dict[str, LiveExtractor]:
    names = {name for objective in model.objectives.values() for name in objective.annotations}
    return {name: LiveExtractor(name.removeprefix(LIVE)) for name in names if name.startswith(LIVE)}


def _open_stores(recipe: Recipe) -> tuple[Store, Store | None]:
    folder = Path(recipe.data.store)
    if not folder.is_dir():
        raise UserError(f"data.store: no folder '{folder}'; make it with 'medley prepare … --out {folder}'")
    heldout = folder / "heldout"
    stores = Store(folder / "train"), Store(heldout) if heldout.is_dir() else None
    return stores[0], stores[1] if stores[1] is not None and len(stores[1]) else None


def _load_own_tokenizer(folder: Path, store: Store) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the store was made with; another would give the ids another meaning."""
    if not folder.is_dir():
        raise UserError(f"data.store: no folder '{folder}'; prepare the corpus again")
    expected = store.meta.get("tokenizer", {}).get("sha256")
    file = folder / "tokenizer.json"
    if expected and (not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected):
        raise UserError(f"data.store: {file} is not the tokenizer the store was made with; prepare the corpus again")
    return load_tokenizer(folder)


def _weigher(recipe: Recipe, model: MultiObjectiveModel, sampler: Sampler) -> Weigher:
    able = {name: not objective.couples_samples for name, objective in model.objectives.items()}
    return build_weigher(recipe.weigher_config, able, sampler.mixes, recipe.seed, recipe.training.steps)


def _check_probe(parts: Parts) -> None:
    """Raise :class:`UserError` if the sampler, or an objective, has nothing to be measured by."""
    if isinstance(parts.sampler, MetaTartanSampler):
        parts.sampler.check_dev_split(len(parts.model.objectives[END_TASK].splits["dev"]))
    if not parts.sampler.probes:
        return
    loader = parts.probe_loader(rank=0, world_size=1)
    if loader is None:
        raise UserError(
            f"sampler.name: '{parts.sampler.name}' measures held-out losses, but there is no held-out text; prepare "
            "the corpus with --heldout above 0"
        )
    batches = loader.next().micro_batches
    for name, objective in parts.model.objectives.items():
        if not sum(int(count.sum()) for batch in batches for count in objective.heldout_view(batch).counts.values()):
            raise UserError(
                f"objectives.{name}: no probe for '{parts.sampler.name}': the held-out rows hold no target of it; "
                "raise sampler.probe_rows or prepare more held-out text"
            )


def _row_length(recipe: Recipe, longest: int, model: MultiObjectiveModel) -> int:
    if recipe.data.packing and not model.encoder.packs_rows:
        family = model.encoder.config.model_type
        raise UserError(f"data.packing: the attention of '{family}' cannot keep packed samples apart; set it to off")
    return recipe.data.row_length or longest * (4 if recipe.data.packing else 1)
