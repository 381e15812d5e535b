"""Learning which spans to mask from answers."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from pretrain.cli import main
from pretrain.errors import UserError
from pretrain.masking.learning import training
from pretrain.masking.learning.answers import Context, read_answers
from pretrain.masking.learning.extractor import Extractor
from pretrain.masking.learning.scores import normalised, random_spans, score_spans, token_f1
from pretrain.masking.learning.spans import Borders
from pretrain.masking.learning.supervised import is_dev, learn
from pretrain.masking.learning.training import Settings, answer_losses, judge
from pretrain.masking.learning.windows import Window, WindowMaker
from tests.masking.extraction import tiny_bert, toy_data, toy_tokenizer, wordpiece

QUICK = Settings(steps=6, batch=5, lr=1e-3, max_length=24, dev_interval=2, dev_fraction=0.2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("data") / "toy.jsonl", 110)


def silent(line: str) -> None:
    pass


def test_answers_that_can_be_told_are_found_and_random_spans_are_not(bert, tmp_path):
    settings = Settings(steps=150, batch=16, lr=3e-3, max_length=40, dev_fraction=0.15, dev_interval=50)
    result = learn(bert, toy_data(tmp_path / "toy.jsonl", 300), tmp_path / "out", settings, log=silent)
    dev, control = result["dev"], result["control"]
    assert dev["recall_at_1"] > 0.9 and dev["exact_match"] > 0.9 and dev["f1"] > 0.9
    assert control["recall_at_1"] < 0.3 and control["exact_match"] < 0.3
    assert dev["recall_at_k"] >= dev["recall_at_1"]
    assert result["moments"][0]["loss"] > result["moments"][-1]["loss"]


def test_the_folder_holds_an_extractor_that_transformers_loads_too(bert, data, tmp_path):
    learn(bert, data, tmp_path / "out", QUICK, log=silent)
    assert {"config.json", "model.safetensors", "tokenizer.json", "extractor.json", "metrics.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    extractor, card = Extractor.load(tmp_path / "out")
    assert (card.method, card.max_length, card.max_span, card.top_k) == ("supervised", 24, 10, 10)
    tokens, real = extractor.pad([np.array([2, 7, 9, 3]), np.array([2, 3])])
    theirs = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        ours, other = extractor.logits(tokens, real), theirs(tokens, attention_mask=real.long())
        alone = theirs(tokens[1:, :2])
    assert torch.equal(ours[0], other.start_logits) and torch.equal(ours[1], other.end_logits)
    assert torch.allclose(ours[0][1, :2], alone.start_logits[0], atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == toy_tokenizer().get_vocab()


def test_a_model_that_takes_fewer_tokens_is_told_and_read_to_its_limit(bert, data, tmp_path):
    told = []
    learn(bert, data, tmp_path / "out", Settings(**{**vars(QUICK), "max_length": 65, "steps": 1}), log=told.append)
    assert told[0] == "note: the model takes 64 tokens, fewer than --max-length 65"
    assert Extractor.load(tmp_path / "out")[1].max_length == 64


def test_the_same_seed_learns_the_same_and_another_does_not(bert, data, tmp_path):
    settings = [QUICK, QUICK, Settings(**{**vars(QUICK), "seed": 1})]
    state = torch.random.get_rng_state()
    results = [learn(bert, data, tmp_path / str(i), its, log=silent) for i, its in enumerate(settings)]
    weights = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert weights[0] == weights[1] != weights[2]
    assert results[0]["moments"] == results[1]["moments"] != results[2]["moments"]


def test_the_step_best_on_dev_is_kept(bert, data, tmp_path):
    settings = Settings(**{**vars(QUICK), "steps": 12, "dev_interval": 2, "lr": 0.02})
    result = learn(bert, data, tmp_path / "out", settings, log=silent)
    ranks = [(-moment["dev"]["recall_at_k"], moment["dev_loss"], moment["step"]) for moment in result["moments"]]
    assert [rank[2] for rank in ranks] == list(range(2, 13, 2))
    assert result["step"] == min(ranks)[2]
    extractor, _ = Extractor.load(tmp_path / "out")
    contexts = [context for context in read_answers(data, 0).contexts if is_dev(context.text, 0.2)]
    windows, _ = WindowMaker(extractor.tokenizer, 24, 6)(contexts)
    loss, dev, control = judge(extractor, windows, settings)
    assert (dev, control) == (result["dev"], result["control"]) and loss == pytest.approx(min(ranks)[1])


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([(0.2, 1.0), (0.9, 2.0), (0.1, 0.5)], 2),  # recall before loss
        ([(0.9, 2.0), (0.9, 1.0), (0.9, 1.0)], 2),  # of equals the lower loss, then the first
        ([(0.9, 1.0), (0.9, 1.0), (0.9, None)], 1),
        ([(0.0, None), (0.0, None), (0.1, None)], 3),
    ],
)
def test_the_weights_kept_are_those_of_the_step_with_the_best_recall(script, best, bert, data, tmp_path, monkeypatch):
    seen = []

    def judged(extractor, windows, settings):
        recall, loss = script[len(seen)]
        seen.append({name: value.clone() for name, value in extractor.model.state_dict().items()})
        scores = dict.fromkeys(("exact_match", "f1", "recall_at_1", "recall_at_k"), recall)
        return loss, scores, scores

    monkeypatch.setattr(training, "judge", judged)
    assert learn(bert, data, tmp_path / "out", QUICK, log=silent)["step"] == 2 * best
    kept = Extractor.load(tmp_path / "out")[0].model.state_dict()
    matches = [all(torch.equal(kept[name], value) for name, value in state.items()) for state in seen]
    assert matches == [number == best for number in (1, 2, 3)]


def test_dev_contexts_are_not_learnt_from(bert, data, tmp_path):
    """Other answers in the dev part change nothing but the choice of the step."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        if is_dev(row["context"], 0.2):
            row["answers"] = [{"text": row["context"].split()[0], "start": 0}]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [learn(bert, file, tmp_path / file.stem, QUICK, log=silent) for file in (data, other)]
    losses = [[moment["loss"] for moment in result["moments"]] for result in results]
    assert losses[0] == losses[1] and results[0]["dev"] != results[1]["dev"]
    contexts = results[0]["data"]["dev"]["contexts"], results[0]["data"]["train"]["contexts"]
    assert contexts == (sum(is_dev(row["context"], 0.2) for row in rows), len(rows) - contexts[0])


def test_the_loss_is_the_cross_entropy_of_where_words_begin_and_end(bert):
    extractor, _ = Extractor.on(str(bert))
    extractor.model.eval()
    ids = extractor.tokenizer("w1 w2xy w3 a4y w5")["input_ids"]
    assert extractor.tokenizer.convert_ids_to_tokens(ids)[2:5] == ["w2", "##x", "##y"]
    windows = [
        Window(np.array(ids), *np.zeros((2, len(ids)), int), "", answers) for answers in (((2, 4), (6, 7)), ((1, 5),))
    ]
    windows[1] = Window(np.array(ids[:6]), *np.zeros((2, 6), int), "", ((1, 5),))  # beside a longer one: padded
    losses = answer_losses(extractor, windows)
    expected = []
    for window, begins, ends in ((windows[0], [1, 2, 5, 6, 8], [1, 4, 5, 7, 8]), (windows[1], [1, 2, 5], [1, 4, 5])):
        with torch.no_grad():
            out = extractor.model(torch.from_numpy(window.tokens)[None])
        start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        for first, last in window.answers:
            shares = math.exp(start[first]) / sum(math.exp(start[i]) for i in begins)
            shares *= math.exp(end[last]) / sum(math.exp(end[i]) for i in ends)
            expected.append(-math.log(shares))
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(answer_losses(extractor, windows, longest=3), losses[:2])
    assert answer_losses(extractor, windows, longest=1).shape == (0,)


def test_scores_are_squads_and_recall_counts_places():
    tokenizer = wordpiece(["the", "red", "house", "big", "stood", "and", "."])
    make = WindowMaker(tokenizer, 20, 0)
    context = "the red house stood and the big red house ."
    (one,), _ = make([Context(context, ((4, 13), (24, 41)))])
    (other,), _ = make([Context(context, ((14, 19),))])
    assert one.answers == ((2, 3), (6, 9)) and one.text(6, 9) == "the big red house"
    chosen = [[(2, 3), (5, 5), (6, 9)], []]
    scores = score_spans([one, other], chosen, 2)
    assert scores == {"exact_match": 0.5, "f1": 0.5, "recall_at_1": 1 / 3, "recall_at_k": 1 / 3}
    assert score_spans([one, other], chosen, 3)["recall_at_k"] == 2 / 3
    # the other "red house" has the right words at the wrong place
    scores = score_spans([one, other], [[(8, 9)], [(3, 4)]], 1)
    assert scores == {"exact_match": 0.5, "f1": (1 + 2 / 3) / 2, "recall_at_1": 0.0, "recall_at_k": 0.0}


@pytest.mark.parametrize(
    ("ours", "theirs", "f1"),
    [
        ("The Red, house!", "red house", 1.0),
        ("red red house", "red house house", 2 / 3),
        ("a", "the", 1.0),
        ("a", "house", 0.0),
        ("anthem", "them", 0.0),
    ],
)
def test_f1_is_of_words_without_articles_and_punctuation(ours, theirs, f1):
    assert token_f1(ours, theirs) == token_f1(theirs, ours) == pytest.approx(f1)
    assert (normalised(ours) == normalised(theirs)) == (f1 == 1)


def test_random_spans_have_the_lengths_of_the_chosen_and_keep_to_words():
    rng = np.random.default_rng(0)
    begins = torch.from_numpy(rng.random((3, 40)) < 0.7)
    text = torch.ones(3, 40, dtype=torch.bool)
    text[:, [0, 39]] = text[2, 20] = False
    begins = (begins & text) | (text & ~torch.nn.functional.pad(text, (1, 0))[:, :-1])
    ends = text & ~torch.nn.functional.pad(text & ~begins, (0, 1))[:, 1:]
    found, met = Borders(begins, ends, text), set()
    for window in range(60):
        row = window % 3
        spans = [(i, j) for i in range(40) for j in range(i, min(i + 6, 40)) if begins[row, i] and ends[row, j]]
        spans = [(i, j) for i, j in spans if text[row, i : j + 1].all()]
        like = []
        for i, j in rng.permutation(spans).tolist():
            if len(like) < 5 and all(j < a or i > b for a, b in like):
                like.append((i, j))
        drawn = random_spans(like, found, row, 3, window)
        assert drawn == random_spans(like, found, row, 3, window)
        assert set(drawn) <= set(spans) and all(
            b < c or d < a for (a, b) in drawn for (c, d) in drawn if (a, b) != (c, d)
        )
        lengths = [[j - i for i, j in its] for its in (drawn, like)]
        assert lengths[0] == lengths[1] or len(drawn) < len(like)
        assert lengths[0][0] == lengths[1][0]
        met.add(drawn[0])
    assert len(met) > 20
    assert random_spans([], found, 0, 3, 0) == []


def test_random_spans_are_uniform_over_their_places():
    text = torch.ones(1, 12, dtype=torch.bool)
    found, counts = Borders(text, text, text), np.zeros(12)
    for window in range(5000):
        counts[random_spans([(4, 6)], found, 0, 1, window)[0][0]] += 1
    assert (counts[10:] == 0).all() and (abs(counts[:10] - 500) < 5 * np.sqrt(500)).all()


def test_the_command_learns_prints_the_control_and_leaves_no_half_folder(bert, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["learn-mask", "supervised", "--model", str(bert), "--data", str(data), "--out", str(out)]
    quick = ["--steps", "2", "--batch", "4", "--max-length", "24", "--dev-fraction", "0.2", "--top-k", "3"]
    assert main([*arguments, *quick]) == 0
    printed = capsys.readouterr().out
    assert "recall@3" in printed and "random spans" in printed and f"written: {out}" in printed
    assert main([*arguments, *quick]) == 2
    assert f"{out}: exists already" in capsys.readouterr().err
    assert main([*arguments, *quick, "--overwrite", "--lr", "2"]) == 2
    assert "--lr 2.0: must be between 0 and 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"max_span": 0}, "--max-span 0: must be at least 1"),
        ({"dev_fraction": 1.0}, "--dev-fraction 1.0: must be between 0 and 1"),
        ({"max_bad": -0.1}, "--max-bad -0.1: must be at least 0"),
        ({"overlap": 22}, "--overlap 22: windows of 24 tokens have room for 22 tokens of text, overlap of 22"),
        ({"dev_fraction": 1e-12}, "toy.jsonl: dev has no window with an answer"),
        ({"max_span": 1, "max_length": 8, "overlap": 0, "dev_fraction": 1 - 1e-12}, "toy.jsonl: train has no window"),
    ],
)
def test_settings_that_cannot_be_used_are_told(changes, told, bert, data, tmp_path):
    with pytest.raises(UserError) as error:
        learn(bert, data, tmp_path / "out", Settings(**{**vars(QUICK), **changes}), log=silent)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_told_and_nothing_is_written(bert, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Extractor, "logits", lambda self, tokens, real: 2 * [tokens * self.model.qa_outputs.weight.sum() * math.nan]
    )
    with pytest.raises(UserError, match=r"the loss is not finite by step 2; try a lower --lr than 0.001"):
        learn(bert, data, tmp_path / "out", QUICK, log=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_no_extractor_or_a_damaged_one_is_told(bert, data, tmp_path):
    with pytest.raises(UserError, match=r"no span extractor: no extractor.json; make one with 'medley learn-mask"):
        Extractor.load(bert)
    out = tmp_path / "out"
    learn(bert, data, out, QUICK, log=silent)
    weights, card = (out / "model.safetensors").read_bytes(), (out / "extractor.json").read_text()
    (out / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError):
        Extractor.load(out)
    for damaged in ("{", "[]", '{"format_version": 1}', card.replace("1,", "7,", 1)):
        (out / "extractor.json").write_text(damaged)
        with pytest.raises(UserError, match=r"extractor\.json"):
            Extractor.load(out)
