"""What makes annotations of text: rules, or a pipeline of spaCy's."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pretrain.data import salient, word_classes
from pretrain.data.alignment import Mark
from pretrain.data.annotations import PARTS_OF_SPEECH
from pretrain.errors import UserError, unknown

ANNOTATIONS = {"salient": "spans", "pos": "classes"}
"""Name of an annotation that can be made of text → its kind."""
_RULES = {"salient": salient, "pos": word_classes}


@dataclass(frozen=True)
class Annotator:
    """Makes one annotation of texts. Plain data, so that it can be sent to a process.

    Attributes:
        name: one of ``ANNOTATIONS``.
        spacy: name or path of a spaCy model; None takes the rules.
    """

    name: str
    spacy: str | None = None

    @property
    def kind(self) -> str:
        """The annotation's kind."""
        return ANNOTATIONS[self.name]

    def made_by(self, text: str) -> dict:
        """Return what ``meta.json`` says of the maker; ``text`` is what it read, ``raw`` or ``decoded``.

        Raises:
            UserError: if spaCy or the model is missing.
        """
        if self.spacy is None:
            return {"annotation": self.name, "rules": _RULES[self.name].VERSION, "text": text}
        import spacy

        meta = load_spacy(self.spacy).meta
        model = f"{meta['lang']}_{meta['name']} {meta['version']}"
        return {"annotation": self.name, "spacy": spacy.__version__, "model": model, "text": text}

    @property
    def misses(self) -> str:
        """One line on what the rules do not see; empty for spaCy."""
        return "" if self.spacy else f"{_RULES[self.name].MISSES}; --spacy MODEL is better and slower"

    def start(self) -> Callable[[list[str]], Iterable[list[Mark]]]:
        """Return the function texts → marks of each text, in order, none overlapping or empty."""
        if self.spacy is not None:
            return _spacy_marks(self.spacy, self.kind)
        if self.kind == "classes":
            return lambda texts: map(word_classes.word_classes, texts)
        return lambda texts: ([(start, end, 0) for start, end in salient.salient_spans(text)] for text in texts)


def annotators(names: Iterable[str], spacy: str | None, where: str) -> tuple[Annotator, ...]:
    """Return the annotators of ``names``, each once.

    Raises:
        UserError: for an unknown name, or if spaCy or its model is missing.
    """
    for name in names:
        if name not in ANNOTATIONS:
            raise unknown("annotation", name, ANNOTATIONS, where)
    made = tuple(Annotator(name, spacy) for name in dict.fromkeys(names))
    if spacy is not None and made:
        pipeline = load_spacy(spacy)
        for one in made:
            needed = "ner" if one.kind == "spans" else "tagger"
            sets = {"ner": ("ner", "entity_ruler"), "tagger": ("tagger", "morphologizer", "attribute_ruler")}[needed]
            if not any(pipe in pipeline.pipe_names for pipe in sets):
                raise UserError(f"--spacy {spacy}: has no {needed}, which '{one.name}' needs; name another model")
    return made


def load_spacy(model: str):
    """Load a spaCy pipeline.

    Raises:
        UserError: if spaCy or the model is not installed, with the command that installs it.
    """
    try:
        import spacy
    except ImportError:
        raise UserError("--spacy: spaCy is not installed: pip install 'spacy>=3.8'") from None
    try:
        return spacy.load(model)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--spacy {model}: cannot be loaded ({reason}); install it with: python -m spacy download {model}"
        ) from None


def _spacy_marks(model: str, kind: str) -> Callable[[list[str]], Iterable[list[Mark]]]:
    pipeline = load_spacy(model)
    index = {name: number for number, name in enumerate(PARTS_OF_SPEECH)}

    def marks(texts: list[str]) -> list[list[Mark]]:
        with pipeline.memory_zone():  # forgets the strings of these texts afterwards
            documents = pipeline.pipe(texts)
            if kind == "spans":
                return [[(span.start_char, span.end_char, 0) for span in document.ents] for document in documents]
            return [
                [(word.idx, word.idx + len(word), index[word.pos_]) for word in document if word.pos_ in index]
                for document in documents
            ]

    return marks
