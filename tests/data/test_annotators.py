"""The rules, by examples with the spans and classes written by hand; and spaCy, where it is installed."""

import sys

import pytest

from pretrain.data.annotations import PARTS_OF_SPEECH
from pretrain.data.annotators import Annotator, annotators
from pretrain.data.salient import salient_spans
from pretrain.data.word_classes import word_classes
from pretrain.errors import UserError


def spans(text):
    return [text[start:end] for start, end in salient_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it sailed on 12 March 2021 at last", ["12 March 2021"]),
        ("it sailed on March 12, 2021, at last", ["March 12, 2021"]),
        ("it sailed on 2021-03-12 at last", ["2021-03-12"]),
        ("logged at 2021-03-12T10:00:05Z by it", ["2021-03-12T10:00:05Z"]),
        ("it sailed on 12/03/2021 or 12.3.2021", ["12/03/2021", "12.3.2021"]),
        ("since March 1999 it sails", ["March 1999"]),
        ("in the late 1990s and the 1880s", ["late 1990s", "1880s"]),
        ("on Monday, 14 June, or Tuesday the 3rd of May", ["Monday, 14 June", "Tuesday the 3rd of May"]),
        ("only on Friday", ["Friday"]),
        ("the war of 1914–1918 and 1939-45", ["1914–1918", "1939-45"]),
        ("in the 19th century and the second century BC", ["19th century", "second century BC"]),
        ("in 44 BC and AD 79", ["44 BC", "AD 79"]),
        ("in the summer of 1969, in Q3 2020", ["summer of 1969", "Q3 2020"]),
        ("on 12 Sept. 1940 or 3 Oct", ["12 Sept. 1940", "3 Oct"]),
        ("on 12–14 March of that year", ["12–14 March"]),
        ("in lower case: 12 march 2021 and march 1999", ["12 march 2021", "march 1999"]),
        ("they march on and may fall", []),
    ],
)
def test_dates(text, expected):
    assert spans(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at 5:30 p.m. and 17:30:05 UTC", ["5:30 p.m.", "17:30:05 UTC"]),
        ("at 7am, at seven o'clock, at noon", ["7am", "seven o'clock", "noon"]),
        ("paid $3.5 million, £5bn, US$40 and 1,000 euros", ["$3.5 million", "£5bn", "US$40", "1,000 euros"]),
        ("five dollars and 20 cents", ["five dollars", "20 cents"]),
        ("12% or 3.5 per cent or twenty percent", ["12%", "3.5 per cent", "twenty percent"]),
        ("25 km, 3.5 GB, 30 °C, 100 mph", ["25 km", "3.5 GB", "30 °C", "100 mph"]),
        ("twenty-five kilograms, 10–20 metres", ["twenty-five kilograms", "10–20 metres"]),
        ("a 12-year-old dog, three weeks later", ["12-year-old", "three weeks"]),
        ("the 3rd, the twenty-first, the third", ["3rd", "twenty-first", "third"]),
        ("two hundred and fifty thousand of 1,234,567.89", ["two hundred and fifty thousand", "1,234,567.89"]),
        ("two and three", ["two", "three"]),
        ("one of them waited a second and came second", ["second"]),
        ("1/2 of 42 in 1984.", ["1/2", "42", "1984"]),
        ("utf-8, x86, v1.2 and a_3 are no numbers", []),
        ("", []),
    ],
)
def test_times_amounts_and_numbers(text, expected):
    assert spans(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the ship left New York for London", ["New York", "London"]),
        ("he met Ludwig van Beethoven and Charles de Gaulle", ["Ludwig van Beethoven", "Charles de Gaulle"]),
        ("at the University of Oxford, in The Hague", ["University of Oxford", "The Hague"]),
        ("said J. R. Smith to Mr. Brown", ["J. R. Smith", "Mr. Brown"]),
        ("O'Brien's dog and Jean-Luc Godard's film", ["O'Brien", "Jean-Luc Godard"]),
        ("NATO, the U.S. Army, AT&T and Johnson & Johnson", ["NATO", "U.S. Army", "AT&T", "Johnson & Johnson"]),
        ("an iPhone, PyTorch and COVID-19", ["iPhone", "PyTorch", "COVID-19"]),
        ("The captain slept. Nobody woke him.", []),
        ("London fell. Later London rose.", ["London", "London"]),
        ("London fell. Nobody knew.", []),
        ("London Bridge fell. The United Nations met.", ["London Bridge", "United Nations"]),
        ("NATO met. Use Python. In Paris it rained.", ["NATO", "Python", "Paris"]),
        ('He said, "Go home." She left.', []),
        ('the "Titanic" sank', ["Titanic"]),
        ("the end (See also there)", []),
        ("First it rained.\n\nSnow fell then.\n- Ice came", ["First"]),
        ("I think I may go in May", ["May"]),
        ("THIS IS A SHOUTED LINE", []),
        ("漢字 and the word", []),
        ("it was Émile Zola in Łódź", ["Émile Zola", "Łódź"]),
        ("e.g. Python or Dr. Jones vs. Smith", ["Python", "Dr. Jones", "Smith"]),
    ],
)
def test_names(text, expected):
    assert spans(text) == expected


def tagged(text):
    return " ".join(f"{text[start:end]}/{PARTS_OF_SPEECH[tag]}" for start, end, tag in word_classes(text))


@pytest.mark.parametrize(
    "expected",
    [
        "The/DET old/ADJ captain/NOUN slowly/ADV sailed/VERB to/ADP London/PROPN ./PUNCT",
        "She/PRON did/AUX n't/PART want/VERB to/PART go/VERB ,/PUNCT but/CCONJ I/PRON 'm/AUX here/ADV ./PUNCT",
        "It/PRON has/AUX been/AUX given/VERB two/NUM names/NOUN in/ADP 1984/NUM ./PUNCT",
        "They/PRON have/VERB a/DET beautiful/ADJ reservation/NOUN ./PUNCT",
        "If/SCONJ you/PRON know/VERB that/SCONJ he/PRON can/AUX help/VERB ,/PUNCT call/VERB us/PRON",
        "John/PROPN 's/PART wife/NOUN",
        "the/DET 3rd/ADJ ship/NOUN costs/NOUN 5/NUM %/SYM",
        "\N{REPLACEMENT CHARACTER}/X",
    ],
)
def test_parts_of_speech(expected):
    words = [word.rpartition("/") for word in expected.split()]
    text = " ".join(word for word, _, _ in words)
    text = text.replace(" n't", "n't").replace(" '", "'").replace(" ,", ",").replace(" .", ".")
    assert tagged(text) == expected


def test_marks_are_in_order_whatever_the_text_and_long_words_take_no_longer():
    units = ("a1b2", "a.b.", "1.", "1-", "A", "Aa Bb ", "A.", "'", "\n", "one ", "x@", "don't", "a'b", "$", "1 March ")
    texts = [unit * (20_000 // len(unit)) for unit in units]
    for text in texts:
        for name in ("salient", "pos"):
            (marks,) = Annotator(name).start()([text])
            borders = [place for start, end, _ in marks for place in (start, end)]
            assert borders == sorted(borders) and all(start < end for start, end, _ in marks)
            assert not marks or (marks[0][0] >= 0 and marks[-1][1] <= len(text))


def test_an_unknown_annotation_names_the_nearest():
    with pytest.raises(UserError, match=r"NAME: unknown annotation 'salent'; did you mean 'salient'\?"):
        annotators(["salent"], None, "NAME")


def test_without_spacy_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"^--spacy: spaCy is not installed: pip install 'spacy>=3.8'$"):
        annotators(["salient"], "en_core_web_sm", "NAME")


def test_spacy_marks_entities_and_classes(tmp_path):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "GPE", "pattern": "new york"}])
    pipeline.to_disk(tmp_path / "model")
    with pytest.raises(UserError, match=r"has no tagger, which 'pos' needs"):
        annotators(["pos"], str(tmp_path / "model"), "NAME")
    ruler = pipeline.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": "ship"}]], {"POS": "NOUN"})
    ruler.add([[{"IS_SPACE": True}]], {"POS": "SPACE"})
    pipeline.to_disk(tmp_path / "model")
    both = annotators(["salient", "pos"], str(tmp_path / "model"), "NAME")
    text = "a  ship to new york"
    found = [list(one.start()([text, "", text])) for one in both]
    assert found[0] == [[(11, 19, 0)], [], [(11, 19, 0)]]
    assert found[1][0] == [(3, 7, PARTS_OF_SPEECH.index("NOUN"))] and found[1][1] == []
    assert both[0].made_by("raw")["spacy"] == spacy.__version__ and not both[0].misses
    with pytest.raises(UserError, match=r"cannot be loaded .*python -m spacy download en_no_such"):
        annotators(["salient"], "en_no_such", "NAME")
