"""The DeepSpeed JSON: what is filled in, and what is refused with one line that names file, key and remedy."""

import json
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.training.ds_config import resolve_ds_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "ds").glob("*.json"))


def resolve(path: Path, **changed) -> dict:
    numbers = {"micro_batch_rows": 3, "batch_rows": 30, "world_size": 2, "gradient_clipping": 0.5, "device_type": "cpu"}
    return resolve_ds_config(path, **(numbers | changed))


@pytest.fixture
def refusal(tmp_path):
    """``refusal(config or text) -> message`` of the UserError it is refused with."""

    def refuse(config: dict | str, **changed) -> str:
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(UserError) as caught:
            resolve(path, **changed)
        message = str(caught.value)
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    return refuse


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_shipped_configurations_resolve_without_auto(path, device_type):
    config = resolve(path, device_type=device_type)
    assert "auto" not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_batch_size"] == 30
    assert config["gradient_clipping"] == 0.5
    assert config["managed_gradient_accumulation"] is False
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"]["stage"] == int((path.stem[4:5] if path.stem != "cpu" else "") or 2)


def test_the_shipped_configurations_are_all_there():
    stages = [f"zero{stage}" for stage in range(4)]
    sharded = [f"zero{stage}{kind}" for stage in (2, 3) for kind in ("-bf16", "-offload", "-offload-bf16")]
    assert {path.stem for path in CONFIGS} == {"cpu", *stages, *sharded}


def test_an_empty_object_is_stage_0_in_fp32_with_all_numbers_filled(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    config = resolve(tmp_path / "ds.json", gradient_clipping=0)
    assert config["zero_optimization"]["stage"] == 0
    assert config["bf16"]["enabled"] is False
    assert config["gradient_clipping"] == 0.0  # written out: DeepSpeed's default is to clip at 1


def test_numbers_that_agree_with_the_recipe_are_accepted(tmp_path):
    numbers = {"train_batch_size": 30, "gradient_accumulation_steps": 5, "gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(numbers))
    assert resolve(tmp_path / "ds.json")["train_batch_size"] == 30


@pytest.mark.parametrize(
    ("key", "value", "recipe_key", "wanted"),
    [
        ("train_micro_batch_size_per_gpu", 4, "training.micro_batch_rows", "3"),
        ("train_batch_size", 32, "training.batch_rows", "30"),
        ("gradient_accumulation_steps", 2, "training.batch_rows", "5"),
        ("gradient_clipping", 1.0, "training.gradient_clipping", "0.5"),
    ],
)
def test_a_number_that_contradicts_the_recipe_is_refused_with_both(refusal, key, value, recipe_key, wanted):
    message = refusal({key: value})
    assert message.startswith(f"{key}: {value},")
    assert f"{recipe_key} gives {wanted}" in message


@pytest.mark.parametrize(("batch_rows", "nearest"), [(31, 30), (35, 36), (1, 6), (0, 6)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(refusal, batch_rows, nearest):
    message = refusal({}, batch_rows=batch_rows)
    assert message.startswith(f"training.batch_rows: {batch_rows} ")
    assert "3 × 2 = 6" in message
    assert message.endswith(f"is {nearest}")


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ('{\n  "bf16": {"enabled": true},\n  oops\n}', ["line 3", "not valid JSON"]),
        ('{"bf16": {}, "bf16": {}}', ["'bf16' is given twice"]),
        ("[]", ["one JSON object"]),
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stag": 2}}, ["zero_optimization", "'stag'", "did you mean 'stage'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "0, 1, 2 or 3, not 4"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage", "whole number, not true"]),
        ({"zero_optimization": 2}, ["zero_optimization", "a section"]),
        ({"bf16": {"enable": True}}, ["bf16", "did you mean 'enabled'"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled", 'true or false, not "yes"']),
        ({"train_batch_size": [1]}, ["train_batch_size", '"auto"']),
        ({"optimizer": {"type": "Adam"}}, ["optimizer: set it in the recipe: training.optimizer"]),
        ({"scheduler": {}}, ["scheduler: set it in the recipe"]),
        ({"elasticity": {}}, ["elasticity", "removed"]),
        ({"nebula": {}}, ["nebula", "removed"]),
        ({"curriculum_learning": {}}, ["curriculum_learning", "removed"]),
        ({"amp": {}}, ["amp", "removed"]),
        ({"pipeline": {}}, ["pipeline", "cannot accumulate"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "use bf16"]),
        ({**BF16}, ["bf16 needs stage 2 or 3", "stage 0"]),
        ({**BF16, "zero_optimization": {"stage": 1}}, ["bf16 needs stage 2 or 3", "BF16_Optimizer"]),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 2}}, ["NaN"]),
        ({"bf16": {"immediate_grad_update": True}}, ["bf16.immediate_grad_update"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "fp32, not bf16"]),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, ["overlap_comm", "stage 2 or 3"]),
        ({"zero_optimization": {"stage": 2, "sub_group_size": 9}}, ["sub_group_size", "no effect at stage 2"]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "not 1"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["device", '"nvme"']),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, ["offload_param", "not tested"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size", "removed"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["changes the numbers"]),
        ({"managed_gradient_accumulation": True}, ["managed_gradient_accumulation", "must be false"]),
        ({"flops_profiler": {"enabled": "x"}}, ["flops_profiler.enabled", "true or false"]),
        ({"comms_logger": {"enabld": True}}, ["comms_logger", "did you mean 'enabled'"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, ["reduce_bucket_size", "at least 1"]),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": NaN}}', ["reduce_bucket_size", "at least 1"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if not isinstance(value, list) else "",
)
def test_what_would_train_wrongly_is_refused_by_name(refusal, config, parts):
    message = refusal(config)
    assert all(part in message for part in parts), message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read the DeepSpeed configuration"):
            resolve(path)


def test_offload_pins_memory_only_where_there_is_a_device_to_copy_to():
    (path,) = [path for path in CONFIGS if path.stem == "zero2-offload"]
    assert resolve(path, device_type="cpu")["zero_optimization"]["offload_optimizer"]["pin_memory"] is False
    assert resolve(path, device_type="cuda")["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
