"""Salient spans of English by rules: dates, times, amounts, numbers, names, acronyms.

What names it finds is told by capitals alone: a capitalised word inside a sentence, with those that follow. At the
start of a sentence, where any word has a capital, a name must go on with another capital or occur inside a sentence
of the same text.
"""

import re

from pretrain.data.english import ABBREVIATIONS, FUNCTION_WORDS, LEXICON, NUMBER_WORDS, ORDINAL_WORDS

VERSION = 1
"""Changes with the rules: an annotation that was begun with others is not gone on with."""

MISSES = (
    "salient spans by rules: dates, times, amounts, numbers, capitalised names; missing: names in lower case, those "
    "that stand only at the start of a sentence, titles of works, and languages other than English"
)

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_SHORT_MONTHS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec"
_DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
_SHORT_DAYS = "Mon|Tues|Tue|Wed|Thurs|Thu|Fri|Sat|Sun"
_SEASONS = "spring|summer|autumn|fall|winter"
_SCALES = "hundred|thousand|million|billion|trillion"
_UNITS = (
    r"(?:kilo|centi|milli|micro|nano|mega|giga|tera)?"
    r"(?:met(?:re|er)|gram(?:me)?|lit(?:re|er)|watt|volt|byte|bit|hertz|joule|second|pascal|ton(?:ne)?|calorie)s?"
    r"|miles?|yards?|feet|foot|inch(?:es)?|acres?|hectares?|ounces?|gallons?|pints?|knots"
    r"|(?:(?:square|cubic)\s)(?:kilomet|met)(?:re|er)s?|square\s(?:miles?|feet|yards?|inch(?:es)?)"
    r"|degrees?(?:\s(?:Celsius|Fahrenheit))?|minutes?|hours?|days?|weeks?|months?|years?|decades?|century|centuries"
    r"|[kcmnµ]?m[²³]?|[kcm]m/[hs]|km²|mph|[kmµ]?g|[m]?l|[kMGT]?W|[kMGT]Wh|[kMG]?Hz|[kMGTP]i?B|[mnµ]?s|min|h|ft|lbs?|oz|[kM]?V"
    r"|°\s?[CF]|°"
)

# White space inside a span: one break of a line at most.
_S = r"(?:[^\S\n]{1,3}|[^\S\n]?\n[^\S\n]?)"
_END = r"(?!\w)"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)*)"
_WORD = rf"(?:{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})\b"
_WORDS = rf"(?!one\b(?![ -](?:{_SCALES})))(?:{_WORD}(?:(?:-|{_S}){_WORD}|(?<=dred|sand|lion){_S}and{_S}{_WORD})*)"
_NUMBER = rf"(?:{_DIGITS}(?:{_S}?[-–]{_S}?{_DIGITS})?(?:{_S}(?:{_SCALES})\b)?|{_WORDS})"
_DAY = rf"(?:(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?{_END})"
_YEAR = rf"(?:[12]\d{{3}}{_END})"
_MONTH = rf"(?:(?:{_MONTHS}){_END}|(?:{_SHORT_MONTHS}){_END}\.?)"
_WEEKDAY = rf"(?:(?:{_DAYS}){_END}|(?:{_SHORT_DAYS}){_END}\.?)"
_ORDINAL = (
    rf"(?:\d+(?:st|nd|rd|th){_END}|(?:(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)-)?"
    rf"(?:{'|'.join(sorted(ORDINAL_WORDS, key=len, reverse=True))})\b)"
)
_ZONE = r"(?:UTC|GMT|[CEMPW][DES]?T|BST|IST|JST)"
_CLOCK = rf"(?:{_S}?(?:[ap]\.m\.|[ap]m{_END}))"
_ERA = r"(?-i:B\.?C\.?(?:E\.?)?|A\.?D\.?|C\.?E\.?)(?!\w)"

# The first that matches is taken, so what is longer or more particular comes first.
_AMOUNT = re.compile(
    "|".join(
        (
            # dates
            r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?(?![\w-])",
            r"\d{4}/\d\d?/\d\d?(?![\w/])|\d\d?([./-])\d\d?\1\d{4}(?![\w/])|\d\d?/\d\d?/\d\d(?![\w/])",
            rf"(?:{_WEEKDAY},?{_S}(?:the{_S})?)?{_DAY}(?:{_S}?[-–]{_S}?{_DAY})?{_S}(?:of{_S})?{_MONTH}(?:,?{_S}{_YEAR})?",
            rf"(?:{_WEEKDAY},?{_S})?{_MONTH}{_S}(?:the{_S})?{_DAY}(?:{_S}?[-–]{_S}?{_DAY})?(?:,?{_S}{_YEAR})?",
            rf"{_MONTH},?{_S}{_YEAR}",
            rf"(?:(?:early|mid|late)(?:-|{_S})(?:the{_S})?)?(?:[12]\d\d0['’]?s|['’]\d0s){_END}",
            rf"(?:{_SEASONS}){_S}(?:of{_S})?{_YEAR}|Q[1-4]{_S}{_YEAR}",
            rf"[12]\d{{3}}{_S}?[-–]{_S}?(?:[12]\d{{3}}|\d\d){_END}",
            rf"{_ORDINAL}[- ](?:century|centuries)\b(?:{_S}{_ERA})?",
            rf"\d+{_S}{_ERA}|(?-i:AD){_S}\d+{_END}",
            rf"(?:{_DAYS}){_END}",
            # times
            rf"\d\d?:\d\d(?::\d\d(?:\.\d+)?)?{_CLOCK}?(?:{_S}(?-i:{_ZONE}){_END})?(?![\w:])",
            rf"\d\d?{_CLOCK}|{_NUMBER}{_S}o['’]clock\b|(?:noon|midnight){_END}",
            # money, percentages, quantities
            rf"(?:(?:US|A|C|NZ|HK)?[$£€¥₹]){_S}?{_DIGITS}(?:[-–]{_DIGITS})?(?:(?:-|{_S})?(?:{_SCALES}|mn|bn|[mkb]){_END})?",
            rf"{_NUMBER}{_S}(?:dollars?|cents?|euros?|pounds?(?:{_S}sterling)?|yen|rupees?|francs?|roubles?"
            rf"|USD|EUR|GBP|JPY|CHF){_END}",
            rf"{_NUMBER}{_S}?(?:[%‰]|per{_S}?cent\b|percentage{_S}points?\b)",
            rf"{_NUMBER}(?:-|{_S})?(?:{_UNITS}){_END}(?:[- ]old\b)?",
            # ordinals and plain numbers
            _ORDINAL,
            rf"\d+/\d+{_END}",
            rf"{_NUMBER}{_END}",
        )
    ),
    re.IGNORECASE,
)
_WORD_OR_SIGN = re.compile(r"\w+|[$£€¥₹]|['’](?=\d0s)")
_STARTS = {
    *f"{_MONTHS}|{_SHORT_MONTHS}|{_DAYS}|{_SHORT_DAYS}|{_SEASONS}|Q1|Q2|Q3|Q4".lower().split("|"),
    *("early", "mid", "late", "noon", "midnight", "ad"),
    *NUMBER_WORDS, *ORDINAL_WORDS,
    *("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
}  # fmt: skip
"""Words in lower case that an amount or a date may begin with."""

_UPPER = "".join(f"{chr(code)}" for code in range(ord("A"), 0x590) if chr(code).isupper())
_TITLES = "Mr|Mrs|Ms|Dr|St|Prof|Sr|Jr|Gen|Col|Lt|Sgt|Capt|Rev|Hon|Mt|Gov|Sen|Rep"
_SPACE = r"[ \t\xa0]{1,2}"
_PART = (
    rf"(?:(?:[{_UPPER}]\.){{2,}}|[{_UPPER}]\.(?={_SPACE}[{_UPPER}])|(?:{_TITLES})\.(?={_SPACE}[{_UPPER}])"
    rf"|[{_UPPER}]\w*(?:-\w+)*(?:['’][{_UPPER}]\w+)*(?:&[{_UPPER}]\w*)*)"
)
_JOINING = r"(?:of|the|de|van|von|der|den|du|la|le|del|della|di|da|dos|bin|ibn|al)"
_NAME = re.compile(rf"{_PART}(?:(?:{_SPACE}{_JOINING}){{0,2}}{_SPACE}{_PART}|{_SPACE}&{_SPACE}{_PART})*")
_CAPITALISED = re.compile(rf"[{_UPPER}]\w*")
_ACRONYMS = frozenset(("US", "IT", "WHO", "AM", "OR"))  # that are function words otherwise
_LONGEST_ACRONYM = 2  # words in capitals; more are a heading
_CURRENCIES = ("$", "£", "€", "¥", "₹")
_GOES_ON = re.compile(r"(?:[^\W\d_][\w.]*[-._/]|_)$")
_A_SECOND = re.compile(r"\b(?:a|per|each|every|one|split|last|this)\s$", re.IGNORECASE)
_QUOTES = "\"“”‘’'«»*_`"


def salient_spans(text: str) -> list[tuple[int, int]]:
    """Return the salient spans of a text, in order, as (start, end) in characters; none overlap or are empty."""
    found: list[tuple[int, int]] = []
    pending: list[tuple[int, int, str]] = []  # lone words at the start of a sentence
    inside: set[str] = set()  # words with a capital inside a sentence
    done, shouted = 0, -1  # end of the last span; of the last word, if it was in capitals
    for match in _WORD_OR_SIGN.finditer(text):
        start, word = match.start(), match[0]
        if start < done:
            continue
        plain = word.islower() and not word[0].isdigit()
        if plain and word not in _STARTS:
            continue
        amount = _amount(text, match)
        if amount:
            found.append((start, done := amount.end()))
            continue
        if plain or not word[0].isalpha():
            continue
        goes_on = shouted >= 0 and text[shouted:start].isspace()
        shouted = match.end() if word.isupper() else -1
        if not word[0].isupper():
            if word != word.lower():  # iPhone
                found.append((start, done := match.end()))
            continue
        name = _NAME.match(text, start)
        begins = _begins_sentence(text, start)
        if name is None or _is_ordinary(text, match, name[0], begins):
            continue
        done = start + _length(name[0])
        words = _CAPITALISED.findall(name[0])
        shouted = done if name[0].isupper() else -1
        if shouted >= 0 and (goes_on or len(words) > _LONGEST_ACRONYM):
            continue
        if begins and len(words) == 1 and not any(letter.isupper() or letter.isdigit() for letter in name[0][1:]):
            pending.append((start, done, word))
        else:
            inside.update(words[1:] if begins else words)
            found.append((start, done))
    found += [(start, end) for start, end, word in pending if word in inside]
    return sorted(found)


def _amount(text: str, first: re.Match) -> re.Match | None:
    """Return the date, time, amount or number that begins with the word ``first``, if one does."""
    start, end = first.span()
    word = first[0].lower()
    if word[0].isdigit():
        if _GOES_ON.search(text[max(start - 12, 0) : start]):  # "utf-8", "v1.2"
            return None
    elif word[0].isalpha() and word not in _STARTS and text[end : end + 1] not in _CURRENCIES:
        return None
    amount = _AMOUNT.match(text, start)
    if amount and amount[0].lower() == "second" and _A_SECOND.search(text[max(start - 7, 0) : start]):
        return None
    return amount


def _is_ordinary(text: str, first: re.Match, name: str, begins: bool) -> bool:
    """Whether a capitalised word begins no name: a function word, or a verb at the start of a sentence."""
    word, lower, following = first[0], first[0].lower(), text[first.end() : first.end() + 1]
    if following in ("&", ".") and word.isupper():  # "AT&T", "U.S."
        return False
    if lower in FUNCTION_WORDS:
        if word.isupper() and len(word) > 1:
            return word not in _ACRONYMS
        return begins or not (word == "May" or name.startswith("The "))  # "in May", "in The Hague"
    return begins and LEXICON.get(lower) == "VERB"


def _begins_sentence(text: str, start: int) -> bool:
    """Whether the word at ``start`` is a sentence's first, as far as its left tells."""
    if start and text[start - 1] in "([{":
        return True
    quoted = start
    while quoted and text[quoted - 1] in _QUOTES:
        quoted -= 1
    end = quoted
    while end and text[end - 1].isspace():
        end -= 1
    if end == 0 or text.count("\n", end, quoted) > 1:
        return True
    last = text[end - 1]
    if last in _QUOTES + ")]" and end < quoted:  # a closing one: what stands before it?
        last = text[end - 2 : end - 1]
    elif last == ".":
        word = end - 1
        while word and text[word - 1].isalpha():
            word -= 1
        return text[word : end - 1].lower() not in ABBREVIATIONS and end - 1 - word != 1
    if last == ",":
        return quoted < start  # He said, "Go."
    if last in "-*•#>|":  # an item of a list
        return text[: end - 1].rstrip(" \t")[-1:] in ("", "\n")
    return last in ".!?…:。！？"


def _length(name: str) -> int:
    """Return a name's length without the full stop that ends its sentence."""
    return len(name) - (name.endswith(".") and name[:-1].lower() in ABBREVIATIONS)
