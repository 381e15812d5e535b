"""Studies: questions lie where they should, and the whole command runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_objectives.targets import IGNORED
from pretrain.data.prepare import prepare
from pretrain.data.store import Store
from pretrain.data.tasks import load_task
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig
from pretrain.masking.masker import Masker
from pretrain.model.vocabulary import Vocabulary
from studies import (
    cloze,
    masking,
    mcl,
    mcl_arms,
    mcl_report,
    planting,
    presence,
    presence_arms,
    presence_report,
    records,
    show_masks,
    tartan,
    tartan_arms,
    tartan_report,
)
from studies.drawing import draw_masks
from studies.mask_arms import read_spans, write_spans
from studies.reporting import summarise

NAMES = ("Alice", "Gryphon", "Mock Turtle", "Duchess", "Hatter")
PLACES = ("garden", "kitchen", "forest", "tower", "cellar", "river", "market", "chapel")


def sentences() -> list[str]:
    """Return 160 passages, each with one name inside a sentence, besides some that begin with one."""
    told = [
        f"In the old {place} number {count} we met {name} with {place} keys and a lamp."
        for count in range(4)
        for place in PLACES
        for name in NAMES
    ]
    return [*told, "Alice slept.", "Once again, the queen of Norway was seen walking slowly towards the old harbour."]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences()))
    prepare([text], folder / "corpus", workers=1, heldout=0, vocabulary=300, max_length=64, min_length=2)
    return folder / "corpus"


@pytest.fixture(scope="module")
def found(corpus) -> tuple[Store, list[cloze.Fact], object]:
    store, tokenizer = Store(corpus / "train"), load_tokenizer(corpus / "tokenizer")
    return store, cloze.find_facts(store, cloze.detokenizer(tokenizer)), tokenizer


def test_answers_are_the_names_inside_sentences_and_nothing_else(found):
    store, facts, tokenizer = found
    assert {fact.answer for fact in facts} == set(NAMES)  # "Norway" is too rare, "In" and "Once" begin sentences
    assert len(facts) == 160
    for fact in facts:
        tokens = store[fact.sample][fact.first : fact.last + 1]
        assert tokenizer.decode(tokens.tolist()) == fact.answer
        text = cloze.detokenizer(tokenizer)(store[fact.sample].astype(np.int64)).text
        assert text[fact.start :].startswith(fact.answer)


def test_no_passage_is_in_two_parts(found):
    _, facts, _ = found
    parts = [{fact.sample for fact in facts if fact.part == part} for part in cloze.PARTS]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_equal_neighbourhoods_are_one_question(tmp_path):
    text = tmp_path / "text.jsonl"
    twice = [*sentences(), *(f"{sentence} Indeed so." for sentence in sentences()[:50])]
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in twice))
    prepare([text], tmp_path / "corpus", workers=1, heldout=0, vocabulary=300, max_length=64, min_length=2)
    tokenizer = load_tokenizer(tmp_path / "corpus" / "tokenizer")
    assert len(cloze.find_facts(Store(tmp_path / "corpus" / "train"), cloze.detokenizer(tokenizer))) == 160


def test_a_text_without_names_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and slept for the whole of the day\n\n" * 30)
    prepare([text], tmp_path / "corpus", workers=1, heldout=0, vocabulary=100, max_length=32)
    tokenizer = load_tokenizer(tmp_path / "corpus" / "tokenizer")
    with pytest.raises(UserError, match="no question"):
        cloze.find_facts(Store(tmp_path / "corpus" / "train"), cloze.detokenizer(tokenizer))


def test_a_question_hides_its_answer_and_nothing_else(found):
    store, facts, tokenizer = found
    asked = facts[::17]
    batch, labels = cloze.questions(store, asked, tokenizer.pad_token_id, tokenizer.mask_token_id, store.max_length)
    for row, fact in enumerate(asked):
        sample = torch.from_numpy(store[fact.sample].astype(np.int64))
        hidden = labels[row] != IGNORED
        assert hidden.nonzero().flatten().tolist() == list(range(fact.first, fact.last + 1))
        assert torch.equal(torch.where(hidden, labels[row], batch.tokens[row])[: len(sample)], sample)
        assert (batch.tokens[row][hidden] == tokenizer.mask_token_id).all()


def test_kept_passages_are_those_with_a_fact_and_the_facts_still_fit(found, tmp_path):
    store, facts, _ = found
    kept = cloze.keep_passages(store, facts[5:50], tmp_path / "kept")
    fewer = Store(tmp_path / "kept" / "train")
    assert len(fewer) == 45 and cloze.read_facts(tmp_path / "kept") == kept
    for old, new in zip(facts[5:50], kept, strict=True):
        assert np.array_equal(store[old.sample], fewer[new.sample])
        assert (new.first, new.last, new.answer, new.part) == (old.first, old.last, old.answer, old.part)


def test_spans_are_read_as_they_were_written(found):
    store, _, _ = found
    spans = {0: [(1, 2), (4, 4)], 3: [(2, 5)], len(store) - 1: [(1, 1)]}
    write_spans(store, "some", spans)
    assert read_spans(store, "some") == spans


def test_an_annotated_unit_is_drawn_as_often_as_its_policy_says(found):
    store, _, tokenizer = found
    write_spans(store, "marked", {sample: [(2, 3)] for sample in range(len(store))})
    masker = Masker(MaskingConfig(policy="guided", annotation="marked", rate=0.5), Vocabulary.of(tokenizer), 0, "mlm")
    (drawn,) = draw_masks(masker, store, np.array([7]), 400)
    assert drawn.shape == (400, store.lengths[7])
    assert abs(drawn[:, 2].mean() - 0.5) < 0.1 and (drawn[:, 2] == drawn[:, 3]).all()
    assert not np.delete(drawn, [2, 3], axis=1).any()


def test_differences_are_taken_seed_by_seed():
    def record(arm, seed, exact_match):
        score = {"exact_match": exact_match, "token_accuracy": 0.0, "log_likelihood": -1.0}
        return {"arm": arm, "seed": seed, "score": score, "masks": None, "seconds": 1.0}

    records = [record("random", 0, 0.1), record("random", 1, 0.3), record("a", 1, 0.35), record("a", 0, 0.2)]
    rows = summarise(records, {"random": "Random", "a": "A", "b": "B"}, "random")
    assert rows[1]["gain"] == pytest.approx(7.5) and rows[1]["gain_sd"] == pytest.approx(12.5**0.5)
    assert rows[1]["wins"] == "2/2" and rows[2]["seeds"] == 0


def test_the_study_runs_goes_on_and_tells_what_was_not_run(corpus, tmp_path, capsys):
    steps = [f"--{name}-steps=2" for name in ("base", "tune", "learn", "meta")]
    command = ["--text", str(corpus.parent / "text.jsonl"), "--vocabulary", "300", "--steps", "2", *steps]
    command += ["--out", str(tmp_path / "out"), "--arms", "none,random,supervised,control,oracle"]
    assert masking.main([*command, "--seeds", "1"]) == 0
    assert masking.main([*command, "--seeds", "2"]) == 0
    table = capsys.readouterr().out
    assert "| learnt, meta-gradient | not run |" in table
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in result["records"]][::5] == [("none", 0), ("none", 1)]
    assert len(result["records"]) == 10
    by_arm = {r["arm"]: r for r in result["records"]}
    assert by_arm["oracle"]["masks"]["answers"] > by_arm["random"]["masks"]["answers"]
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 9
    assert masking.main([*command, "--steps", "3"]) == 2  # another study's folder


def test_pictures_of_masks_show_each_token_once(corpus, tmp_path):
    maskings = {"random": MaskingConfig(), "words": MaskingConfig(policy="whole_word", rate=0.9)}
    shown = show_masks.show(corpus, [0, 5], maskings, visits=20)
    assert [each.title for each in shown] == ["random", "random", "words", "words"]
    for each in shown:
        assert "".join(text for text, _ in each.pieces()) == each.text.text
    assert shown[2].probabilities[1:-1].mean() > 0.7 > shown[0].probabilities[1:-1].mean()
    assert shown[0].probabilities[[0, -1]].tolist() == [0, 0]  # special tokens
    assert show_masks.main([str(corpus), "--samples", "0,5", "--visits", "3", "--out", str(tmp_path / "masks")]) == 0
    assert (tmp_path / "masks.html").read_text().count("<h2>") == len(show_masks.DEFAULT)
    assert show_masks.main([str(corpus), "--samples", "99999", "--out", str(tmp_path / "masks")]) == 2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with one task, of 2 classes, and its domain text."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "places").mkdir()
    for split, count in (("train", 24), ("dev", 9), ("test", 7)):
        rows = [{"text": text, "label": str("garden" in text)} for text in sentences()[:160:3][:count]]
        (folder / "places" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "places" / "domain.txt").write_text("\n\n".join(sentences()))
    return folder


def test_the_tartan_study_runs_and_goes_on_and_no_arm_spends_more_than_another(tasks, tmp_path, capsys):
    command = ["--tasks", str(tasks), "--only", "places", "--quick", "--vocabulary", "300", "--max-train", "20"]
    command += ["--out", str(tmp_path / "out")]
    assert tartan.main([*command, "--seeds", "1", "--arms", "none,tapt"]) == 0
    before = records.read(tmp_path / "out")
    assert tartan.main([*command, "--seeds", "1"]) == 0
    assert "| places | META-TARTAN | macro_f1 |" in capsys.readouterr().out
    done = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert done[:2] == before and [record["arm"] for record in done] == list(tartan_arms.ARMS)
    none, tapt, mt, meta = done
    assert tapt["steps"] > mt["steps"] >= meta["steps"] >= 2 and len(mt["dev_of_first_stage"]) == 2
    place = tartan_arms.Place(
        "places", *(tmp_path / "out" / name for name in ("tasks/places", "corpora/places")), *"__"
    )
    step = tartan_arms.costs(place, tartan.QUICK).step
    for record in (tapt, mt, meta):
        assert 0 <= none["passes"] - record["passes"] < step[record["arm"]] + 9 * 64
    assert mt["weights"] == pytest.approx(dict.fromkeys(("end_task", "task_mlm", "mlm"), 1 / 3))
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert len((tmp_path / "out" / "tasks" / "places" / "train.jsonl").read_text().splitlines()) == 20
    assert tartan.main([*command, "--max-dev", "3"]) == 2  # another study's folder
    assert tartan.main([*command[:3], "nowhere", *command[4:]]) == 2


def test_what_an_arm_spends_is_counted_token_by_token(tasks, tmp_path):
    tokenizer = tmp_path / "corpus"
    prepare([tasks / "places" / "domain.txt"], tokenizer, workers=1, heldout=0, vocabulary=300, max_length=64)
    settings = tartan_arms.Settings(batch=5, dev_samples=4, epochs=7, tune_epochs=2, scorings=3)
    place = tartan_arms.Place("places", tasks / "places", tokenizer, tmp_path, tmp_path)
    costs = tartan_arms.costs(place, settings)
    encode = load_tokenizer(tokenizer / "tokenizer")
    rows = {name: (tasks / "places" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "dev")}
    lengths = {name: [len(encode(json.loads(r)["text"])["input_ids"]) for r in its] for name, its in rows.items()}
    train, dev = lengths["train"], lengths["dev"]
    assert (costs.epoch, costs.scoring) == (3 * sum(train) + sum(dev), sum(dev))
    corpus = Store(tokenizer / "train").lengths[:].mean()
    assert costs.step["tapt"] == pytest.approx(3 * 5 * np.mean(train))
    assert costs.step["mt"] == pytest.approx(3 * 5 * (2 * np.mean(train) + corpus))
    assert costs.step["meta"] - costs.step["mt"] == pytest.approx((3 * 4 + 2) * np.mean(dev))


def test_p_values_are_those_of_counting_by_hand():
    gains = [1.0, 2.0, 3.0, -0.5, 4.0]
    signs = [[1 if number >> place & 1 else -1 for place in range(5)] for number in range(32)]
    means = np.array([np.dot(each, np.abs(gains)) for each in signs])
    found = tartan_report.p_values(gains)
    assert found["p_flips"] == pytest.approx((means >= sum(gains) - 1e-9).mean() * 2)
    assert found["p_t"] == pytest.approx(0.067, abs=0.01)
    assert tartan_report.p_values([1.0]) == {"p_t": None, "p_flips": None}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Text of another domain."""
    text = tmp_path_factory.mktemp("other") / "other.txt"
    text.write_text("\n\n".join(f"x{number} = {number % 7} + y{number} * (z - {number % 5})" for number in range(300)))
    return text


def test_planted_trouble_is_what_it_is_called_and_the_rest_is_as_before(corpus, other, tmp_path):
    text, corpus = corpus.parent / "text.jsonl", tmp_path / "clean"
    # With few entries words are of many tokens.
    prepare([text], corpus, workers=1, heldout=0, vocabulary=160, max_length=64, min_length=2)
    prepare([other], tmp_path / "other", workers=1, heldout=0, tokenizer=corpus / "tokenizer", max_length=64)
    foreign, clean = Store(tmp_path / "other" / "train"), Store(corpus / "train")
    planting.plant(corpus, foreign, tmp_path / "planted", list(planting.TROUBLES))
    kinds, spoilt = planting.kinds_of(tmp_path / "planted"), Store(tmp_path / "planted" / "train")
    assert np.bincount(kinds).tolist() == [108, 18, 18, 18]
    tokenizer = load_tokenizer(corpus / "tokenizer")

    def words(store, number):
        return " ".join(tokenizer.convert_ids_to_tokens(store[number].tolist())).replace(" ##", "").split()

    for number in np.flatnonzero(kinds == 0):
        assert np.array_equal(spoilt[number], clean[number])
    scrambled = np.flatnonzero(kinds == 1)
    assert all(sorted(words(spoilt, number)) == sorted(words(clean, number)) for number in scrambled)
    assert all(words(spoilt, number)[1:-1] != words(clean, number)[1:-1] for number in scrambled)
    assert all(words(spoilt, number)[0] == words(clean, number)[0] for number in scrambled)
    taken = np.concatenate([spoilt[number][1:-1] for number in np.flatnonzero(kinds == 2)])
    stream = np.concatenate([foreign[number][1:-1] for number in range(len(foreign))])
    assert sorted(taken) == sorted(stream[: len(taken)])
    assert all(spoilt[number][1:-1].tobytes() in stream.tobytes() for number in np.flatnonzero(kinds == 2))
    assert np.array_equal(spoilt.lengths[kinds < 3], clean.lengths[kinds < 3])
    copies = np.flatnonzero(kinds == 3)
    assert len({spoilt[number].tobytes() for number in copies}) == 1
    texts = [clean[number].tobytes() for number in range(len(clean))]
    assert not {spoilt[copies[0]].tobytes()} & {texts[number] for number in np.flatnonzero(kinds != 3)}
    with pytest.raises(UserError, match="too few"):
        prepare([other], tmp_path / "less", workers=1, heldout=0.97, tokenizer=corpus / "tokenizer", max_length=64)
        planting.plant(corpus, Store(tmp_path / "less" / "train"), tmp_path / "bad", ["foreign"])
    assert not (tmp_path / "bad").exists()


def test_code_of_another_domain_has_no_documentation():
    code = "".join(planting.source_code(0.1))
    assert len(code) >= 100_000 and "def " in code and "\n    return " in code
    assert code.count('"""') < 10


def test_higher_scores_of_spoilt_samples_are_an_auroc_above_a_half():
    kinds = np.array([0, 0, 0, 1, 1, 3, 3])
    scores = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 2.5])
    found = presence_arms.against_clean(scores, kinds)
    assert found == pytest.approx({"all": 8 / 12, "scrambled": 1.0, "duplicated": 2 / 6})


def test_losses_are_compared_seed_by_seed_and_lower_ones_win():
    def record(arm, budget, seed, loss):
        told = {"steps": 5, "test": 0.5, "effective_sample_size": 1.0, "weights": None, "detection": [], "seconds": 1.0}
        return {"arm": arm, "budget": budget, "seed": seed, "heldout_loss": loss, **told}

    records = [record("uniform", "steps", 0, 3.0), record("uniform", "steps", 1, 2.0)]
    records += [record("a", "compute", 1, 1.9), record("a", "compute", 0, 2.8)]
    uniform, a = presence_report.summarise(records, {"uniform": "Uniform", "a": "A"}, "uniform")
    assert "heldout_loss_gain" not in uniform
    assert a["heldout_loss_gain"] == pytest.approx(-0.15) and a["heldout_loss_wins"] == "2/2"
    assert a["test_gain"] == 0 and a["test_wins"] == "0/2"


def test_the_presence_study_runs_goes_on_and_dearer_arms_take_fewer_steps(corpus, other, tasks, tmp_path, capsys):
    command = ["--text", str(corpus.parent / "text.jsonl"), "--other", str(other), "--task", str(tasks / "places")]
    command += ["--quick", "--steps", "4", "--vocabulary", "300", "--out", str(tmp_path / "out"), "--seeds", "1"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "costs.json").write_text(json.dumps(dict.fromkeys(presence_arms.ARMS, 2.0)))
    assert presence.main([*command, "--arms", "uniform"]) == 0
    before = records.read(tmp_path / "out")
    assert presence.main([*command, "--arms", "uniform,two_stages"]) == 0
    assert "| equal compute | PRESENCE, both stages | 2 |" in capsys.readouterr().out
    done = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert done[:1] == before and [(record["arm"], record["budget"]) for record in done[1:]] == [
        ("two_stages", "steps"),
        ("two_stages", "compute"),
    ]
    uniform, weighed, fewer = done
    assert [point["step"] for point in uniform["detection"]] == [1, 2, 3, 4] and not fewer["detection"]
    assert uniform["weights"] is None and uniform["effective_sample_size"] == 1 > weighed["effective_sample_size"]
    assert weighed["two_passes"] is None and set(weighed["weights"]) <= {"clean", *planting.TROUBLES}
    assert uniform["heldout_loss"] != weighed["heldout_loss"]
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert presence.main([*command, "--max-length", "32"]) == 2  # another study's folder
    assert presence.main([*command, "--arms", "nothing"]) == 2


def test_the_mcl_study_runs_goes_on_and_spends_the_same_at_equal_compute(corpus, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--text", str(corpus.parent / "text.jsonl"), "--tasks", str(tasks), "--vocabulary", "300"]
    command += ["--quick", "--steps", "20", "--row-length", "64", "--out", str(out), "--seeds", "1"]
    assert mcl.main([*command, "--arms", "electra"]) == 0
    before = records.read(out)
    assert mcl.main([*command, "--arms", "untrained,electra,courses,soup"]) == 0
    assert "| equal compute | + soup |" in capsys.readouterr().out
    done = json.loads((out / "results.json").read_text())["records"]
    electra, untrained, courses, cheaper, soup, thinner = done
    assert [electra] == before and (untrained["steps"], untrained["flops"]) == (0, 0)
    assert courses["steps"] == electra["steps"] == 20 and courses["flops"] > 2 * electra["flops"]
    assert cheaper["flops"] == pytest.approx(electra["flops"], rel=0.15)
    assert soup["steps"] == 10 and soup["tokens"] == pytest.approx(electra["tokens"], rel=0.15)
    assert thinner["flops"] == pytest.approx(electra["flops"], rel=0.25) and thinner["taken"] == [0, 1, 2]
    assert not list((out / "runs").iterdir())
    assert mcl.main([*command, "--hidden", "32"]) == 2  # another study's folder
    assert mcl.main([*command, "--arms", "nothing"]) == 2


def test_the_soup_of_one_model_is_that_model_trunk_or_no_trunk(corpus, tasks, tmp_path):
    mix = {"mlm": 1.0, "std": 2.0}
    keys = {"title": "", "objectives": {"mlm": {}, "std": {}}}
    alone = mcl_arms.Arm(**keys, sampler={"mode": "mix", "shares": mix})
    settings, task = mcl.QUICK, load_task(tasks / "places")
    at = mcl_arms.Place(corpus, {"places": task}, tmp_path)
    arms = {"alone": alone, "soup": mcl_arms.Arm(**keys, mixes=[mix], trunk=0.6)}
    arms["picked"] = mcl_arms.Arm(**keys, mixes=[mix, {"mlm": 0.0, "std": 1.0}], trunk=0.6, pick="greedy")
    models = {name: mcl_arms.pretrain(name, arm, "steps", 5, 3, at, settings) for name, arm in arms.items()}
    weights = {name: (folder / "model.safetensors").read_bytes() for name, folder in models.items()}
    assert weights["alone"] == weights["soup"]
    taken = json.loads((models["picked"] / "spent.json").read_text())["taken"]
    assert 1 <= len(taken) <= 2 and (weights["picked"] == weights["alone"]) == (taken == [0])
    assert mcl_arms.pretrain("soup", arms["soup"], "steps", 5, 3, at, settings) == models["soup"]  # as it is there


def test_steps_of_equal_compute_pay_for_dearer_steps_and_for_every_model_of_a_soup(tmp_path):
    arm = {"title": "", "objectives": {"mlm": {}}}
    file = tmp_path / "arms.yaml"
    soup = {**arm, "mixes": [{"mlm": 1.0}] * 3, "trunk": 0.5, "equal_compute_with": "a"}
    file.write_text(
        json.dumps({"a": arm, "b": {**arm, "equal_compute_with": "a"}, "soup": soup, "c": {**arm, "steps": 0}})
    )
    arms, settings = mcl_arms.read_arms(file), mcl_arms.Settings(steps=60)
    costs = {"a": 2.0, "b": 3.0, "soup": 1.5, "c": 1.0}
    found = {(n, b): mcl_arms.steps_of(n, b, arms, costs, settings) for n, a in arms.items() for b in a.budgets}
    expected = {("a", "steps"): 60, ("b", "steps"): 60, ("b", "compute"): 40, ("c", "steps"): 0}
    assert found == expected | {("soup", "steps"): 30, ("soup", "compute"): 40}
    file.write_text(json.dumps({"a": {**arm, "equal_compute_with": "b"}}))
    with pytest.raises(UserError, match=r"a\.equal_compute_with: unknown arm 'b'"):
        mcl_arms.read_arms(file)
    assert set(mcl_arms.read_arms(Path(mcl.__file__).with_name("mcl.yaml"))) >= {"mlm", "electra", "courses", "soup"}


def test_scores_over_all_tasks_are_means_of_whole_runs_and_compared_seed_by_seed():
    told = {"steps": 5, "flops": 1e12, "metric": "accuracy", "dev": 0.5, "pretraining_seconds": 1.0}
    scores = {("e", 0): (0.5, 0.7), ("e", 1): (0.6, 0.6), ("x", 0): (0.7, 0.7), ("x", 1): (0.5,)}
    records = [
        {"arm": arm, "budget": "steps", "seed": seed, "task": task, "test": score, **told}
        for (arm, seed), its in scores.items()
        for task, score in zip("ab", its, strict=False)
    ]
    rows = {(r["arm"], r["task"]): r for r in mcl_report.summarise(records, {"e": "E", "x": "X"}, "e")}
    assert rows["e", "all tasks"]["test"] == pytest.approx(60) and rows["e", "all tasks"]["test_sd"] == pytest.approx(0)
    assert rows["x", "all tasks"]["runs"] == 1 and rows["x", "all tasks"]["gain"] == pytest.approx(10)
    assert rows["x", "a"]["gain"] == pytest.approx(5) and rows["x", "a"]["wins"] == "1/2"
    assert "gain" not in rows["e", "a"]
