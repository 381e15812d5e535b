"""Word lists of English: the closed classes, and the most frequent words whose ending does not tell their class."""


def words_of(text: str) -> frozenset[str]:
    """Return the words of a list."""
    return frozenset(text.split())


_CLOSED = {
    "DET": (
        "the a an this these those every each no another either neither some any all both half such what which "
        "whatever whichever"
    ),
    "PRON": (
        "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its "
        "itself we us our ours ourselves they them their theirs themselves who whom whose whoever someone "
        "somebody something anyone anybody anything everyone everybody everything nobody nothing none there "
        "one ones that themself oneself y'all ya u"
    ),
    "ADP": (
        "of in for on with at by from about into like through after over between out against during without "
        "under around among amongst throughout despite towards toward upon onto off above below behind beyond "
        "across along near inside outside via per within beside besides underneath beneath amid except versus "
        "vs concerning regarding until till since up down round aboard atop including past unlike minus plus "
        "as than"
    ),
    "AUX": (
        "is are was were be been being am 's 're 'm can could will would shall should may might must ca wo 'll "
        "'d do does did has have had 've ai ought cannot"
    ),
    "CCONJ": "and or but nor & and/or",
    "SCONJ": "if because while whereas although though unless whether lest whenever wherever",
    "PART": "not n't to 's",
    "INTJ": "oh yes hi hello hey please wow yeah ok okay ah lol haha ouch alas hmm ha no",
    "ADV": (
        "very also just only then when where now here there never always often sometimes soon again still even "
        "too so already ever however therefore thus hence perhaps maybe rather quite almost instead else once "
        "twice away back how why well more most less least together later yet forward far further furthermore "
        "moreover nevertheless otherwise meanwhile anyway somewhat somewhere anywhere everywhere nowhere "
        "indeed apart ahead aside abroad afterwards beforehand forever likewise nonetheless seldom thereby "
        "therein somehow anymore before ago enough much etc straight alone upstairs downstairs whereby wherein"
    ),
}
# Words that mostly have one class, and that an ending would mistake or not tell.
_OPEN = {
    "ADJ": (
        "good new great first last long own other old right big high different small large next early young "
        "important few public bad same able many several little best better sure free hard easy real full "
        "clear low late white black red blue green yellow brown true open whole strong short certain nice "
        "happy wrong poor likely various similar dead hot cold sorry ready nuclear single human main recent "
        "common simple empty equal wide deep rich fresh fine serious major minor safe fast slow quick dear "
        "cheap huge tiny dry wet dark bright foreign federal current past fair key due separate entire sweet "
        "clean dirty sick weird worse worst latest greater greatest larger largest smaller smallest higher "
        "highest lower lowest older oldest younger longer longest bigger biggest second third fourth fifth "
        "sixth top junior senior extra aware solid modern ancient warm cool soft loud flat thin thick tall "
        "former latter overall negative positive rare raw complete exact valid invalid unique random default "
        "ill fellow friendly lovely ugly silly holy elderly daily weekly monthly yearly unlikely costly "
        "timely orderly deadly lonely hardcore upper outer inner middle private close amazing interesting "
        "afraid alive asleep dumb mad proud brief broad pure secret smart wild wise odd quiet rough sharp "
        "tight super pretty"
    ),
    "VERB": (
        "get got go goes went gone going make made makes take took taken takes see saw seen sees know knew "
        "known knows think thought thinks want wants need needs use uses used say said says find found finds "
        "give gave given gives tell told tells ask asks asked let lets come came comes keep kept keeps put "
        "puts become became becomes leave left leaves feel felt feels seem seems seemed try tries tried bring "
        "brought begin began begun mean means meant send sent buy bought pay paid meet met run ran lose lost "
        "hold held write wrote written read hear heard sit sat stand stood win won hope believe happen happens "
        "love loves help helps live lives add adds allow allows call calls called set sets return returns "
        "returned show shows shown showed provide provides include includes contain contains represent "
        "represents work works look looks looking like likes follow follows appear create creates require "
        "requires consider eat ate eaten drink drank sleep slept speak spoke spoken break broke broken choose "
        "chose chosen grow grew grown draw drew drawn drive drove driven fall fell fallen fly flew forget "
        "forgot forgotten rise rose throw threw thrown wear wore sell sold build built spend spent teach "
        "taught catch caught fight fought lead led understand understood remember learn explain agree decide "
        "describe die died kill kills killed lay lie lies apply enjoy suggest receive expect ensure avoid "
        "attend invest compute computes specify determine determines indicate indicates raise raises raised "
        "support supports convert converts compare generate define defines defined wait hate wonder recommend "
        "thank appreciate suppose join continue continued obtain ignore perform performs produce develop "
        "accept refuse reach pass serve cook cut hit hurt seek sought shut bet cost spread quit stop start "
        "starts started beginning bear bore born bind bound bend bent blow blew bleed feed fed flee fled hang "
        "hung hide hid kneel lend lent light ride rode ridden ring rang shake shook shine shoot shot sing sang "
        "sink steal stole stick stuck strike struck swear swim swam swing wake woke weep wind wound done doing "
        "did having move moved carry exist exists occur occurs encourage replace remove select save check "
        "please contact click visit assume prefer prove proven deal discuss imagine realize admit handle "
        "evaluate iterate"
    ),
    "NOUN": (
        "today tomorrow yesterday tonight thanks fun agent time year people way day man men thing things woman "
        "women life child children world school state family student group country problem hand part place "
        "case week company system program question government number night point home water room mother area "
        "money story fact month lot right study book eye job word business issue side kind head house service "
        "friend father power hour game line end member law car city community name president team minute idea "
        "kid body information parent face others level office door health person art war history party result "
        "change morning reason research girl guy moment air teacher force education data value values function "
        "array list type object string file index matrix set class method model error input output example "
        "parameter parameters arguments shape key keys length size sequence order code text table column row "
        "vector test mail email food staff hotel price weather husband wife son daughter king queen troops "
        "police oil gas dog cat phone computer deal market plan bill letter agreement customer contract cost "
        "space site page north south east west weekend bit couple rest use attack support report call look "
        "work need help meeting access rate percent pm am ps interest wedding building feeling ceiling evening "
        "spring ring wing lightning clothing shopping training beginning understanding setting being "
        "restaurant step evidence tree bus glass loss boss process address dress success stress kiss mess "
        "grass pass analysis basis crisis series species news politics physics mathematics economics virus "
        "campus status bonus census corpus focus bed feed seed speed hundred breed shed weed embed red sled "
        "ally belly bully supply reply assembly anomaly monopoly italy july jelly"
    ),
    "NUM": (
        "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
        "million billion trillion"
    ),
    "ADV": "really probably actually especially exactly nearly usually particularly",
}


def _lexicon() -> dict[str, str]:
    """Return word → its most frequent class; the closed classes go before the open ones."""
    order = ("PRON", "DET", "AUX", "ADP", "SCONJ", "CCONJ", "PART", "ADV", "INTJ")
    pairs = [(word, name) for name in ("NOUN", "VERB", "ADJ", "ADV", "NUM") for word in _OPEN[name].split()]
    pairs += [(word, name) for name in reversed(order) for word in _CLOSED[name].split()]
    return dict(pairs)


LEXICON: dict[str, str] = _lexicon()
"""Word in lower case → its most frequent class of Universal Dependencies."""

NUMBER_WORDS: frozenset[str] = words_of(_OPEN["NUM"]) | {"one", "dozen"}
ORDINAL_WORDS: frozenset[str] = words_of(
    "eighteenth eighth eightieth eleventh fifteenth fifth fiftieth first fortieth fourteenth fourth hundredth "
    "millionth nineteenth ninetieth ninth second seventeenth seventh seventieth sixteenth sixth sixtieth tenth "
    "third thirteenth thirtieth thousandth twelfth twentieth"
)
FUNCTION_WORDS: frozenset[str] = words_of(
    "don doesn didn isn aren wasn weren won wouldn couldn shouldn hasn haven hadn ain let many several few "
    "other others more most such first second third next last finally additionally similarly consequently "
    "currently recently usually generally specifically unfortunately eventually although note see return "
    "returns"
) | frozenset(word for words in _CLOSED.values() for word in words.split())
"""Words that begin no name, though they have a capital at the start of a sentence."""
ABBREVIATIONS: frozenset[str] = words_of(
    "al approx apr aug ca capt cf ch co col corp dec dr e.g eg eq feb fig fri gen gov hon i.e ie inc jan jr "
    "jul jun lt ltd mar mon mr mrs ms mt no nov oct p pp prof rep rev sat sec sen sep sept sgt sr st sun thu "
    "thurs tue tues vol vs wed"
)
"""Words that a full stop follows inside a sentence."""
