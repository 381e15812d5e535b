"""Parts of speech of English by rules: word lists, endings, and a look at the neighbours."""

import re
from functools import lru_cache

from pretrain.data.annotations import PARTS_OF_SPEECH
from pretrain.data.english import LEXICON, words_of

VERSION = 1
"""Changes with the rules: an annotation that was begun with others is not gone on with."""

MISSES = (
    "parts of speech by rules: word lists, endings and neighbours, right for seven words in eight of English text "
    "and for no other language"
)

_WORD = re.compile(
    r"[A-Za-z]+(?![\w'’.@:+-])|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|[^\W\d_]{1,9}?(?=n['’]t\b)|(?:[A-Za-z]\.){2,}"
    r"|https?://\S+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.]+|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?!\w)|\w+|\.{2,}|-{2,}|[^\w\s]",
    re.IGNORECASE,
)
_SYMBOLS = frozenset("$%+=~^|€£¥₹°©®§#*\\×−@")
_SUFFIXES = (
    ("ADV", "ly"),
    ("VERB", "ing ed ize ise ify ized ised"),
    ("NOUN", "tion sion ment ness ity ance ence ship ism ist ology ing-s hood dom graphy ture ician age"),
    ("ADJ", "ous ful less able ible ive ical ish ary ic al ian ern ular ese ent ant"),
)
_LISTED = {**LEXICON, **dict.fromkeys(".,;:!?()[]{}\"'“”‘’-–—…/<>`_", "PUNCT"), **dict.fromkeys(_SYMBOLS, "SYM")}
_ENDINGS = {ending: tag for tag, endings in _SUFFIXES for ending in endings.split()}
_BE = words_of("is are was were be been being am 's 're 'm")
_HAVE = words_of("have has had having 've")
_DO = words_of("do does did")
_MODALS = words_of("can could will would shall should may might must ca wo 'll 'd cannot do does did n't to")
_SUBJECTS = words_of("i you we they who he she it")
_NOMINAL = frozenset(("NOUN", "ADJ", "NUM", "PROPN"))
_POSSESSIVES = words_of("my your his her its our their whose")
_EITHER = words_of("after before since until till as than for")
"""Prepositions that may begin a clause."""
_DEMONSTRATIVES = words_of("this that these those what which all some any each both another either such")
_NATIONS = ("ian", "ish", "ese", "ean", "ican", "eli", "aqi", "ench", "utch", "erman", "reek")
_INDEX = {name: number for number, name in enumerate(PARTS_OF_SPEECH)}


def word_classes(text: str) -> list[tuple[int, int, int]]:
    """Return the words of a text, in order, as (start, end, index into ``PARTS_OF_SPEECH``)."""
    found = [(match.start(), match.end(), match[0]) for match in _WORD.finditer(text)]
    words = [word.lower().replace("’", "'") for _, _, word in found]
    tags = _by_themselves([word for _, _, word in found], words)
    _by_neighbours(words, tags)
    return [(start, end, _INDEX[tag]) for (start, end, _), tag in zip(found, tags, strict=True)]


def _by_themselves(forms: list[str], words: list[str]) -> list[str]:
    """Return each word's class by lists, endings and capitals; "S" where an -s may be a noun's or a verb's."""
    tags, begins = [], True
    for number, (form, word) in enumerate(zip(forms, words, strict=True)):
        tag = _LISTED.get(word)
        if tag is None or (form != word and not begins and tag in ("NOUN", "VERB", "ADJ") and form[0].isupper()):
            tag = _unlisted(form, word, begins, forms[number + 1] if number + 1 < len(forms) else "")
        elif form[0].isupper() and begins and tag in ("NOUN", "ADJ") and _is_name(forms, number + 1):
            tag = "PROPN"
        tags.append(tag)
        begins = tag in ("PUNCT", "SYM") and form[-1] in '.!?:"“(*'
    return tags


def _is_name(forms: list[str], number: int) -> bool:
    """Whether a word is capitalised as a name is."""
    return number < len(forms) and forms[number][0].isupper() and forms[number].lower() not in LEXICON


def _unlisted(form: str, word: str, begins: bool, following: str) -> str:
    first = form[0]
    if not first.isalnum() and first not in "'’_":
        return "X" if first in "\N{REPLACEMENT CHARACTER}" else "PUNCT"
    if "://" in form or "@" in form or first == "_":
        return "X"
    if first.isdigit():
        if word[-1].isdigit():
            return "NUM"
        return "NOUN" if word.endswith("0s") else "ADJ" if word[-2:] in ("st", "nd", "rd", "th") else "NUM"
    if not form.isalpha():
        return "PROPN" if first.isupper() else "NOUN" if form[-1].isalnum() else "PUNCT"
    if first.isupper() and (
        not begins or form.isupper() or (following[:1].isupper() and following.lower() not in LEXICON)
    ):
        return "PROPN"
    tag = _by_ending(word)
    return "PROPN" if tag == "NOUN" and first.isupper() and not _has_noun_ending(word) else tag


@lru_cache(1 << 16)
def _by_ending(word: str) -> str:
    stem = _listed_stem(word)
    if stem is not None:
        return stem
    if len(word) > 4:
        for length in (5, 4, 3, 2):
            tag = _ENDINGS.get(word[-length:])
            if tag is not None:
                return tag
    if word[-1] == "s" and word[-2:] not in ("ss", "us", "is"):
        return "S"
    return "NOUN"


def _has_noun_ending(word: str) -> bool:
    return len(word) > 4 and any(_ENDINGS.get(word[-length:]) == "NOUN" for length in (3, 4, 5))


def _listed_stem(word: str) -> str | None:
    """Return the class that a listed word's -s, -ed, -ing, -er, -est or -ly has; None if there is no such word."""
    for ending, drops in (
        ("s", ("s", "es")),
        ("ed", ("ed", "d")),
        ("ing", ("ing",)),
        ("er", ("er", "r")),
        ("est", ("est", "st")),
    ):
        if not word.endswith(ending):
            continue
        for drop in drops:
            stem = word[: -len(drop)]
            tag = LEXICON.get(stem) or (LEXICON.get(stem + "e") if ending == "ing" else None)
            if tag is None and len(stem) > 3 and stem[-1] == stem[-2]:
                tag = LEXICON.get(stem[:-1])
            if tag is None and stem.endswith("i"):
                tag = LEXICON.get(stem[:-1] + "y")
            if ending == "s" and tag in ("NOUN", "VERB"):
                return "S" if tag == "VERB" else "NOUN"
            if ending in ("ed", "ing") and tag in ("NOUN", "VERB"):
                return "VERB"
            if ending in ("er", "est") and tag == "ADJ":
                return "ADJ"
            if ending == "er" and tag == "VERB":
                return "NOUN"
    return None


def _by_neighbours(words: list[str], tags: list[str]) -> None:
    """Settle what depends on the words around, from left to right, in place."""
    count = len(words)
    for i, word in enumerate(words):
        tag = tags[i]
        before, after = tags[i - 1] if i else "PUNCT", tags[i + 1] if i + 1 < count else "PUNCT"
        last, ahead = words[i - 1] if i else "", words[i + 1] if i + 1 < count else ""
        if tag == "S":
            verbal = before == "PRON" and last not in _POSSESSIVES
            verbal |= (
                before in ("NOUN", "PROPN")
                and last[-1:] != "s"
                and (after in ("DET", "PRON", "PART") or ahead in _POSSESSIVES)
            )
            tags[i] = "VERB" if verbal else "NOUN"
        elif tag == "VERB":
            if word.endswith("ing"):
                if before in ("DET", "ADJ") or last in _POSSESSIVES:
                    tags[i] = "NOUN" if after not in ("NOUN", "S") else "VERB"
            elif word.endswith("ed"):
                if before in ("DET", "ADV") and after in ("NOUN", "S") and last not in _MODALS:
                    tags[i] = "ADJ"
            else:
                named = (before in ("DET", "ADJ", "NUM") or last in _POSSESSIVES) and last not in _SUBJECTS
                named |= before == "ADP" and last not in ("to", "up", "out") and after not in ("DET", "PRON")
                tags[i] = "NOUN" if named else "VERB"
            if last == "to" and before == "ADP" and tags[i] == "VERB" and not word.endswith("ing"):
                tags[i - 1] = "PART"
        elif tag == "PROPN":
            if after in ("NOUN", "S") and word.endswith(_NATIONS):
                tags[i] = "ADJ"
        elif tag == "NOUN":
            acts = last in _MODALS and before in ("AUX", "PART") and after not in ("NOUN", "PUNCT")
            acts |= before == "PRON" and last in _SUBJECTS and after in ("DET", "PRON", "ADP", "ADV", "PART")
            if acts and (word[-1] != "s" or word.endswith("ss")):
                tags[i] = "VERB"
        elif word == "to":
            verb = (after == "VERB" and not ahead.endswith("ing")) or ahead in ("be", "have", "do", "not")
            verb |= after == "ADV" and i + 2 < count and tags[i + 2] == "VERB"
            verb |= after == "NOUN" and i + 2 < count and (tags[i + 2] == "DET" or words[i + 2] in _POSSESSIVES)
            verb |= after == "NOUN" and ahead not in LEXICON and not _has_noun_ending(ahead) and i + 2 < count
            tags[i] = "PART" if verb else "ADP"
        elif word == "that":
            if before == "VERB" or last in ("so", "sure", "fact", ","):
                tags[i] = "SCONJ"
            elif before in ("NOUN", "PROPN", "ADJ"):
                tags[i] = "PRON" if after in ("AUX", "VERB", "S", "PRON", "ADV") else "SCONJ"
            else:
                tags[i] = "DET" if after in ("NOUN", "ADJ", "S") else "PRON"
        elif word in _DEMONSTRATIVES:
            nominal = (
                after in _NOMINAL
                or after == "S"
                or (after in ("VERB", "DET", "ADV") and word in ("all", "some", "any"))
            )
            tags[i] = "DET" if nominal or word in ("all", "such", "each", "another", "either", "both") else "PRON"
        elif word in _EITHER:
            clause = ahead in _SUBJECTS or (after == "DET" and word == "as" and before not in ("NOUN", "VERB"))
            if clause and word != "than":
                tags[i] = "SCONJ"
            elif word == "as" and after in ("ADJ", "ADV"):
                tags[i] = "ADV"
        elif word in _HAVE or word in _DO:
            tags[i] = "AUX" if _helps(words, tags, i) else "VERB"
        elif word == "'s":
            verbal = (before in ("PRON", "ADV") and last not in ("one", "else")) or after in ("DET", "ADV", "PART")
            tags[i] = "PRON" if last == "let" else "AUX" if verbal else "PART"
        elif word == "there":
            tags[i] = "PRON" if ahead in _BE or ahead in ("has", "have", "will", "may", "might", "can") else "ADV"
        elif word == "like":
            if last in _SUBJECTS or (before in ("AUX", "PART") and last not in _BE):
                tags[i] = "VERB"
        elif word == "no":
            tags[i] = "DET" if after not in ("PUNCT",) else "INTJ"
        elif word == "one":
            tags[i] = "NUM" if after in ("NOUN", "ADJ", "S") or ahead in ("of", "or") else "PRON"


def _helps(words: list[str], tags: list[str], i: int) -> bool:
    """Whether a form of "have" or "do" goes with a verb after it: no more than three words on, none of them a noun."""
    participle = words[i] in _HAVE
    for j in range(i + 1, min(i + 5, len(words))):
        if words[j] == "to" or tags[j] in ("DET", "ADP", "PUNCT", "NUM"):
            return False
        if words[j] in ("been", "had") and participle:
            return True
        if tags[j] in ("VERB", "AUX") or (words[j] in ("have", "be", "like") and not participle):
            return not (words[j].endswith("ing") and tags[j] == "VERB")
        if tags[j] == "NOUN" and words[j - 1] not in _SUBJECTS and words[j - 1] not in ("not", "n't"):
            return False
    return False
