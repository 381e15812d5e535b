"""Every mistake of a user's is one line on standard error and exit code 2, before any process group."""

import errno
import fcntl
import json
import os
import shutil

import pytest

from tests.training.runs import DS, recipe, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """Fail if a run gets as far as joining other ranks."""

    def refuse(*_):
        raise AssertionError("a process group was made")

    monkeypatch.setattr("pretrain.training.run.init_distributed", refuse)


def refused(document, *arguments, ds="zero2.json") -> str:
    """Return the one line that a refused run prints."""
    code, _, err = train(document, *arguments, ds=ds)
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainig": {}}, ["trainig", "did you mean 'training'"]),
        ({"training__step": 3}, ["training.step", "did you mean 'steps'"]),
        ({"training__steps": "many"}, ["training.steps", "'many'"]),
        ({"training__steps": 0}, ["training.steps", "greater than or equal to 1"]),
        ({"training__optimizer__name": "adam"}, ["training.optimizer.name", "did you mean 'adamw'"]),
        ({"training__batch_rows": 7}, ["training.batch_rows", "8"]),
        ({"training__micro_batch_rows": 3}, ["training.batch_rows"]),
        ({"impl": "tritn"}, ["impl", "did you mean 'triton'"]),
        ({"objectives__mlmm": {}}, ["mlmm", "did you mean 'mlm'"]),
        ({"objectives": {}}, ["objectives", "mlm"]),
        ({"objectives__mlm__masking": {"rate": 1.5}}, ["objectives.mlm.masking.rate", "between 0 and 1"]),
        ({"objectives__mlm__masking": {"rat": 0.5}}, ["objectives.mlm.masking.rat", "did you mean 'rate'"]),
        ({"objectives__mlm__masking": {"policy": "randm"}}, ["masking.policy", "random"]),
        ({"objectives__cse__group_rows": 3}, ["training.micro_batch_rows", "cse"]),
        (
            {"objectives": {"cse": {"group_rows": 2}}, "sampler": {}, "model__dropout": 0.0},
            ["objectives.cse", "model.dropout"],
        ),
        ({"sampler__shares": {"mlm": 1, "rtd": 1, "csee": 1}}, ["sampler.shares", "did you mean 'cse'"]),
        ({"sampler__shares": {"mlm": 1}}, ["sampler.shares", "'rtd'"]),
        ({"sampler__name": "unifrom"}, ["sampler.name", "did you mean 'uniform'"]),
        ({"model__family": "brt"}, ["model.family", "did you mean 'bert'"]),
        ({"model": {"family": "t5", "size": "tiny"}}, ["objectives.mlm", "encoder–decoder", "span_corruption"]),
        ({"model": {"family": "vit"}}, ["model.family", "not a language model"]),
        ({"model__size": "smal"}, ["model.size", "did you mean 'small'"]),
        ({"model__overrides": {"hidden_sise": 32}}, ["model.overrides.hidden_sise", "did you mean 'hidden_size'"]),
        ({"model": {"checkpoint": "no/such/model"}}, ["model.checkpoint", "no/such/model"]),
        ({"model": {"family": "llama", "size": "tiny"}}, ["objectives.mlm", "clm"]),
        ({"data__store": "no/such/store"}, ["data.store", "medley prepare"]),
        ({"data__row_length": 16}, ["data.row_length", "16"]),
        ({"log__trackers": ["wandb"]}, ["log.trackers", "pip install wandb"]),
        ({"seed": -1}, ["seed"]),
        ({"training__steps": True}, ["training.steps", "must be a number"]),
        ({"training__optimizer__betas": [0.9, 1.0]}, ["training.optimizer.betas.1", "less than 1"]),
    ],
)
def test_a_wrong_recipe_is_refused_naming_key_and_remedy(corpus, tmp_path, changes, words):
    line = refused(recipe(corpus, tmp_path / "run", **changes))
    assert all(word in line for word in [".rank0.yaml", *words]), line
    assert not (tmp_path / "run").exists()


def test_a_wrong_override_is_refused(corpus, tmp_path):
    document = recipe(corpus, tmp_path / "run")
    assert "did you mean 'steps'" in refused(document, "training.stps=3")
    assert "key=value" in refused(document, "steps")


def test_a_missing_recipe_names_the_nearest_file(corpus, tmp_path):
    document = recipe(corpus, tmp_path / "run")
    assert "no such file" in refused(document, "--config", str(tmp_path / "rum.rank0.yaml"))


def test_a_recipe_that_is_no_yaml_is_refused_with_its_line(corpus, tmp_path):
    (tmp_path / "bad.yaml").write_text("run: x\ndata: {store: [\n")
    assert "bad.yaml:" in refused(recipe(corpus, tmp_path / "run"), "--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimisation": {}}, ["did you mean 'zero_optimization'"]),
        ({"train_batch_size": 9}, ["train_batch_size", "training.batch_rows"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "training.optimizer"]),
        ({"gradient_clipping": 3.0}, ["gradient_clipping", "training.gradient_clipping"]),
    ],
)
def test_a_wrong_deepspeed_config_is_refused(corpus, tmp_path, changes, words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads((DS / "zero2.json").read_text()) | changes))
    line = refused(recipe(corpus, tmp_path / "run"), ds=path)
    assert "ds.json" in line and all(word in line for word in words), line


def test_a_missing_deepspeed_config_is_refused(corpus, tmp_path):
    assert "no/such.json" in refused(recipe(corpus, tmp_path / "run"), ds="no/such.json")


@pytest.mark.parametrize("name", ["tokens-00000.bin", "index.npy"])
def test_a_truncated_store_is_refused_naming_the_file(corpus, tmp_path, name):
    store = tmp_path / "store"
    shutil.copytree(corpus, store)
    path = store / "train" / name
    path.write_bytes(path.read_bytes()[:-2])
    assert name in refused(recipe(store, tmp_path / "run"))


def test_a_store_without_its_tokenizer_is_refused(corpus, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(corpus, store)
    shutil.rmtree(store / "tokenizer")
    assert "tokenizer" in refused(recipe(store, tmp_path / "run"))


def test_another_tokenizer_in_the_stores_place_is_refused(corpus, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(corpus, store)
    meta = json.loads((store / "train" / "meta.json").read_text())
    (store / "train" / "meta.json").write_text(json.dumps(meta | {"tokenizer": {"sha256": "0" * 64}}))
    assert "not the tokenizer the store was made with" in refused(recipe(store, tmp_path / "run"))


def test_a_folder_that_another_training_is_writing_to_is_refused(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another training" in refused(recipe(corpus, tmp_path / "run"))


def test_a_folder_on_a_file_system_without_locks_is_not_refused(corpus, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(AssertionError, match="a process group was made"):
        train(recipe(corpus, tmp_path / "run"))


def test_a_corpus_shorter_than_one_batch_is_refused_with_numbers(tmp_path):
    store = write_corpus(tmp_path / "store", samples=5)
    line = refused(recipe(store, tmp_path / "run"))
    assert "5 samples" in line and "training.batch_rows = 8" in line


def test_an_empty_store_is_refused(tmp_path):
    store = write_corpus(tmp_path / "store", samples=0)
    assert "empty" in refused(recipe(store, tmp_path / "run"))


def test_resuming_from_something_that_is_no_checkpoint_is_refused(corpus, tmp_path):
    line = refused(recipe(corpus, tmp_path / "run"), "--resume", str(tmp_path))
    assert "not a checkpoint" in line


def test_a_folder_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(recipe(corpus, tmp_path / "run"), f"run={tmp_path / 'file' / 'run'}")
    assert "cannot write to" in line and "file/run" in line
