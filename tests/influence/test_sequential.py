"""PRESENCE-Sequential: score, filter, train on the rest."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.cli import main
from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.data.view import write_view
from pretrain.export import load_model
from pretrain.influence.sequential import score as scoring
from pretrain.influence.sequential import scores as score_files
from pretrain.influence.sequential.score import score
from pretrain.influence.sequential.scores import Scores
from pretrain.model.vocabulary import Vocabulary
from pretrain.recipe import load_recipe
from tests.builders import lay_out
from tests.training.runs import metrics, recipe, train, write_corpus

SAMPLES = 61


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a corpus and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus", samples=SAMPLES, heldout=5)
    objectives = {"mlm": {}, "rtd": {}, "cse": {"group_rows": 2}}
    document = recipe(corpus, folder / "run", objectives=objectives, training__steps=2, heldout={"rows": 0})
    assert train(document)[0] == 0
    return corpus, folder / "run"


@pytest.fixture
def corpus(trained, tmp_path):
    """Return a view of the whole corpus, to keep scores beside."""
    folder = tmp_path / "pool"
    folder.mkdir()
    write_view(folder, trained[0], np.arange(SAMPLES), folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make chunks and batches so small that there are several."""
    monkeypatch.setattr(score_files, "CHUNK_SAMPLES", 17)
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 150)


class Terminal(io.StringIO):
    """Standard error as somebody watches it."""

    def isatty(self) -> bool:
        return True


def medley(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def one_by_one(run: Path, corpus: Path, objective: str, layers, visits: int = 1) -> list[float]:
    """Return the scores, a batch of one sample after another, by plain autograd."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    store, tokenizer = Store(corpus / "train"), load_tokenizer(corpus / "tokenizer")
    vocabulary = Vocabulary.of(tokenizer, store.token_counts(len(tokenizer)))
    model = load_model(folder, load_recipe(folder / "config.yaml"), vocabulary)
    which, found = model.objectives[objective], np.zeros(len(store))
    views = [
        [which.corrupt(lay_out([[s]], ids=[i], visits=[v]), 1.0) for i, s in enumerate(store)] for v in range(visits)
    ]
    for each in views:
        for i, view in enumerate(each):
            loss = 0.0
            losses = which.loss(model, view)
            for term, weight in which.terms.items():
                mean = sum(float(one.counts[term].sum()) for one in views[0]) / len(store)
                loss = loss + weight / mean * losses[term].total
            gradient = torch.autograd.grad(loss, list(layers(model)), allow_unused=True)
            found[i] += sum(float(part.double().square().sum()) for part in gradient if part is not None) / visits
    return found.tolist()


def first_block(model):
    return model.encoder.backbone.encoder.layer[0].parameters()


@pytest.mark.parametrize(("objective", "visits"), [("mlm", 2), ("rtd", 1)])
def test_scores_are_those_of_plain_autograd_one_sample_at_a_time(trained, corpus, objective, visits):
    summary = score(trained[1], corpus, "test", objective=objective, visits=visits)
    assert summary["samples"] == SAMPLES and summary["published"]
    found = Scores(Store(corpus / "train"), "test").values
    assert found.tolist() == pytest.approx(one_by_one(trained[1], corpus, objective, first_block, visits), rel=1e-4)


def test_any_number_of_ranks_and_any_interruption_make_the_same_bits(trained, corpus, monkeypatch):
    score(trained[1], corpus, "whole")
    expected = Scores(Store(corpus / "train"), "whole").values.tobytes()
    summaries = [score(trained[1], corpus, "ranks", rank=rank, ranks=3) for rank in (2, 0, 1)]
    assert [each["published"] for each in summaries] == [False, False, True]
    assert sum(each["samples"] for each in summaries) == SAMPLES
    assert Scores(Store(corpus / "train"), "ranks").values.tobytes() == expected
    late = score(trained[1], corpus, "ranks", rank=3, ranks=5)
    assert late["samples"] == 0 and not late["published"]

    done, plain = [], scoring.Scorer.scores

    def stops_after_two(self, begin, end):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(begin)
        return plain(self, begin, end)

    monkeypatch.setattr(scoring.Scorer, "scores", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        score(trained[1], corpus, "resumed")
    assert not (corpus / "train" / "scores" / "resumed").exists()
    monkeypatch.setattr(scoring.Scorer, "scores", plain)
    assert score(trained[1], corpus, "resumed", objective="rtd")["samples"] == SAMPLES  # takes nothing of the other
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert score(trained[1], corpus, "resumed", overwrite=True)["samples"] == SAMPLES - 2 * 17
    shown = [line for line in terminal.getvalue().split("\r") if line.startswith("scoring: ")]
    assert f"{2 * 17}/{SAMPLES} " in shown[0] and f"{SAMPLES}/{SAMPLES} " in shown[-1]  # a bar that goes on as well
    assert Scores(Store(corpus / "train"), "resumed").values.tobytes() == expected
    assert sorted(path.name for path in (corpus / "train" / "scores").iterdir()) == ["ranks", "resumed", "whole"]


def test_launched_ranks_share_the_samples_and_one_tells_of_a_mistake(trained, corpus, monkeypatch, capsys):
    words = ["--local_rank", "0", "--checkpoint", str(trained[1]), "--store", str(corpus)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert scoring.main(words) == 0
        told.append(capsys.readouterr().out)
        assert told[-1].startswith(f"rank {rank}: ")
    assert sum(int(each.split()[2]) for each in told) == SAMPLES
    assert "→" not in told[0] and told[1].rstrip().endswith(f"→ {corpus / 'train' / 'scores' / 'presence'}")
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert scoring.main([*words, "--visits", "0"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_commands_score_filter_and_the_view_is_trained_on(trained, corpus, tmp_path, capsys):
    code, out, _ = medley(capsys, "score", "--checkpoint", trained[1], "--store", corpus, "--layers", "layer_norms")
    assert code == 0 and f"{SAMPLES} samples in" in out and "samples/s" in out
    meta = json.loads((corpus / "train/scores/presence/meta.json").read_text())
    assert meta["made_by"]["objective"] == "mlm" and meta["made_by"]["layers"] == "layer_norms"
    assert "step-00000002" in meta["made_by"]["checkpoint"] and meta["store"] == Store(corpus / "train").fingerprint
    kept = {}
    for number, words in enumerate((("--keep", 0.7), ("--drop-highest", 0.3))):
        out = tmp_path / f"view{number}"
        code, said, _ = medley(capsys, "filter", corpus, "--scores", "presence", *words, "--out", out)
        assert code == 0 and "kept 43 of 61 samples" in said
        kept[number] = Store(out / "train")
    values = Scores(Store(corpus / "train"), "presence").values
    expected = [i for i in range(SAMPLES) if (values < values[i]).sum() < 43]
    whole = Store(corpus / "train")
    for view in kept.values():
        assert [view[i].tolist() for i in range(43)] == [whole[i].tolist() for i in expected]
    assert Store(tmp_path / "view0" / "heldout").fingerprint == Store(trained[0] / "heldout").fingerprint
    document = recipe(tmp_path / "view0", tmp_path / "run", objectives={"mlm": {}}, sampler={}, training__steps=2)
    assert train(document)[0] == 0 and len(metrics(tmp_path / "run")) == 2


def test_what_is_wrong_with_the_scores_is_one_line_with_the_command_that_mends_it(trained, corpus, tmp_path, capsys):
    score(trained[1], corpus, "some")
    words = "--keep", 0.5, "--out", tmp_path / "view"

    def refused(*given) -> str:
        code, _, err = medley(capsys, "filter", *given)
        assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "view").exists()
        return err

    assert "did you mean 'some'?" in refused(corpus, "--scores", "sone", *words)
    assert f"medley score --checkpoint CHECKPOINT --store {corpus} --out x" in refused(corpus, "--scores", "x", *words)
    assert "no prepared corpus" in refused(tmp_path / "nowhere", "--scores", "some", *words)
    assert "--keep 1.5: must be" in refused(corpus, "--scores", "some", "--keep", 1.5, "--out", tmp_path / "view")
    assert "--drop-highest 1" in refused(corpus, "--scores", "some", "--drop-highest", 1, "--out", tmp_path / "view")
    folder = corpus / "train" / "scores" / "some"
    (folder / "scores.bin").write_bytes(b"1234")
    assert "is damaged" in refused(corpus, "--scores", "some", *words)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"store": "other"}))
    err = refused(corpus, "--scores", "some", *words)
    assert "scores of another store" in err and "--out some --overwrite" in err


def test_only_a_view_is_overwritten_by_a_view(trained, corpus, tmp_path, capsys):
    score(trained[1], corpus, "some")
    words = ["filter", corpus, "--scores", "some", "--out", tmp_path / "view"]
    assert medley(capsys, *words, "--keep", 0.5)[0] == 0
    code, _, err = medley(capsys, *words, "--keep", 0.25)
    assert code == 2 and "--overwrite" in err
    assert medley(capsys, *words, "--keep", 0.25, "--overwrite")[0] == 0
    assert len(Store(tmp_path / "view" / "train")) == 15
    code, _, err = medley(capsys, *words[:-1], trained[0], "--keep", 0.5, "--overwrite")
    assert code == 2 and "is no view" in err and (trained[0] / "train" / "tokens-00000.bin").exists()


def test_scoring_that_cannot_be_is_one_line(trained, corpus, tmp_path, capsys):
    def refused(**given) -> str:
        options = {"checkpoint": trained[1], "store": corpus} | given
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        code, _, err = medley(capsys, "score", *words)
        assert code == 2 and len(err.splitlines()) == 1
        return err

    assert "cse cannot score the samples of a store one by one; name one of mlm, rtd" in refused(objective="cse")
    assert "unknown objective 'mlmm'; did you mean 'mlm'?" in refused(objective="mlmm")
    assert "no prepared corpus" in refused(store=tmp_path / "nowhere")
    assert "neither a checkpoint" in refused(checkpoint=tmp_path)
    assert "--out a/b: must be a name" in refused(out="a/b")
    assert "--visits 0" in refused(visits=0)
    other = write_corpus(tmp_path / "other", samples=9, heldout=2, sentinels=3)
    assert "its tokenizer is not the checkpoint's; prepare the corpus" in refused(store=other)
    score(trained[1], corpus, "there")
    assert "exists already" in refused(out="there", objective="rtd")
