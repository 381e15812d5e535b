"""Read the user's DeepSpeed JSON, refuse what would train wrongly, and return the complete configuration.

DeepSpeed accepts unknown top-level keys in silence and has combinations that give wrong gradients without a word.
Everything is therefore named here: what may be set, what is refused, and for which reason. Knows no DeepSpeed code.
"""

import json
import math
from pathlib import Path

from pretrain.errors import UserError, unknown

# What may be set: key → the JSON types it takes.
_BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
_TOP_LEVEL = {
    **dict.fromkeys(_BATCH_KEYS, (int, float, str)),
    "zero_optimization": dict,
    "bf16": dict,
    "fp16": dict,
    "data_types": dict,
    "managed_gradient_accumulation": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
}
_ZERO = {
    "stage": int,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": (int, float),
    "allgather_partitions": bool,
    "allgather_bucket_size": (int, float),
    "overlap_comm": bool,
    "offload_optimizer": dict,
    "sub_group_size": (int, float),
    "stage3_prefetch_bucket_size": (int, float),
    "stage3_param_persistence_threshold": (int, float),
    "stage3_max_live_parameters": (int, float),
    "stage3_max_reuse_distance": (int, float),
}
_OFFLOAD_OPTIMIZER = {"device": str, "pin_memory": bool}
_BF16 = {"enabled": bool, "check_grad_overflow": bool}
_DATA_TYPES = {"grad_accum_dtype": str}
_COMMS_LOGGER = {**dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), bool), "prof_ops": list}
_FLOPS_PROFILER = {
    "enabled": bool,
    "recompute_fwd_factor": (int, float),
    "profile_step": int,
    "module_depth": int,
    "top_modules": int,
    "detailed": bool,
    "output_file": str,
}

# What DeepSpeed knows, or once knew, and Medley refuses: key → the reason and the remedy.
_REMOVED = "DeepSpeed 0.19.8 removed it; delete the section"
_LOGS = "Medley writes the logs itself; delete the section"
_REFUSED = {
    "optimizer": "set it in the recipe: training.optimizer",
    "scheduler": "set it in the recipe: training.schedule",
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        _REMOVED,
    ),
    **dict.fromkeys(("comet", "csv_monitor", "monitor_config", "tensorboard", "wandb"), _LOGS),
    "activation_checkpointing": "it only configures deepspeed.checkpointing, which is not used; set it in the recipe",
    "autotuning": "Medley does not run DeepSpeed's tuner; delete the section",
    "communication_data_type": "gradients travel in the type they are computed in; delete the key",
    "compile": "DeepCompile cannot accumulate gradients the way Medley does; delete the section",
    "data_efficiency": "the data order is Medley's own; delete the section",
    "gradient_allreduce_op": "gradients are summed over ranks; delete the key",
    "gradient_predivide_factor": "gradients are summed over ranks; delete the key",
    "hybrid_engine": "it is for generation, not for pre-training; delete the section",
    "pipeline": "pipeline parallelism cannot accumulate gradients the way Medley does; delete the section",
    "prescale_gradients": "gradients are summed over ranks; delete the key",
    "tensor_parallel": "only data parallelism (ZeRO) is supported; delete the section",
    "torch_autocast": "not tested with ZeRO here; use bf16",
    "zenflow": "it delays updates, so steps are no longer those of AdamW; delete the section",
}
_NOT_EXACT = "it changes the numbers; delete the key"
_ZERO_REFUSED = {
    "cpu_offload": "it is deprecated; write offload_optimizer: {device: cpu}",
    "elastic_checkpoint": "checkpoints are Medley's own; delete the key",
    "ignore_unused_parameters": "idle objectives need it true, which is the default; delete the key",
    "mics_shard_size": _REMOVED,
    "offload_param": "parameter offload is not tested here; use stage 3 with offload_optimizer",
    "round_robin_gradients": "not tested here; delete the key",
    "stage3_gather_16bit_weights_on_model_save": "export gathers the fp32 weights itself; delete the key",
    "zenflow": _REFUSED["zenflow"],
    "zero_hpz_partition_size": "not tested here; delete the key",
    "zero_quantized_gradients": _NOT_EXACT,
    "zero_quantized_nontrainable_weights": _NOT_EXACT,
    "zero_quantized_weights": _NOT_EXACT,
}
_BF16_REFUSED = {
    "bf16_master_weights_and_grads": "small updates are lost without fp32 master weights; delete the key",
    "bf16_optimizer_states": "small updates are lost without fp32 optimizer states; delete the key",
    "immediate_grad_update": "it belongs to BF16_Optimizer (stage 1), which is refused; delete the key",
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    dict: "a section {…}",
    list: "a list […]",
    str: "a string",
}


def resolve_ds_config(
    path: str | Path,
    *,
    micro_batch_rows: int,
    batch_rows: int,
    world_size: int,
    gradient_clipping: float,
    device_type: str,
) -> dict:
    """Return the complete configuration for DeepSpeed from the JSON at ``path`` and the recipe's numbers.

    Pure: needs neither DeepSpeed nor a process group. ``micro_batch_rows`` is rows per rank and micro-step,
    ``batch_rows`` rows per step over all ranks, ``gradient_clipping`` the largest global gradient norm (0: no
    clipping), ``device_type`` "cpu" or "cuda". "auto" or absent batch sizes are filled in.

    Raises:
        UserError: for a file that cannot be read, a key that is unknown or refused, a number that contradicts the
            recipe, and a combination whose gradients would be wrong; one line with file, key and remedy.
    """
    path = Path(path)
    config = _read(path)
    _check_keys(path, "", config, _TOP_LEVEL, _REFUSED)
    numbers = _batch_numbers(path, micro_batch_rows, batch_rows, world_size)
    numbers["gradient_clipping"] = (float(gradient_clipping), "training.gradient_clipping")
    for key, (value, recipe_key) in numbers.items():
        given = config.get(key, "auto")
        if given != "auto" and given != value:
            raise UserError(f'{path}: {key}: {given}, but the recipe\'s {recipe_key} gives {value}; write "auto"')
    _check_keys(path, "comms_logger", config.get("comms_logger", {}), _COMMS_LOGGER, {})
    _check_keys(path, "flops_profiler", config.get("flops_profiler", {}), _FLOPS_PROFILER, {})
    zero = _zero_section(path, config.get("zero_optimization", {}))
    bf16 = _bf16_section(path, config, zero["stage"])
    for key, needed in (
        ("managed_gradient_accumulation", False),
        ("zero_allow_untested_optimizer", True),
        ("zero_force_ds_cpu_optimizer", False),
    ):
        if config.get(key, needed) is not needed:
            raise UserError(f"{path}: {key}: must be {json.dumps(needed)}, which Medley sets itself; delete the key")
    if zero.get("offload_optimizer", {}).get("device") == "cpu" and device_type == "cpu":
        zero["offload_optimizer"]["pin_memory"] = False  # there is no device to copy to
    return {
        **{key: value for key, value in config.items() if key not in ("fp16", "bf16")},
        **{key: value for key, (value, _) in numbers.items()},
        "zero_optimization": zero,
        **bf16,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: Path) -> dict:
    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: the key '{key}' is given twice; keep one")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the DeepSpeed configuration: {reason}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: a DeepSpeed configuration is one JSON object {{…}}, this is a {type(config).__name__}"
        )
    return config


def _check_keys(path: Path, section: str, values: dict, allowed: dict, refused: dict) -> None:
    """Refuse keys of ``values`` that are refused, unknown, or of another type than ``allowed`` says."""
    prefix = f"{section}." if section else ""
    for key, value in values.items():
        if key in refused:
            raise UserError(f"{path}: {prefix}{key}: {refused[key]}")
        if key not in allowed:
            raise unknown("key", key, allowed, where=f"{path}: {section}" if section else str(path))
        types = allowed[key] if isinstance(allowed[key], tuple) else (allowed[key],)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = "a number" if float in types else _TYPE_NAMES[types[0]]
            wanted += ' or "auto"' if key in _BATCH_KEYS else ""
            raise UserError(f"{path}: {prefix}{key}: must be {wanted}, not {json.dumps(value)}")
        least = 1 if key.endswith("_size") else -1 if key == "module_depth" else 0
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
            raise UserError(f"{path}: {prefix}{key}: must be a number of at least {least}, not {json.dumps(value)}")


def _batch_numbers(path: Path, micro_batch_rows: int, batch_rows: int, world_size: int) -> dict:
    """Return DeepSpeed's three batch keys with their values and the recipe key each follows from."""
    rows_at_once = micro_batch_rows * world_size
    if batch_rows < 1 or batch_rows % rows_at_once:
        valid = max(1, round(batch_rows / rows_at_once)) * rows_at_once
        raise UserError(
            f"training.batch_rows: {batch_rows} is not a multiple of training.micro_batch_rows × ranks = "
            f"{micro_batch_rows} × {world_size} = {rows_at_once}; the nearest valid value is {valid}"
        )
    return {
        "train_micro_batch_size_per_gpu": (micro_batch_rows, "training.micro_batch_rows"),
        "gradient_accumulation_steps": (batch_rows // rows_at_once, "training.batch_rows"),
        "train_batch_size": (batch_rows, "training.batch_rows"),
    }


def _zero_section(path: Path, section: dict) -> dict:
    """Return the checked ``zero_optimization`` section; nothing in it is left to DeepSpeed's defaults that matters."""
    _check_keys(path, "zero_optimization", section, _ZERO, _ZERO_REFUSED)
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage: must be 0, 1, 2 or 3, not {stage}")
    zero = {"stage": stage, "overlap_comm": False, **section}
    if zero["overlap_comm"] and stage < 2:
        raise UserError(
            f"{path}: zero_optimization.overlap_comm: true needs stage 2 or 3: below, gradients are reduced once a step"
        )
    for key in section:
        if stage < 3 and (key.startswith("stage3_") or key == "sub_group_size"):
            raise UserError(f"{path}: zero_optimization.{key}: has no effect at stage {stage}; delete the key")
    if "offload_optimizer" in section:
        offload = dict(section["offload_optimizer"])
        _check_keys(path, "zero_optimization.offload_optimizer", offload, _OFFLOAD_OPTIMIZER, {})
        if offload.get("device", "none") not in ("none", "cpu"):
            raise UserError(
                f'{path}: zero_optimization.offload_optimizer.device: must be "cpu" or "none", '
                f"not {json.dumps(offload['device'])}"
            )
        if offload.get("device") == "cpu" and stage < 2:
            raise UserError(f"{path}: zero_optimization.offload_optimizer: needs stage 2 or 3, not {stage}")
        if offload.get("device") == "cpu" and not zero.get("contiguous_gradients", True):
            raise UserError(
                f"{path}: zero_optimization.contiguous_gradients: must be true with offload_optimizer; delete the key"
            )
        zero["offload_optimizer"] = offload
    return zero


def _bf16_section(path: Path, config: dict, stage: int) -> dict:
    """Return the ``bf16`` and ``data_types`` sections; refuse fp16 and the stages where bf16 trains wrongly."""
    if config.get("fp16", {}).get("enabled", False):
        raise UserError(f"{path}: fp16.enabled: fp16 is not supported (its loss scale skips steps); use bf16")
    _check_keys(path, "bf16", config.get("bf16", {}), _BF16, _BF16_REFUSED)
    _check_keys(path, "data_types", config.get("data_types", {}), _DATA_TYPES, {})
    accumulate = config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if accumulate != "fp32":
        raise UserError(f"{path}: data_types.grad_accum_dtype: gradients are accumulated in fp32, not {accumulate}")
    enabled = config.get("bf16", {}).get("enabled", False)
    if enabled and not config["bf16"].get("check_grad_overflow", True):
        raise UserError(f"{path}: bf16.check_grad_overflow: must be true, or a NaN reaches the weights; delete the key")
    if enabled and stage == 0:
        raise UserError(
            f"{path}: bf16 needs stage 2 or 3: at stage 0 DeepSpeed takes a step at start: Adam's counter is off by one"
        )
    if enabled and stage == 1:
        raise UserError(
            f"{path}: bf16 needs stage 2 or 3: at stage 1 BF16_Optimizer gives wrong gradients when micro-steps add up"
        )
    return {
        "bf16": {"enabled": enabled, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
