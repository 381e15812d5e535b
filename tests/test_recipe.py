from pathlib import Path

import pytest
import yaml

from pretrain.errors import UserError
from pretrain.recipe import Recipe, load_recipe, recipe_from

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))
SMALLEST = {
    "run": "runs/a",
    "data": {"store": "corpus"},
    "objectives": {"mlm": {}},
    "training": {"steps": 10},
}


def write(folder: Path, document: dict) -> Path:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_we_ship_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.objective_configs
    assert recipe.source == str(path)


def test_recipes_are_shipped():
    assert RECIPES


DOCUMENTS = {
    "smallest": SMALLEST,
    "schedules": {
        **SMALLEST,
        "objectives": {
            "mlm": {"masking": {"rate": {"schedule": "linear", "from": 0.3, "to": 0.15}, "split": {"mask": 0.9}}},
            "rtd": {"masking": {"rate": {"schedule": "steps", "from": 0.15, "steps": {0.5: 0.25}}}},
            "cse": None,
        },
        "sampler": {"name": "proportional", "shares": {"mlm": 1, "rtd": 2, "cse": 0}},
        "weigher": {"name": "presence", "temperature": {"schedule": "cosine", "from": 1, "to": -1}},
    },
    "checkpoint": {**SMALLEST, "model": {"checkpoint": "some/folder", "dropout": 0.1}},
    "overrides": {**SMALLEST, "model": {"family": "gpt2", "size": None, "overrides": {"n_embd": 64}}},
    **{path.stem: yaml.safe_load(path.read_text()) for path in RECIPES},
}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_saved_recipe_loads_as_the_same_recipe(document, tmp_path):
    recipe = load_recipe(write(tmp_path, document))
    recipe.save(tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again.objective_configs == recipe.objective_configs
    assert again.sampler_config == recipe.sampler_config
    assert again.weigher_config == recipe.weigher_config
    for key in set(Recipe.model_fields) - {"objectives", "sampler", "weigher"}:
        assert getattr(again, key) == getattr(recipe, key), key
    assert again.model.model_fields_set <= set(again.model.model_dump())
    again.save(tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_text() == (tmp_path / "saved.yaml").read_text()


def test_a_saved_recipe_spells_out_every_default(tmp_path):
    recipe_from(SMALLEST, "r.yaml").save(tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert set(saved) == set(Recipe.model_fields)
    assert saved["objectives"]["mlm"]["masking"]["rate"]["from"] == 0.15
    assert saved["training"]["optimizer"]["betas"] == [0.9, 0.98]


def test_overrides_reach_nested_and_new_keys_and_are_named_as_the_source(tmp_path):
    overrides = [
        "training.optimizer.learning_rate=1e-3",
        "objectives.mlm.masking.rate=0.3",
        "objectives.clm=",
        "model.overrides.hidden_size=64",
        "seed=7",
    ]
    recipe = load_recipe(write(tmp_path, SMALLEST), overrides)
    assert recipe.training.optimizer.learning_rate == 1e-3
    assert recipe.objective_configs["mlm"].masking.rate.at(0) == 0.3
    assert list(recipe.objective_configs) == ["mlm", "clm"]
    assert recipe.model.overrides == {"hidden_size": 64}
    assert recipe.seed == 7
    assert recipe.source.endswith("r.yaml with command-line overrides")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.steps=3", "traning: unknown key; did you mean 'training'?"),
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        (
            "training.optimizer.learning_rat=3",
            "training.optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        ("training.steps=0", "training.steps: input should be greater than or equal to 1 (got 0)"),
        ("training.steps=many", "training.steps: input should be a valid integer"),
        (
            "training.optimizer.name=adam",
            "training.optimizer.name: input should be 'adamw' or 'muon' (got 'adam'); did you mean 'adamw'?",
        ),
        ("training.optimizer.learning_rate=.inf", "training.optimizer.learning_rate: input should be a finite number"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("data=", "data: input should be a valid dictionary"),
        ("model.dropout=1.0", "model.dropout: input should be less than 1"),
        ("objectives=", "objectives: "),
        ("objectives={}", "objectives: name at least one of clm, correction, cse, "),
        ("objectives.mlmm={}", "objectives: unknown objective 'mlmm'; did you mean 'mlm'?"),
        ("objectives.mlm=false", "objectives.mlm: input should be a valid dictionary"),
        ("objectives.mlm.maskin={}", "objectives.mlm.maskin: unknown key; did you mean 'masking'?"),
        ("objectives.mlm.masking.split.maks=1", "objectives.mlm.masking.split.maks: unknown key; did you mean 'mask'?"),
        ("objectives.cse.temperature=0", "objectives.cse.temperature: input should be greater than 0 (got 0)"),
        ("sampler.name=unifrom", "sampler.name: unknown sampler 'unifrom'; did you mean 'uniform'?"),
        (
            "log.trackers=[wandbb]",
            "log.trackers.0: input should be 'wandb' or 'trackio' (got 'wandbb'); did you mean 'wandb'?",
        ),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_file_key_and_nearest_name(tmp_path, override, message):
    path = write(tmp_path, SMALLEST)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert str(caught.value).startswith(f"{path} with command-line overrides: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["run", "data", "objectives", "training"])
def test_a_required_key_that_is_missing_is_named(key):
    document = {k: v for k, v in SMALLEST.items() if k != key}
    with pytest.raises(UserError, match=rf"^r\.yaml: {key}: is required$"):
        recipe_from(document, "r.yaml")


def test_errors_that_begin_with_a_recipes_key_get_its_file_and_others_stay_as_they_are():
    recipe = recipe_from(SMALLEST, "r.yaml")
    with pytest.raises(UserError, match=r"^r\.yaml: data\.store: gone$"), recipe.named_in_errors():
        raise UserError("data.store: gone")
    with pytest.raises(UserError, match=r"^elsewhere: broken$"), recipe.named_in_errors():
        raise UserError("elsewhere: broken")
