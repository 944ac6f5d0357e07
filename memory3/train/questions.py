"""Questions that a text answers, made by rule from its sentences: what a reader trains on where nobody asked anything.

A rule is a function from a subject and a sentence to questions with answers that stand in the sentence word by word. It
need not catch much, and may be clumsy: there are 200,000 passages. Adding one: a function, and a row in `RULES`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

Asked = tuple[str, str]
"""A question and its answer, which the sentence contains."""

_NAME = r"(?:[A-Z][\w.'’-]*|\d+(?:st|nd|rd|th))(?: (?:of|the|de|and|von|van|la|du|&|[A-Z][\w.'’-]*))*"
_PROPER = rf"{_NAME}(?<! of)(?<! the)(?<! de)(?<! and)(?<! von)(?<! van)(?<! la)(?<! du)(?<! &)"
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"(?:{_MONTH} \d{{1,2}}, \d{{4}}|\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{4}}|\d{{4}})"
_BASE = {
    "founded": "found", "discovered": "discover", "invented": "invent", "wrote": "write", "directed": "direct",
    "produced": "produce", "composed": "compose", "designed": "design", "painted": "paint", "built": "build",
    "created": "create", "won": "win", "defeated": "defeat", "married": "marry", "established": "establish",
    "developed": "develop", "led": "lead", "published": "publish", "introduced": "introduce", "joined": "join",
    "released": "release", "opened": "open", "recorded": "record", "signed": "sign", "moved": "move",
    "became": "become", "received": "receive", "played": "play", "began": "begin", "started": "start", "left": "leave",
    "died": "die", "graduated": "graduate", "made": "make", "formed": "form", "completed": "complete", "sank": "sink",
    "took": "take", "closed": "close", "launched": "launch", "ended": "end", "launches": "launch", "coined": "coin",
    "proposed": "propose", "described": "describe", "visited": "visit", "bought": "buy", "sold": "sell", "gave": "give",
    "returned": "return", "retired": "retire", "debuted": "debut", "served": "serve", "conquered": "conquer",
    "explored": "explore", "starred": "star", "appeared": "appear", "entered": "enter", "crossed": "cross",
}  # fmt: skip
"""Past tense to base form, for `did`."""
_DOERS = "founded|discovered|invented|wrote|directed|produced|composed|designed|painted|built|created|won|defeated|married|established|developed|led|published|introduced|recorded|signed|coined|proposed|described|conquered|explored"
_PARTICIPLE = (
    r"(?:\w{3,}ed|born|built|written|made|sung|won|held|given|taken|led|shot|begun|sold|drawn|sunk|struck|laid|spoken|found)"
)
_ROLES = {
    "directed": "director", "produced": "producer", "composed": "composer", "written": "writer", "designed": "designer",
    "developed": "developer", "published": "publisher", "founded": "founder", "painted": "painter", "created": "creator",
    "invented": "inventor", "discovered": "discoverer",
}  # fmt: skip
_PAST = {
    "written": "wrote",
    "sung": "sang",
    "drawn": "drew",
    "taken": "took",
    "given": "gave",
    "begun": "began",
    "sunk": "sank",
}
_PLACE_KINDS = "city|town|village|commune|municipality|river|lake|mountain|district|county|census-designated place|suburb|island|stadium|museum|university|school|castle|bridge|park|airport|station|church|community|province|region"
_MEASURES = {"tall": "tall", "high": "high", "long": "long", "wide": "wide", "deep": "deep"}


def _passive(subject: str, sentence: str) -> Iterator[Asked]:
    """`… was completed by A in B in 1889`: who, where and when."""
    found = re.match(rf"(.{{2,70}}?) (was|were|is|are) (?:\w+ly |first |also |later )?({_PARTICIPLE})\b(.*)", sentence)
    if not found:
        return
    what, be, verb, rest = _named(found[1], subject), found[2], found[3], found[4]
    if what is None:
        return
    if agent := re.search(rf"\bby (?:the )?({_PROPER})", rest):
        past = _PAST.get(verb, verb)
        yield f"Who {be} {what} {verb} by?", agent[1]
        yield f"Who {past} {what}?", agent[1]
    if date := re.search(rf"\b(?:in|on|since|until) ({_DATE})", rest):
        yield f"When {be} {what} {verb}?", date[1]
        yield f"In what year {be} {what} {verb}?", date[1][-4:]
    if place := re.search(rf"\b(?:in|at|near) (?!{_MONTH})((?![\d])(?:the )?{_PROPER})", rest):
        yield f"Where {be} {what} {verb}?", place[1]


def _life(subject: str, sentence: str) -> Iterator[Asked]:
    """`Name (born 3 May 1901)` and `Name (1901 - 1977)`."""
    inside = re.search(r"\(([^()]*)\)", sentence)
    if not inside or inside.start() > 80:
        return
    dates = re.findall(_DATE, inside[1])
    if "born" in inside[1] and dates:
        yield f"When was {subject} born?", dates[0]
    elif len(dates) == 2 and re.search(r"[-–—]", inside[1]):
        yield f"When was {subject} born?", dates[0]
        yield f"When did {subject} die?", dates[1]
    if born := re.search(rf"\b(?:in|at) ((?!{_MONTH}){_PROPER})", inside[1]):
        yield f"Where was {subject} born?", born[1]


def _kind(subject: str, sentence: str) -> Iterator[Asked]:
    """`X is a French painter …`: what, nationality, occupation, and the place of a place."""
    found = re.match(
        r"(.{2,90}?) (is|was|are|were) (?:an?|the|one of the) ((?:[\w'-]+ ){0,5}?[\w'-]+)(?= (?:in|of|by|from|that|which|who|located|and|for|on|at|with|to|based|known)\b|[.,;(])",
        sentence,
    )
    if not found or _named(re.sub(r" ?\(.*", "", found[1]), subject) is None:
        return
    kind = found[3]
    yield f"What {found[2]} {subject}?", kind
    if nation := re.match(r"((?:[A-Z]\w+[ -]?)+) ([a-z][a-z -]+)$", kind):
        yield f"What is the nationality of {subject}?", nation[1]
        yield f"What is {subject}'s occupation?", nation[2]
        yield f"What did {subject} do?", nation[2]
    if place := re.search(rf"\b(?:{_PLACE_KINDS})\b[^.]{{0,40}}? (?:in|of) ((?:the )?{_PROPER})", sentence):
        yield f"Where is {subject} located?", place[1]
        yield f"Where is {subject}?", place[1]
        last = re.findall(rf"{_PROPER}", sentence[place.start(1) :].split(".")[0])
        if len(last) > 1:
            yield f"In what country is {subject}?", last[-1]


def _doer(subject: str, sentence: str) -> Iterator[Asked]:
    """`Alexander Fleming discovered penicillin`: who."""
    for found in re.finditer(
        rf"(?<!by )({_PROPER}) (?:first |also |later )?({_DOERS}) ((?:the |a |an )?[\w'’-]+(?: [\w'’-]+){{0,5}}?)(?= (?:in|on|at|by|with|for|after|from|during|and|while|when|as)\b|[.,;])",
        sentence,
    ):
        if found[1] not in ("It", "He", "She", "They", "The", "This", "In", "After", "Who"):
            yield f"Who {found[2]} {found[3]}?", found[1]


def _when(subject: str, sentence: str) -> Iterator[Asked]:
    """`She joined the club in 1901`: when, and what."""
    found = re.match(rf"(.{{2,60}}?) (?:first |also |later )?({'|'.join(_BASE)}) (.{{0,60}}?)\b ?(?:in|on) ({_DATE})", sentence)
    if found and (who := _named(found[1], subject)):
        rest = f" {found[3].strip()}" if found[3].strip() else ""
        yield f"When did {who} {_BASE[found[2]]}{rest}?", found[4]
        yield f"What year did {who} {_BASE[found[2]]}{rest}?", found[4][-4:]
    found = re.match(
        rf"(?:In|On) ({_DATE}),? (.{{2,60}}?) (?:first |also |later )?({'|'.join(_BASE)}) ((?:[\w'’-]+ ?){{0,7}})", sentence
    )
    if found and (who := _named(found[2], subject)):
        yield f"When did {who} {_BASE[found[3]]} {found[4].strip()}?", found[1]
    if where := re.match(
        rf"(.{{2,60}}?) (moved|returned|died|graduated|studied|lived|worked) (to|in|at|from) ((?!{_MONTH})(?:the )?(?!\d){_PROPER})",
        sentence,
    ):
        who = _named(where[1], subject)
        base = {"studied": "study", "lived": "live", "worked": "work"}.get(where[2]) or _BASE[where[2]]
        if who:
            yield f"Where did {who} {base}{' to' if where[3] == 'to' else ''}?", where[4]


def _role(subject: str, sentence: str) -> Iterator[Asked]:
    """`directed by A`: who was the director of X."""
    for found in re.finditer(rf"\b(?i:({'|'.join(_ROLES)}) (?:and \w+ )?by (?:the )?)({_PROPER})", sentence):
        verb = found[1].lower()
        if found.start() < 140:
            yield f"Who was the {_ROLES[verb]} of {subject}?", found[2]
            yield f"Who {_PAST.get(verb, verb)} {subject}?", found[2]


def _number(subject: str, sentence: str) -> Iterator[Asked]:
    """Population, counts and measures."""
    if found := re.search(r"\bpopulation (?:of|was|is)(?: about| around| approximately)? (\d[\d,]*\d)", sentence):
        yield f"What is the population of {subject}?", found[1]
        yield f"How many people live in {subject}?", found[1]
    if found := re.search(
        rf"\b(\d[\d,.]* (?:metres|meters|m|km|feet|ft|kilometres|kilometers|miles|mi)) ({'|'.join(_MEASURES)})\b", sentence
    ):
        yield f"How {found[2]} is {subject}?", found[1]
    for found in re.finditer(r"\b(\d[\d,]*|two|three|four|five|six|seven|eight|nine|ten|twelve) ([a-z]{4,}s)\b", sentence):
        words = re.findall(r"[\w'’-]+", sentence[: found.start()])[-4:]
        yield f"How many {' '.join([found[2], *words])}?", found[1]


def _relation(subject: str, sentence: str) -> Iterator[Asked]:
    """`named after A`, `capital of B`, `based in C`, `member of D`: a noun phrase behind a fixed phrase."""
    for phrase, question in _PHRASES.items():
        if found := re.search(rf"\b{phrase} ((?:the )?{_PROPER})", sentence):
            yield question.format(subject), found[1]


_PHRASES = {
    "named after": "What is {} named after?",
    "named for": "Who is {} named for?",
    "capital of": "{} is the capital of what?",
    "based in": "Where is {} based?",
    "headquartered in": "Where is the headquarters of {}?",
    "located in": "Where is {} located?",
    "member of": "What is {} a member of?",
    "part of": "What is {} part of?",
    "known as": "What is {} known as?",
    "played for": "What team did {} play for?",
    "plays for": "What team does {} play for?",
    "starring": "Who stars in {}?",
    "son of": "Who is the father of {}?",
    "daughter of": "Who is the father of {}?",
    "married to": "Who is {} married to?",
    "married": "Who did {} marry?",
    "born in": "Where was {} born?",
    "died in": "Where did {} die?",
    "educated at": "Where was {} educated?",
    "species of": "What is {} a species of?",
    "released by": "Who released {}?",
    "owned by": "Who owns {}?",
    "based on": "What is {} based on?",
    "university of": "What university is {}?",
}


def _gap(subject: str, sentence: str) -> Iterator[Asked]:
    """The end of a sentence, asked for with its beginning: `what` stands for the answer."""
    found = re.match(rf"(.{{12,110}}\b(?:in|of|by|at|from|with|for|to|called|named|as)) ((?:the )?{_PROPER})[.,;]", sentence)
    if found:
        words = found[1].split()
        yield f"{' '.join(words[-12:])} what?", found[2]
        if words[-1] in ("in", "of", "by", "at", "from", "with", "for", "to"):
            yield f"{words[-1].capitalize()} what {' '.join(words[-11:-1])}?", found[2]


def _named(found: str, subject: str) -> str | None:
    """Who or what the grammatical subject of a sentence is, `None` where that is not clear."""
    found = re.sub(r" ?\([^)]*\)", "", found).strip().rstrip(",")
    if found in (
        "It",
        "He",
        "She",
        "They",
        "The film",
        "The album",
        "The song",
        "The book",
        "The series",
        "The building",
        "The band",
        "The school",
        "The town",
        "The village",
        "The city",
        "The team",
        "The club",
        "The company",
        "The station",
        "The game",
    ):
        return subject
    if (
        re.search(r"\b(who|which|that|it|he|she|they|his|her|their|its|this|these|there)\b", found.lower())
        or "," in found
        or len(found.split()) > 8
    ):
        return None
    return found[0].lower() + found[1:] if found.startswith(("The ", "A ", "An ")) else found


Rule = Callable[[str, str], Iterator[Asked]]
RULES: tuple[Rule, ...] = (_passive, _life, _kind, _doer, _when, _role, _number, _relation, _gap)


def questions_of(title: str, sentence: str) -> list[Asked]:
    """Questions that a sentence of the page `title` answers, each with an answer of at most 60 characters that stands in it."""
    subject = re.sub(r" \(.*\)$", "", title.replace("_", " ")).strip()
    made = [asked for rule in RULES for asked in rule(subject, sentence)] if subject else []
    return [
        (question, answer.strip().rstrip(".,"))
        for question, answer in made
        if 1 < len(answer.strip()) < 60
        and len(question) < 160
        and answer.strip().rstrip(".,") in sentence
        and answer not in question
    ]


def as_typed(question: str, rng: random.Random) -> str:
    """A question as people type it: sometimes in lower case, sometimes without its mark, sometimes in other words.

    Other words are made by leaving some out: a question that people ask shares fewer words with the text than a rule's.
    """
    if rng.random() < 0.35:
        first, *words = question.rstrip("?").split()
        question = " ".join([first, *(w for w in words if rng.random() > 0.2)]) + "?"
    if rng.random() < 0.12:
        question = question.lower()
    return question.rstrip("?") if rng.random() < 0.08 else question
