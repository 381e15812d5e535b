"""Runs whose samples are weighed: against PRESENCE written out in plain torch, and against each other."""

import contextlib
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.export import load_model
from pretrain.influence.sample_log import read_sample_log
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import load_recipe, recipe_from
from pretrain.training.build import build
from pretrain.training.engine import Engine
from tests.builders import lay_out
from tests.influence.test_weights import written_out
from tests.objectives.builders import write_task
from tests.training.runs import metrics, recipe, states, train, write_corpus

TWO_STAGES = {"schedule": "steps", "from": 1, "steps": {0.5: -1}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def weighed(corpus, run, micro_batch_rows: int = 8, objectives=("mlm",), dropout: float = 0.0, **weigher) -> dict:
    """Return the recipe of four steps; 8 rows a step, some 28 samples."""
    return recipe(
        corpus,
        run,
        objectives={name: {} for name in objectives},
        sampler={},
        weigher={"name": "presence", "temperature": TWO_STAGES, **weigher},
        model__dropout=dropout,
        training__steps=4,
        training__micro_batch_rows=micro_batch_rows,
        heldout={"rows": 0},
    )


def _train(document, ds):
    return train(document, ds=ds)


def run(document: dict, ds: str = "zero2.json", ranks=None) -> tuple[list[dict], str]:
    """Train, on two ranks if they are given; return the records and what rank 0 said."""
    outcomes = ranks(_train, document, ds) if ranks else [_train(document, ds)]
    assert [code for code, _, _ in outcomes] == [0] * len(outcomes), outcomes[0][2]
    return metrics(Path(document["run"])), outcomes[0][1]


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, by name."""
    folder = run / "checkpoints" / f"step-{step:08}"
    read, tokenizer = load_recipe(folder / "config.yaml"), load_tokenizer(folder / "model")
    counts = Store(Path(read.data.store) / "train").token_counts(len(tokenizer))
    return load_model(folder, read, Vocabulary.of(tokenizer, counts)).state_dict()


def assert_same_training(one: list[dict], other: list[dict], rel: float = 2e-5) -> None:
    for left, right in zip(one, other, strict=True):
        for key in ("loss", "grad_norm", "effective_sample_size"):
            assert left[key] == pytest.approx(right[key], rel=rel), (left["step"], key)


def plain(document: dict, by_micro_batch: bool = False, halves: int = 1) -> list[dict]:
    """Train with PRESENCE (arXiv 2311.00913, algorithm 2), one backward a sample or micro-batch, scored by ``mlm``;
    return the records.

    With two ``halves`` two micro-batches are one, scored by the product of their gradients.
    """
    parts = build(recipe_from(document, "r.yaml"), dtype=torch.float32)
    model, config = parts.model, parts.recipe.training
    named = dict(model.named_parameters())
    first_block = [name for name in named if "encoder.layer.0." in name]
    adamw = [{"params": [p], "weight_decay": config.optimizer.weight_decay * (p.ndim > 1)} for p in named.values()]
    optimizer = torch.optim.AdamW(adamw, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps)
    loader, records = parts.loader(rank=0, world_size=1), []
    for step in range(config.steps):
        batches = loader.next().micro_batches
        if not by_micro_batch:
            ids, visits = (torch.cat([getattr(each, name) for each in batches]) for name in ("sample_ids", "visits"))
            pairs = zip(ids.tolist(), visits.tolist(), strict=True)
            batches = [lay_out([[parts.store[i]]], 64, [i], [visit]) for i, visit in pairs]
        losses, gradients, whole = [], [], [dict.fromkeys(named, 0.0) for _ in batches]
        for name, objective in model.objectives.items():
            views = [objective.corrupt(batch, 0.0) for batch in batches]
            counts = [int(view.counts[name].sum()) for view in views]
            own = [objective.loss(model, v)[name].total / sum(counts) / len(model.objectives) for v in views]
            grads = [torch.autograd.grad(o, list(named.values()), materialize_grads=True) for o in own]
            losses += own
            if name == "mlm":
                targets, gradients = counts, [dict(zip(named, each, strict=True)) for each in grads]
            whole = [
                {n: w[n] + g for n, g in zip(named, each, strict=True)} for w, each in zip(whole, grads, strict=True)
            ]
        pairs = zip(gradients[::halves], gradients[halves - 1 :: halves], strict=True)
        scores = [sum(float((a[n].double() * b[n].double()).sum()) for n in first_block) for a, b in pairs]
        summed = sum(float(sum(each[n].double() for each in gradients).square().sum()) for n in first_block)
        targets = [sum(targets[n : n + halves]) for n in range(0, len(targets), halves)]
        scored = [number for number, count in enumerate(targets) if count]
        temperature = 1.0 if step < config.steps / 2 else -1.0
        weights = [1.0] * len(scores)
        for number, weight in zip(scored, written_out([scores[n] for n in scored], temperature), strict=True):
            weights[number] = weight
        for name, parameter in named.items():
            parameter.grad = sum(weights[n // halves] * each[name] for n, each in enumerate(whole))
        norm = float(torch.nn.utils.clip_grad_norm_(named.values(), config.gradient_clipping))
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * config.schedule.factor(step, config.steps)
        optimizer.step()
        size = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
        samples = {"scores": scores, "weights": weights, "targets": targets, "square_of_sum": summed}
        samples["squares"] = [sum(float(each[n].double().square().sum()) for n in first_block) for each in gradients]
        own = [float(loss.detach()) * len(scores) for loss in losses]
        samples["losses"] = [sum(own[n : n + halves]) for n in range(0, len(own), halves)]
        records.append(
            {
                "loss": float(sum(losses).detach()),
                "grad_norm": norm,
                "effective_sample_size": size,
                "step": step + 1,
                **samples,
            }
        )
    return records


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    return plain(weighed(corpus, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(
    ("rows", "ds", "world_size", "weigher"),
    [
        (8, "zero2.json", 1, {}),
        (4, "zero1.json", 2, {}),
        (2, "zero3.json", 2, {"gradient": "two_pass"}),
    ],
)
def test_a_run_is_presence_written_out_with_a_backward_for_each_sample(
    corpus, tmp_path, ranks, expected, rows, ds, world_size, weigher
):
    records, said = run(weighed(corpus, tmp_path / "run", rows, **weigher), ds, ranks if world_size > 1 else None)
    assert "note" not in said
    assert max(each["effective_sample_size"] for each in records) < 0.95
    assert_same_training(records, expected)
    for told, each in zip(read_sample_log(tmp_path / "run"), expected, strict=True):
        scores = [len(each["scores"]) ** 2 * score for score in each["scores"]]  # of losses whose mean is the step's
        assert told["scores"] == pytest.approx(scores, rel=1e-4)
        assert told["weights"] == pytest.approx(each["weights"], rel=1e-4)
        assert told["targets"] == each["targets"]


@pytest.mark.parametrize(
    ("rows", "ds", "keys", "reason"),
    [
        (8, "zero3.json", {}, "ZeRO stage 3"),
        (4, "zero2.json", {}, "a step's 2 micro-steps depend on each other"),
        (8, "zero2.json", {"activation_checkpointing": True}, "model.activation_checkpointing"),
    ],
)
def test_what_cannot_be_deferred_takes_two_passes_and_says_why(corpus, tmp_path, expected, rows, ds, keys, reason):
    document = weighed(corpus, tmp_path / "run", rows)
    document["model"] |= keys
    records, said = run(document, ds)
    assert said.count("note: weigher: two passes a step: ") == 1 and reason in said
    assert_same_training(records, expected)


@pytest.mark.parametrize(
    ("ds", "reference", "rows", "steps", "objectives", "weigher"),
    [
        ("zero0.json", "zero3.json", 4, 20, ("mlm",), {"score": "layer_norm"}),
        ("zero1.json", "zero1.json", 2, 5, ("cse", "mlm"), {"normalise": "window", "window": 40}),
        ("zero2.json", "zero2.json", 4, 5, ("cse", "mlm", "rtd"), {"score_objective": "each", "layers": "all"}),
        ("zero1.json", "zero1.json", 2, 5, ("mlm", "rtd"), {"granularity": "microbatch"}),
    ],
)
def test_after_twenty_steps_a_deferred_gradient_has_trained_as_two_passes_do(
    corpus, tmp_path, ranks, ds, reference, rows, steps, objectives, weigher
):
    told, weights = [], []
    for gradient, stage in (("deferred", ds), ("two_pass", reference)):
        document = weighed(corpus, tmp_path / gradient, rows, objectives, 0.1, gradient=gradient, **weigher)
        if "cse" in objectives:
            document["objectives"]["cse"]["group_rows"] = 2
        document["training"]["steps"] = steps
        records, said = run(document, stage, ranks)
        assert "note" not in said
        told.append(records)
        weights.append(weights_after(tmp_path / gradient, steps))
    assert_same_training(*told, rel=1e-4)
    for name, one in weights[0].items():
        if "key.bias" not in name:  # softmax does not feel it: its gradient is rounding, which Adam makes a step of
            assert float((one - weights[1][name]).norm()) <= 1e-5 * float(one.norm()), name


def test_in_bf16_a_deferred_gradient_trains_as_two_passes_do(corpus, tmp_path):
    """Both are rounded at other places, so they are compared with fp32 as well."""
    told = {}
    for name, gradient, ds in (
        ("deferred", "deferred", "zero2-bf16.json"),
        ("two_pass", "two_pass", "zero2-bf16.json"),
        ("fp32", "deferred", "zero2.json"),
    ):
        records, said = run(weighed(corpus, tmp_path / name, gradient=gradient), ds)
        assert "note" not in said and max(each["effective_sample_size"] for each in records) < 0.95
        told[name] = records
    for other, rel in (("two_pass", 0.01), ("fp32", 0.05)):
        assert_same_training(told["deferred"], told[other], rel)


def test_the_scoring_objectives_weights_are_the_samples_in_all_objectives(corpus, tmp_path):
    document = weighed(corpus, tmp_path / "run", objectives=("std", "mlm"))
    records, _ = run(document)
    assert_same_training(records, plain(document))


@pytest.mark.parametrize(
    ("signal", "gradient", "ds", "world_size"),
    [
        ("norm", "deferred", "zero2.json", 1),
        ("norm", "deferred", "zero0.json", 2),
        ("norm", "two_pass", "zero1.json", 2),
        ("split", "deferred", "zero3.json", 2),
        ("split", "two_pass", "zero2.json", 1),
    ],
)
def test_weighing_micro_batches_is_the_papers_algorithm_2(corpus, tmp_path, ranks, signal, gradient, ds, world_size):
    halves = 2 if signal == "split" else 1
    documents = [
        weighed(corpus, tmp_path / name, rows, granularity="microbatch", signal=signal, gradient=gradient)
        for name, rows in (("run", 2 // world_size), ("plain", 2))
    ]
    for document in documents:
        document["training"]["batch_rows"] = 8 * halves
    records, said = run(documents[0], ds, ranks if world_size > 1 else None)
    assert "note" not in said
    expected = plain(documents[1], True, halves)
    assert_same_training(records, expected)
    for told, each in zip(read_sample_log(tmp_path / "run"), expected, strict=True):
        for column in ("scores", "losses", "targets", "weights"):
            assert told[column] == pytest.approx(each[column], rel=1e-4), column


@contextlib.contextmanager
def allocations():
    """Yield a list that gets an entry for each gradient that an engine makes room for."""
    made, gradient = [], Engine.gradient

    def noted(engine, into=None):
        if into is None:
            made.append(engine)
        return gradient(engine, into)

    with patch.object(Engine, "gradient", noted):
        yield made


@pytest.mark.parametrize(
    ("keys", "number"), [({}, 4), ({"gradient": "two_pass"}, 1), ({"gradient": "two_pass", "signal": "split"}, 2)]
)
def test_gradients_of_micro_batches_are_kept_as_long_as_needed_and_a_dry_run_has_as_many(
    corpus, tmp_path, keys, number
):
    document = weighed(corpus, tmp_path / "run", 2, ("mlm", "rtd"), granularity="microbatch", **keys)
    document["sampler"] = {"name": "uniform"}  # draws one objective a step: two plans
    with allocations() as dry:
        assert train(document, "--dry-run")[0] == 0
    with allocations() as real:
        run(document)
    assert (len(dry), len(real)) == (number, number)


def test_without_temperature_every_weigher_is_bit_identical_to_uniform(corpus, tmp_path):
    def trained(folder: str, **weigher):
        document = weighed(corpus, tmp_path / folder, 4, ("mlm", "cse"), 0.1) | {"weigher": weigher}
        document["objectives"]["cse"]["group_rows"] = 2
        document["training"]["steps"] = 2
        run(document)
        return states(tmp_path / folder / "checkpoints" / "step-00000002")

    uniform = trained("uniform")
    for name in ("presence", "shuffled", "linupper", "loss"):
        assert trained(name, name=name, temperature=0) == uniform
    for keys in ({"granularity": "microbatch"}, {"gradient": "two_pass", "normalise": "window"}):
        assert trained("-".join(keys), name="presence", temperature=0, **keys) == uniform
    assert trained("weighed", name="loss", temperature=0.5) != uniform


def test_a_resumed_run_is_bit_identical(corpus, tmp_path, ranks):
    keys = {"normalise": "window", "window": 40, "switch": "auto", "floor": 0.9}
    document = weighed(corpus, tmp_path / "run", 2, dropout=0.1, **keys) | {"checkpoint": {"interval_steps": 2}}
    run(document, ranks=ranks)
    last, log = tmp_path / "run" / "checkpoints" / "step-00000004", read_sample_log(tmp_path / "run")
    whole, finished = metrics(tmp_path / "run"), states(last)
    shutil.rmtree(last)
    resumed, said = run(document, ranks=ranks)
    assert "going on from" in said and states(last) == finished and read_sample_log(tmp_path / "run") == log
    for one, other in zip(whole, resumed, strict=True):
        fields = ("losses", "weigher", "effective_sample_size", "grad_norm")
        assert [one[name] for name in fields] == [other[name] for name in fields]


def test_shuffled_hands_out_the_weights_that_presence_gives(corpus, tmp_path):
    logs = []
    for name in ("presence", "shuffled"):
        run(weighed(corpus, tmp_path / name, 4, name=name))
        logs.append(read_sample_log(tmp_path / name)[0])
    one, other = logs
    assert one["sample_ids"] == other["sample_ids"] and one["scores"] == other["scores"]
    assert sorted(one["weights"]) == sorted(other["weights"]) and one["weights"] != other["weights"]


def test_the_switch_measures_the_noise_of_the_gradient_that_samples_make(corpus, tmp_path, ranks):
    document = weighed(corpus, tmp_path / "run", 2, layers="encoder.backbone.encoder.layer.0*", switch="auto")
    parts = build(recipe_from(document, "r.yaml"), dtype=torch.float32)
    mlm, (batch,) = (
        parts.model.objectives["mlm"],
        build(recipe_from(weighed(corpus, tmp_path / "whole"), "r.yaml"), dtype=torch.float32)
        .loader(rank=0, world_size=1)
        .next()
        .micro_batches,
    )
    block, gradients = list(parts.model.encoder.backbone.encoder.layer[0].parameters()), []
    for i, visit in zip(batch.sample_ids.tolist(), batch.visits.tolist(), strict=True):
        view = mlm.corrupt(lay_out([[parts.store[i]]], 64, [i], [visit]), 0.0)
        loss = mlm.loss(parts.model, view)["mlm"].total
        if view.counts["mlm"].sum():
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, block)]).double())
    products = torch.stack(gradients) @ torch.stack(gradients).T
    number = len(products)
    signal = float(products.sum() - products.trace()) / (number * (number - 1))
    noise = (float(products.trace()) / number - signal) / number
    records, _ = run(document, ranks=ranks)
    assert records[0]["weigher"]["noise_to_signal"] == pytest.approx(noise / signal, rel=1e-3)
    assert records[0]["weigher"]["temperature"] == 1.0


@pytest.mark.parametrize("signal", ["norm", "split"])
def test_the_switch_measures_the_noise_of_micro_batches_too(corpus, tmp_path, signal):
    keys = {"granularity": "microbatch", "switch": "auto", "signal": signal}
    documents = [
        weighed(corpus, tmp_path / gradient, 2, gradient=gradient, **keys) for gradient in ("deferred", "two_pass")
    ]
    for document in documents:
        document["training"]["steps"] = 1
    (exact,) = plain(documents[0], by_micro_batch=True)
    number, total = len(exact["squares"]), sum(exact["squares"])
    signal = (exact["square_of_sum"] - total) / (number * (number - 1))
    noise = (total / number - signal) / number
    for document in documents:
        (record,), _ = run(document)
        assert signal > 0 and record["weigher"]["noise_to_signal"] == pytest.approx(noise / signal, rel=1e-3)


def test_a_small_effective_sample_size_is_said_once(corpus, tmp_path):
    _, said = run(weighed(corpus, tmp_path / "run", floor=1.0, temperature=3))
    assert said.count("warning: step 1: the effective sample size is 0.") == said.count("warning") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "microbatch", "rows": 8}, "weigher.granularity: weighing micro-batches needs two micro-steps"),
        ({"granularity": "microbatch", "rows": 4, "signal": "split"}, "needs four micro-steps, or six, eight, …,"),
        ({"layers": "encoder.layr.0"}, "weigher.layers: unknown module 'encoder.layr.0'; did you mean"),
        ({"score_objective": "rtd"}, "weigher.score_objective: unknown objective 'rtd'"),
    ],
)
def test_a_weigher_that_cannot_work_is_one_line(corpus, tmp_path, changes, message):
    code, _, err = train(weighed(corpus, tmp_path / "run", changes.pop("rows", 8), **changes))
    assert code == 2 and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize("packing", [False, True])
def test_a_micro_batch_of_one_sample_is_one_line(tmp_path, packing):
    filling = write_corpus(tmp_path / "filling", lengths=(33, 65))  # no two of which share a row of 64
    document = weighed(filling, tmp_path / "run", 1, granularity="microbatch")
    document["data"]["packing"] = packing
    code, _, err = train(document)
    assert code == 2 and len(err.splitlines()) == 1
    assert "weigher.granularity: each micro-batch is a single sample" in err


def test_micro_batches_of_which_many_are_one_sample_are_noted(tmp_path):
    mixed = write_corpus(tmp_path / "mixed", lengths=(20, 65))
    _, said = run(weighed(mixed, tmp_path / "run", 1, granularity="microbatch"))
    (note,) = (line for line in said.splitlines() if "note: weigher: " in line)
    assert "% of the samples are a micro-batch by themselves; raise training.micro_batch_rows" in note


def test_micro_batches_of_which_a_few_are_one_sample_or_the_ranks_have_several_are_not(corpus, tmp_path, ranks):
    few = weighed(corpus, tmp_path / "few", 1, granularity="microbatch")
    few["data"]["row_length"] = 37  # where samples of 32 tokens are alone
    filling = write_corpus(tmp_path / "filling", lengths=(33, 65))
    halves = weighed(filling, tmp_path / "halves", 1, granularity="microbatch", signal="split")
    shared = weighed(filling, tmp_path / "shared", 1, granularity="microbatch")
    for document, given in ((few, None), (halves, None), (shared, ranks)):
        document["training"]["steps"] = 1
        assert "note" not in run(document, ranks=given)[1]


def test_refusing_micro_batches_of_one_sample_copies_no_store(tmp_path):
    filling = write_corpus(tmp_path / "filling", lengths=(33, 65))
    document = weighed(filling, tmp_path / "run", 1, granularity="microbatch")
    document["data"]["cache"] = {"folder": str(tmp_path / "cache")}
    assert train(document)[0] == 2
    assert not list(tmp_path.glob("cache/**/*.bin"))


def test_a_run_is_resumed_with_another_way_to_the_same_weights(corpus, tmp_path):
    document = weighed(corpus, tmp_path / "run", 2, granularity="microbatch")
    run(document)
    document["weigher"]["gradient"] = "two_pass"
    _, said = run(document)
    assert "going on from" in said


def test_a_run_is_not_resumed_with_another_weigher(corpus, tmp_path):
    run(weighed(corpus, tmp_path / "run", name="loss"))
    code, _, err = train(weighed(corpus, tmp_path / "run", name="linupper"))
    assert code == 2 and "weigher: differs from that of" in err


@pytest.mark.parametrize(
    "weigher",
    [
        {},
        {"gradient": "two_pass"},
        {"name": "linupper"},
        {"granularity": "microbatch"},
        {"granularity": "microbatch", "gradient": "two_pass"},
    ],
)
def test_a_dry_run_does_what_weighing_takes_and_leaves_nothing(corpus, tmp_path, weigher):
    rows = 2 if "granularity" in weigher else 8
    document = weighed(corpus, tmp_path / "run", rows, ("mlm", "rtd"), **weigher)
    code, out, err = train(document, "--dry-run")
    assert code == 0 and "peak memory" in out, err
    assert not (tmp_path / "run").exists()


def test_meta_tartan_takes_no_weigher(corpus, tmp_path):
    task = write_task(tmp_path / "task")
    document = weighed(corpus, tmp_path / "run")
    document["objectives"]["end_task"] = {"task": str(task)}
    document["sampler"] = {"name": "meta_tartan", "dev_samples": 3, "head_samples": 3}
    code, _, err = train(document)
    assert code == 2 and "weigher.name: 'presence' does not go with the sampler 'meta_tartan'" in err
