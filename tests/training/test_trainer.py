"""Whole runs of the training command, on one and two ranks, over one small corpus."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pretrain.data.loader import Loader
from pretrain.objectives.base import TermLoss
from pretrain.objectives.mlm import MaskedLanguageModelling
from pretrain.training.log import read_metrics
from tests.training.runs import metrics, recipe, states, train, write_corpus

SHARED: dict = {}
DISENTANGLED = {
    "model__overrides__tie_word_embeddings": False,
    "objectives__rtd": {"generator": {"embeddings": "disentangled"}},
}
STAGES = [("zero1.json", SHARED), ("zero2.json", SHARED), ("zero3.json", DISENTANGLED)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory, rank_pool):
    """A run of six steps on two ranks, saved after three and six."""
    run = tmp_path_factory.mktemp("whole") / "run"
    outcomes = rank_pool.run(train, recipe(corpus, run))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    return run


def test_the_loss_falls(corpus, tmp_path):
    changes = {"objectives": {"mlm": {}}, "sampler__shares": {}, "training__steps": 60, "model__dropout": 0.0}
    code, out, err = train(recipe(corpus, tmp_path / "run", log__interval_steps=20, **changes))
    assert (code, err) == (0, "")
    records = metrics(tmp_path / "run")
    start = json.loads((tmp_path / "run" / "heldout-start.json").read_text())
    assert records[-1]["heldout"]["mlm"] < start["mlm"] - 0.5
    assert len([line for line in out.splitlines() if line.startswith("step ")]) == 3


def test_metrics_have_the_documented_fields_for_every_step(whole_run):
    records = metrics(whole_run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    fields = {"step", "loss", "losses", "plan", "probabilities", "effective_sample_size", "lr", "grad_norm", "tokens"}
    fields |= {"samples", "sample_ids_sha256", "seconds", "tokens_per_second", "passes", "mfu"}
    assert all(fields <= set(record) for record in records)
    assert all(
        record["loss"] == pytest.approx(sum(record["plan"][n] * record["losses"][n] for n in record["plan"]))
        for record in records
    )


def _layout(micro_batch_rows):
    return {"training__micro_batch_rows": micro_batch_rows, "model__dropout": 0.0, "objectives": {"mlm": {}, "rtd": {}}}


@pytest.mark.parametrize(("ds", "embeddings"), STAGES[1:])
def test_ranks_micro_batches_and_accumulation_do_not_change_what_is_trained(corpus, tmp_path, ranks, ds, embeddings):
    shares = {"sampler__shares": {"mlm": 0.7, "rtd": 0.3}}
    one = recipe(corpus, tmp_path / "one", **_layout(8), **shares, **embeddings)
    assert train(one)[0] == 0
    two = recipe(corpus, tmp_path / "two", **_layout(2), **shares, **embeddings)
    assert [outcome[0] for outcome in ranks(lambda_free_train, two, ds)] == [0, 0]
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for exact in ("sample_ids_sha256", "tokens", "samples", "plan", "lr"):
            assert alone[exact] == together[exact]
        assert alone["targets"] == together["targets"]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("ds", "embeddings"), STAGES)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(corpus, tmp_path, ranks, ds, embeddings):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run in (whole, resumed):
        outcomes = ranks(lambda_free_train, recipe(corpus, run, **embeddings), ds)
        assert [outcome[0] for outcome in outcomes] == [0, 0], outcomes
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    outcomes = ranks(lambda_free_train, recipe(corpus, resumed, **embeddings), ds)
    assert [outcome[0] for outcome in outcomes] == [0, 0]
    assert "going on from" in outcomes[0][1] and "step-00000003" in outcomes[0][1]
    assert states(resumed / "checkpoints" / "step-00000006") == states(whole / "checkpoints" / "step-00000006")
    volatile = {"seconds", "tokens_per_second"}
    for first, second in zip(metrics(whole), metrics(resumed), strict=True):
        assert {k: v for k, v in first.items() if k not in volatile} == {
            k: v for k, v in second.items() if k not in volatile
        }


def lambda_free_train(document, ds):
    """``train`` with its configuration as a positional argument, for the pool."""
    return train(document, ds=ds)


def _train_and_signal(document, number, rank, step):
    """Train; this process sends itself a signal while it prepares ``step``, if it is ``rank``."""
    plain = Loader.next
    steps = 0

    def next_batch(loader):
        nonlocal steps
        if loader.seed == document["seed"]:
            steps += 1
            if steps == step and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), number)
        return plain(loader)

    Loader.next = next_batch
    try:
        return train(document)
    finally:
        Loader.next = plain


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGUSR1, 1)]
)
def test_a_signal_to_any_rank_stops_all_after_the_same_step_with_a_checkpoint(corpus, tmp_path, ranks, number, rank):
    outcomes = ranks(_train_and_signal, recipe(corpus, tmp_path / "run"), number, rank, 2)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "stopped on request after step 2" in outcomes[0][1]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert len(metrics(tmp_path / "run")) == 2


def _train_with_nan(document, steps_with_nan):
    """Train with a loss that is NaN on rank 1 in some steps."""
    plain, calls = MaskedLanguageModelling.loss, 0

    def loss(objective, model, view, weights=None):
        nonlocal calls
        losses = plain(objective, model, view, weights)
        if torch.is_grad_enabled():
            calls += 1
            micro_steps = 2
            if int(os.environ["RANK"]) == 1 and (calls - 1) // micro_steps in steps_with_nan:
                losses = {term: TermLoss(*(value * torch.nan for value in loss)) for term, loss in losses.items()}
        return losses

    MaskedLanguageModelling.loss = loss
    try:
        return train(document)
    finally:
        MaskedLanguageModelling.loss = plain


def test_a_step_with_a_nan_on_one_rank_is_skipped_and_counted_on_all(corpus, tmp_path, ranks):
    outcomes = ranks(_train_with_nan, recipe(corpus, tmp_path / "run"), {1, 3})
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    records = metrics(tmp_path / "run")
    assert [record["grad_norm"] is None for record in records] == [False, True, False, True, False, False]
    assert [record["skipped"] for record in records] == [0, 1, 1, 2, 2, 2]
    assert records[1]["loss"] is None and records[2]["loss"] is not None
    assert "2 steps were skipped" in outcomes[0][1]


def test_too_many_steps_with_nan_in_a_row_end_the_run_naming_the_last_checkpoint(corpus, tmp_path, ranks):
    document = recipe(corpus, tmp_path / "run", training__non_finite_limit=2, checkpoint__interval_steps=2)
    outcomes = ranks(_train_with_nan, document, {3, 4})
    assert [code for code, _, _ in outcomes] == [1, 1]
    told = outcomes[0][2] + outcomes[1][2]
    assert len(told.splitlines()) == 1  # of two ranks that know
    assert "not finite for 2 steps in a row" in told and "step-00000004" in told


def _copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_noticed_and_the_previous_checkpoint_taken(corpus, whole_run, tmp_path, ranks):
    run = _copy(whole_run, tmp_path / "run")
    _flip_a_byte(next((run / "checkpoints" / "step-00000006" / "engine").iterdir()))
    outcomes = ranks(train, recipe(corpus, run))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "passing over a checkpoint" in outcomes[0][1] and "sha256" in outcomes[0][1]
    assert "going on from" in outcomes[0][1] and "step-00000003" in outcomes[0][1]
    assert states(run / "checkpoints" / "step-00000006") == states(whole_run / "checkpoints" / "step-00000006")


def test_a_run_whose_every_checkpoint_is_damaged_is_not_started_over(corpus, whole_run, tmp_path):
    run = _copy(whole_run, tmp_path / "run")
    for folder in (run / "checkpoints").glob("step-*"):
        _flip_a_byte(next((folder / "engine").iterdir()))
    code, _, err = train(recipe(corpus, run))
    assert code == 2 and "none of its checkpoints verifies" in err


def _train_on_a_full_disk(document, limit_bytes):
    """Train while no file may grow past a limit, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        return train(document)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_saving_is_one_clear_line_and_the_last_checkpoint_stays(corpus, whole_run, tmp_path, ranks):
    run = _copy(whole_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    outcomes = ranks(_train_on_a_full_disk, recipe(corpus, run), 100_000)
    assert [code for code, _, _ in outcomes] == [1, 1], outcomes
    [told] = "".join(err for _, _, err in outcomes).splitlines()
    assert "cannot save a checkpoint" in told and "step-00000003" in told
    assert [folder.name for folder in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert [code for code, _, _ in ranks(train, recipe(corpus, run))] == [0, 0]
    assert states(run / "checkpoints" / "step-00000006") == states(whole_run / "checkpoints" / "step-00000006")


def test_only_the_newest_checkpoints_are_kept(corpus, tmp_path):
    document = recipe(corpus, tmp_path / "run", checkpoint__interval_steps=1, checkpoint__keep=2, training__steps=4)
    assert train(document)[0] == 0
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003", "step-00000004"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"


def test_a_heldout_measurement_leaves_no_trace_in_training(corpus, tmp_path):
    for name, interval in (("rarely", 0), ("often", 1)):
        assert train(recipe(corpus, tmp_path / name, heldout__interval_steps=interval))[0] == 0
    last = "checkpoints/step-00000006"
    assert states(tmp_path / "rarely" / last) == states(tmp_path / "often" / last)


def test_activation_checkpointing_changes_no_loss(corpus, tmp_path):
    for name, value in (("off", False), ("on", True)):
        assert train(recipe(corpus, tmp_path / name, model__activation_checkpointing=value))[0] == 0
    off, on = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert [record["loss"] for record in on] == pytest.approx([record["loss"] for record in off], rel=1e-6)


@pytest.mark.parametrize("name", ["uniform", "round_robin"])
def test_objectives_can_take_turns(corpus, tmp_path, name):
    document = recipe(corpus, tmp_path / "run", sampler={"name": name})
    assert train(document)[0] == 0
    plans = [record["plan"] for record in metrics(tmp_path / "run")]
    assert all(len(plan) == 1 for plan in plans)
    if name == "round_robin":
        assert [next(iter(plan)) for plan in plans] == ["mlm", "rtd", "cse"] * 2


def test_a_decoder_trains_on_clm(corpus, tmp_path):
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = {"family": "llama", "size": None, "overrides": {**overrides, "num_key_value_heads": 2}}
    document = recipe(corpus, tmp_path / "run", model=model, objectives={"clm": {}}, sampler={})
    assert train(document)[0] == 0
    records = metrics(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]


def test_bf16_trains_close_to_fp32(corpus, tmp_path):
    for name, ds in (("fp32", "zero2.json"), ("bf16", "zero2-bf16.json")):
        assert (
            train(recipe(corpus, tmp_path / name, objectives={"mlm": {}}, sampler={}, model__dropout=0.0), ds=ds)[0]
            == 0
        )
    fp32, bf16 = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    assert [r["loss"] for r in bf16] == pytest.approx([r["loss"] for r in fp32], rel=2e-2)
    assert [r["sample_ids_sha256"] for r in bf16] == [r["sample_ids_sha256"] for r in fp32]


def test_a_line_cut_short_by_a_crash_is_dropped_from_the_metrics(whole_run, tmp_path, capsys):
    run = _copy(whole_run, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert len(read_metrics(run)) == 6
    assert "broken line" in capsys.readouterr().err


def test_dry_run_prints_what_the_run_takes_and_leaves_nothing(corpus, tmp_path):
    code, out, err = train(recipe(corpus, tmp_path / "run"), "--dry-run")
    assert (code, err) == (0, "")
    for word in ("parameters", "head/vocabulary", "peak memory", "512 tokens", "4 micro-steps"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_going_on_from_an_older_checkpoint_replaces_the_history_after_it(corpus, whole_run, tmp_path, ranks):
    run = _copy(whole_run, tmp_path / "run")
    older = str(run / "checkpoints" / "step-00000003")
    document = recipe(corpus, run, training__steps=4, checkpoint__keep=1)
    assert [code for code, _, _ in ranks(_train_from, document, older)] == [0, 0]
    assert [folder.name for folder in (run / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3, 4]


def _train_from(document, checkpoint):
    return train(document, "--resume", checkpoint)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"training__optimizer": {"name": "muon", "learning_rate": 0.003}}, "training.optimizer.name"),
        ({"sampler": {"name": "uniform"}}, "sampler"),
        ({"seed": 4}, "seed"),
        ({"objectives__mlm": {"masking": {"rate": 0.4}}}, "objectives"),
        ({"data__row_length": 96}, "data.row_length"),
    ],
)
def test_another_recipe_is_not_trained_on_a_runs_checkpoint_nor_written_over_its_own(
    corpus, whole_run, tmp_path, ranks, changes, word
):
    run = _copy(whole_run, tmp_path / "run")
    before = (run / "config.yaml").read_text()
    outcomes = ranks(train, recipe(corpus, run, **changes))
    assert [code for code, _, _ in outcomes] == [2, 2], outcomes
    told = outcomes[0][2] + outcomes[1][2]
    assert word in told and len(told.splitlines()) == 1
    assert (run / "config.yaml").read_text() == before
