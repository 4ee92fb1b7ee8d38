"""Training documents of the harder reference: many facts, chains, counts, and linked documents.

Each family is the relative of a group of the RULER-style tasks (:mod:`dynmask.evals.ruler`) and
shares with it what is asked, not how or about what: wordings are composed at random
(``harder_wording.py``), words are never held-out ones, text is never that of the haystack. What is
alike is the form: a context, a question after it, the start of an answer, and the answer.

Several values are told in one order: a key's in the order of the text, several keys' in the order
of the question, a chain from its value on, frequent words from the most frequent down. Words that
come equally often have no order; theirs is random, so that a forgotten one can still be named.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from harder_wording import (
    HEADERS,
    IN_A_SENTENCE,
    LIST_STYLES,
    SPACED,
    VARIABLES,
    ListStyle,
    Phrases,
    Relation,
    capital,
    compose_ask,
    compose_assignment,
    compose_count,
    compose_kind,
    compose_relation,
)
from reference_data import ANSWER, AROUND, EOS, RECORD, Author, Corpus, compose_sentence

from dynmask.evals.ruler.base import distinct
from dynmask.evals.text import held_out, pronounceable

# Classes of the families' answers; they follow those of the reference.
NEEDLES, TRACES, COMMON, FREQUENT, ONE_HOP, TWO_HOPS = range(ANSWER + 1, ANSWER + 7)
ANSWERS = {
    "needles": NEEDLES, "traces": TRACES, "common": COMMON, "frequent": FREQUENT,
    "one_hop": ONE_HOP, "two_hops": TWO_HOPS,
}  # fmt: skip
# Padding, records, text around facts, text, the reference's answers, the families' answers.
WEIGHTS = (0.0, 0.02, 0.1, 0.4, 2.0, 3.0, 8.0, 8.0, 12.0, 6.0, 8.0)
LEAST = 300  # a document of fewer tokens is one of the reference's


class Question(NamedTuple):
    """The tokens of a question and of its answer, and the answer's class."""

    text: list[int]
    answer: list[int]
    kind: int

    @property
    def size(self) -> int:
        """How many tokens it takes."""
        return len(self.text) + len(self.answer)


class HarderAuthor(Author):
    """Write documents of the harder families among those of the reference.

    Args:
        corpus: the text.
        mix: shares of the documents by family, names of ``FAMILIES``; the rest is the reference's.
        facts: the share of documents with hidden facts among the reference's.
    """

    def __init__(self, corpus: Corpus, mix: Sequence[tuple[str, float]], facts: float) -> None:
        super().__init__(corpus, facts)
        self.mix = [(FAMILIES[name], share) for name, share in mix]
        self.counters: dict[tuple[str, str], list[list[int]]] = {}

    def document(self, rng: random.Random, goal: int, size: int) -> None:
        """Append one document of about ``size`` tokens up to ``goal``; its first token is there."""
        drawn = rng.random()
        for family, share in self.mix if size >= LEAST else ():
            if drawn < share:
                return family(self, Phrases(rng, self.words), goal)
            drawn -= share
        return super().document(rng, goal, size)

    def ask(self, text: str, answer: str, kind: int, last: bool = True) -> Question:
        """Return a question with its answer, after a space; ``last`` ends what is generated."""
        return Question(self.encode(text), self.encode(" " + answer) + [EOS] * last, kind)

    def asks(self, room: int, draw: Callable[[int], Question | None]) -> list[Question]:
        """Return questions that ``draw`` makes of their numbers: one, then as many as fit."""
        questions: list[Question] = []
        while (question := draw(len(questions))) is not None:
            room -= question.size
            if questions and room < 0:
                break
            questions.append(question)
        return questions

    def open(self, text: str) -> None:
        """Append a text that is not learned as text."""
        self.add(self.encode(text), RECORD)

    def page(
        self, phrases: Phrases, goal: int, hay: str, lines: list[list[int]],
        questions: list[Question],
    ) -> None:  # fmt: skip
        """Append lines in their order, hay of a kind between them up to ``goal``, and questions."""
        room = goal - len(self.ids) - sum(map(len, lines))
        parts = self.hay(phrases, hay, room - sum(question.size for question in questions))
        self.scatter(phrases.rng, parts, lines, AROUND if hay == "prose" else RECORD)
        self.close(goal, questions)

    def close(self, goal: int, questions: list[Question]) -> None:
        """Append the questions that fit; the line before them ends here."""
        while self.ids[-1] in self.corpus.newlines:
            self.cut(len(self.ids) - 1)
        for question in questions:
            if len(self.ids) + question.size > goal:
                break
            self.add(question.text, RECORD)
            self.add(question.answer, question.kind)

    def hay(self, phrases: Phrases, kind: str, size: int) -> list[list[int]]:
        """Return lines of at most ``size`` tokens: ``prose``, ``noise``, or none."""
        if size <= 0 or kind not in ("prose", "noise"):
            return []
        if kind == "prose":
            ids, starts = self.text(phrases.rng, size, prose=0.85)
            tokens, places = ids.tolist(), [0, *starts.tolist(), len(ids)]
            return [tokens[a:b] for a, b in pairwise(places) if a < b]
        lines = [self.encode(phrases.noise() + "\n") for _ in range(phrases.rng.choice((1, 1, 4)))]
        return phrases.rng.choices(lines, k=size * len(lines) // sum(map(len, lines)))

    def scatter(
        self, rng: random.Random, hay: list[list[int]], lines: list[list[int]], kind: int
    ) -> None:
        """Append the lines, in their order, at random places among the hay of a loss class."""
        done = 0
        places = sorted(rng.choices(range(len(hay) + 1), k=len(lines)))
        for place, line in zip([*places, len(hay)], [*lines, []], strict=True):
            if place > done:
                self.add([token for part in hay[done:place] for token in part], kind)
                done = place
            if line:
                self.add(line, RECORD)

    def word(self, rng: random.Random, real: float) -> str:
        """Return a word, a real one with that probability, else a pronounceable one."""
        if self.words.real and rng.random() < real:
            return rng.choice(self.words.real)
        while held_out(word := pronounceable(rng)):
            pass
        return word

    def letters(self, rng: random.Random, alphabet: str, size: int) -> str:
        """Return a word of random letters."""
        while held_out(word := "".join(rng.choices(alphabet, k=size))):
            pass
        return word


def opening(phrases: Phrases) -> str:
    """Return a text about what follows, with the end of its line, or nothing."""
    if phrases.rng.random() < 0.35:
        return ""
    return phrases.opening() + "\n" * phrases.rng.randint(1, 2)


def gap(phrases: Phrases) -> str:
    """Return what stands between a context and its first question."""
    text = "\n" * phrases.rng.randint(1, 2)
    return f"{text}{phrases.opening()}\n" if phrases.rng.random() < 0.3 else text


# --------------------------------------------------------------- needles: many keys, many values


def needles(author: HarderAuthor, phrases: Phrases, goal: int) -> None:
    """Facts among prose, noise or other facts; one key or several are asked, with all values."""
    rng, label = phrases.rng, phrases.label()
    author.open(opening(phrases))
    size = goal - len(author.ids)
    room = size - max(160, int(size * rng.choice((0.15, 0.25, 0.35))))
    hay = rng.choices(("needles", "prose", "noise"), (0.4, 0.4, 0.2))[0]
    told = facts(author, phrases, label, room, everywhere=hay == "needles")
    known: dict[str, list[str]] = {}
    for key, value, _ in told:
        known.setdefault(key, []).append(value)
    questions = needle_questions(author, phrases, known, label, size - room)
    author.page(phrases, goal, hay, [line for _, _, line in told], questions)


def facts(
    author: HarderAuthor, phrases: Phrases, label: str, room: int, everywhere: bool
) -> list[tuple[str, str, list[int]]]:
    """Return (key, value, line) of facts in random order; ``everywhere`` they fill the room."""
    rng = phrases.rng
    keys, value = keys_of(author, rng), values_of(author, rng)
    ends = rng.choice((".", ".", ".", "", "!"))
    shapes = [compose_sentence(rng, author.words) + ends for _ in range(rng.choice((1, 1, 3)))]
    most, fixed = rng.choice((1, 1, 1, 2, 3, 4, 4, 5)), rng.random() < 0.7
    wanted = max(1, int((room / 100 / most) ** rng.random()))
    told: list[tuple[str, str, list[int]]] = []
    while everywhere or wanted > 0:
        key, wanted = next(keys), wanted - 1
        more: list[tuple[str, str, list[int]]] = []
        for _ in range(most if fixed else rng.randint(1, most)):
            found = value()
            text = rng.choice(shapes).format(K=key, L=label, V=found)
            more.append((key, found, author.encode(text + "\n")))
        room -= sum(len(line) for _, _, line in more)
        if told and room < 0:
            break
        told += more
    rng.shuffle(told)
    return told


def needle_questions(
    author: HarderAuthor, phrases: Phrases, known: dict[str, list[str]], label: str, room: int
) -> list[Question]:
    """Return questions about one key or several, with their values in the order of the text."""
    rng, names = phrases.rng, list(known)
    forms = {many: compose_ask(phrases, many) for many in (False, True)}
    style, end = rng.choice(LIST_STYLES), rng.choice((".", ".", ""))
    several, first = 0.7 * rng.random(), gap(phrases)

    def draw(index: int) -> Question:
        asked = [rng.choice(names)]
        if len(names) > 1 and rng.random() < several:
            asked = rng.sample(names, min(rng.randint(2, 5), len(names)))
        values = [value for name in asked for value in known[name]]
        blanks = {"K": IN_A_SENTENCE(asked), "L": label, "n": len(values)}
        text = "".join(forms[len(values) > 1]).format(**blanks)
        return author.ask((first if not index else "\n") + text, style(values) + end, NEEDLES)

    return author.asks(room, draw)


def keys_of(author: HarderAuthor, rng: random.Random) -> Iterator[str]:
    """Yield keys of one style: words, pairs of words, long codes, letters with digits."""
    kind = rng.random()
    if kind < 0.7:
        return author.words.keys(rng, sentence=rng.random() < 0.4)
    if kind < 0.9:
        return distinct(lambda: long_code(rng))
    size = rng.randint(4, 9)
    return distinct(lambda: author.letters(rng, string.ascii_lowercase + string.digits, size))


def values_of(author: HarderAuthor, rng: random.Random) -> Callable[[], str]:
    """Return what draws values of one style: numbers mostly, long codes, words, short codes."""
    kind = rng.random()
    if kind < 0.55:
        return number_maker(rng, rng.choice((2, 3, 4, 5, 6, 7, 7, 8, 9)))
    if kind < 0.78:
        return lambda: long_code(rng)
    if kind < 0.9:
        return lambda: author.word(rng, 0.5)
    letters, number = rng.randint(1, 3), number_maker(rng, rng.randint(2, 5))
    return lambda: f"{''.join(rng.choices(string.ascii_uppercase, k=letters))}-{number()}"


def number_maker(rng: random.Random, digits: int) -> Callable[[], str]:
    """Return what draws numbers of so many digits."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    return lambda: str(rng.randint(low, high))


def long_code(rng: random.Random) -> str:
    """Return 32 hexadecimal digits in the groups of a UUID."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


# ------------------------------------------------------------------- traces: values handed on


def traces(author: HarderAuthor, phrases: Phrases, goal: int) -> None:
    """Chains of assignments in noise; the variables of a value are asked, from it on.

    Half of the longer ones start with a worked example of one chain.
    """
    rng = phrases.rng
    alphabet = string.ascii_uppercase
    if rng.random() < 0.25:
        alphabet = rng.choice((string.ascii_lowercase, "ABCDEFGH" + string.digits))
    letters, hops = rng.randint(3, 7), 4 if rng.random() < 0.5 else rng.randint(1, 5)
    write = trace_writer(author, phrases, hops)
    size = goal - len(author.ids)
    if size > 700 and rng.random() < 0.5:
        short = rng.choice((2, 3, 3, 4))
        names = distinct(lambda: author.letters(rng, alphabet, short))
        write(len(author.ids) + rng.randint(200, min(size // 3, 700)), names, 1, False)
        author.open("\n\n")
    names = distinct(lambda: author.letters(rng, alphabet, letters))
    most = (goal - len(author.ids)) / (40 * (hops + 2))
    write(goal, names, 1 if rng.random() < 0.3 else max(1, int(most ** rng.random())), True)


def trace_writer(
    author: HarderAuthor, phrases: Phrases, hops: int
) -> Callable[[int, Iterator[str], int, bool], None]:
    """Return what writes chains to a goal: ``write(goal, names, count, last)``, in one wording."""
    rng = phrases.rng
    start, first, label = opening(phrases), gap(phrases), rng.choice(VARIABLES)
    assignment = compose_assignment(phrases)
    forms = {back: compose_ask(phrases, not back) for back in (False, True)}
    style = rng.choice((SPACED, SPACED, IN_A_SENTENCE, ListStyle(", ", ", ")))
    hay = rng.choices(("noise", "prose", "none"), (0.7, 0.2, 0.1))[0]
    held = distinct(number_maker(rng, rng.choice((4, 5, 5, 6, 7))))

    def write(goal: int, names: Iterator[str], count: int, last: bool) -> None:
        author.open(start)
        chains = [[next(held), *islice(names, hops + 1)] for _ in range(count)]
        lines = [author.encode(line + "\n") for line in handed_on(rng, chains, assignment)]
        asked = iter(rng.sample(chains, count))

        def draw(index: int) -> Question | None:
            if not (chain := next(asked, None)):
                return None
            back = last and rng.random() < 0.15  # from a variable to its value
            key, found = (rng.choice(chain[1:]), chain[:1]) if back else (chain[0], chain[1:])
            text = "".join(forms[back]).format(K=key, L=label, n=len(found))
            return author.ask((first if not index else "\n") + text, style(found), TRACES, last)

        room = goal - len(author.ids) - sum(map(len, lines))
        author.page(phrases, goal, hay, lines, author.asks(room, draw))

    return write


def handed_on(rng: random.Random, chains: list[list[str]], assignment: str) -> list[str]:
    """Return the assignments of chains (a value, then variables), shuffled but each in order."""
    turns = [chain for chain in chains for _ in chain[1:]]
    rng.shuffle(turns)
    steps = {id(chain): iter(zip(chain[1:], chain, strict=False)) for chain in chains}
    pairs = (next(steps[id(chain)]) for chain in turns)
    return [assignment.format(N=name, W=what) for name, what in pairs]


# ------------------------------------------------------------------------ counts: word lists

# How often a common and another word come, the published forms among them.
TIMES = ((6, 1), (4, 1), (3, 1), (8, 2), (10, 3), (12, 2), (20, 3), (30, 3))
MARKS = ("...", "...", "..", "--", "***", "~~", "//", "##", "==", "<>", "%%")
NUMBERINGS = ((" ", "."), (" ", "."), (" ", "."), (" ", ")"), (" ", ":"), ("\n", "."), ("\n", ")"))


def lists(author: HarderAuthor, rng: random.Random, goal: int, least: int, example: float
          ) -> Iterator[int]:  # fmt: skip
    """Yield the goals of lists that follow each other: with that probability a short worked one."""
    size = goal - len(author.ids)
    if size > 3 * least and rng.random() < example:
        short = int(least * (min(size / 2, 1_600) / least) ** rng.random())
        yield len(author.ids) + short
        author.open("\n\n")
    yield goal


def common(author: HarderAuthor, phrases: Phrases, goal: int) -> None:
    """Lists in which some words come several times as often as the others; they are asked."""
    rng = phrases.rng
    numbering = rng.choice(NUMBERINGS) if rng.random() < 0.85 else None
    style = rng.choice(LIST_STYLES)
    start, between, (question, lead) = opening(phrases), gap(phrases), compose_count(phrases)
    count = min(rng.choice((10, 10, rng.randint(2, 10))), (goal - len(author.ids)) // 70)
    real = rng.choice((0.0, 0.25, 0.25, 0.6))
    for end in lists(author, rng, goal, 50 * count, 0.8):
        author.open(start)
        words = distinct(lambda: author.word(rng, real))
        chosen = list(islice(words, count))
        reply = style(chosen)
        if numbering and numbering[1] == ".":
            reply = " ".join(f"{place}. {word}" for place, word in enumerate(chosen, 1))
        text = between + (question + lead).format(n=count)
        asked = author.ask(text, reply, COMMON, end == goal)
        room = end - len(author.ids) - asked.size
        author.add(common_list(author, rng, chosen, words, room, numbering), RECORD)
        author.close(goal, [asked])


def common_list(
    author: HarderAuthor, rng: random.Random, chosen: list[str], others: Iterator[str], room: int,
    numbering: tuple[str, str] | None,
) -> list[int]:  # fmt: skip
    """Return the tokens of a list in which the chosen words come more often than the others."""
    coded = {word: author.encode(" " + word) for word in chosen}
    place = 2 + len(str(room // 6)) if numbering else 0  # tokens of a number, at most
    cost = sum(map(len, coded.values())) + place * len(coded)
    fitting = [times for times in TIMES if times[0] * cost < 0.75 * room] or [(3, 1)]
    often, seldom = rng.choice(fitting[-3:] if rng.random() < 0.7 else fitting)
    shown, room = chosen * often, room - often * cost
    while room > seldom * (place + 6) or len(shown) < often * len(chosen) + 3 * seldom:
        other = next(others)
        coded[other] = author.encode(" " + other)
        shown += [other] * seldom
        room -= seldom * (len(coded[other]) + place)
    rng.shuffle(shown)
    if numbering is None:
        return in_a_row(author, shown, coded)
    ids: list[int] = []
    for number, word in zip(places_of(author, numbering, len(shown)), shown, strict=False):
        ids += number
        ids += coded[word]
    return ids


def in_a_row(author: HarderAuthor, words: list[str], coded: dict[str, list[int]]) -> list[int]:
    """Return the tokens of words with spaces between them; ``coded`` has each after a space."""
    ids = author.encode(words[0])[:]
    for word in words[1:]:
        ids += coded[word]
    return ids


def places_of(author: HarderAuthor, style: tuple[str, str], count: int) -> list[list[int]]:
    """Return the tokens of at least ``count`` numbers of a list; the first follows nothing."""
    known = author.counters.setdefault(style, [])
    for place in range(len(known) + 1, count + 1):
        known.append(author.encode(f"{style[0] if known else ''}{place}{style[1]}"))
    return known


def frequent(author: HarderAuthor, phrases: Phrases, goal: int) -> None:
    """Coded words whose frequencies fall with their rank; the first after the marks are asked."""
    rng = phrases.rng
    start, between, (question, lead) = opening(phrases), gap(phrases), compose_count(phrases)
    style, stop = rng.choice(LIST_STYLES), rng.choice((".", ".", ""))
    named, alpha = rng.choice((3, 3, rng.randint(1, 5))), rng.choice((2.0, rng.uniform(1.4, 2.4)))
    letters, mark = rng.choice((6, 6, rng.randint(3, 8))), rng.choice(MARKS)
    invented = rng.random() < 0.25

    def draw() -> str:
        return author.word(rng, 0.2) if invented else author.letters(
            rng, string.ascii_lowercase, letters)  # fmt: skip

    for end in lists(author, rng, goal, 330, 0.4):
        author.open(start)
        words = distinct(draw)
        chosen = list(islice(words, named))
        text = between + (question + lead).format(n=named)
        asked = author.ask(text, style(chosen) + stop, FREQUENT, end == goal)
        room = end - len(author.ids) - asked.size
        ranks = [mark, *chosen, *islice(words, max(room // 50, named + 2))]
        author.add(frequent_list(author, rng, ranks, alpha, named, room), RECORD)
        author.close(goal, [asked])


def frequent_list(
    author: HarderAuthor, rng: random.Random, words: list[str], alpha: float, named: int, room: int
) -> list[int]:
    """Return the tokens of words in random order, each as often as a power of its rank says.

    The first ``named + 2`` ranks differ in how often they come.
    """
    coded = {word: author.encode(" " + word) for word in words}
    shares = [rank**-alpha for rank in range(1, len(words) + 1)]
    scale = (room - 12) / sum(
        share * len(ids) for share, ids in zip(shares, coded.values(), strict=True)
    )
    times = [int(scale * share) for share in shares]
    for rank in range(named + 1, 0, -1):
        times[rank - 1] = max(times[rank - 1], times[rank] + 1)
    shown = [word for word, count in zip(words, times, strict=True) for _ in range(count)]
    rng.shuffle(shown)
    return in_a_row(author, shown, coded)


# ---------------------------------------------------------------------- documents: one hop, two


class Entity(NamedTuple):
    """The subject of a document: its text, what questions call it, its facts, and its link.

    A fact is a relation and its value; the link is the relation to the subject of another document.
    """

    text: str
    who: str
    facts: list[tuple[Relation, str]]
    link: Relation


class Kind:
    """A kind of subject, with the wording of its documents."""

    def __init__(self, author: HarderAuthor, phrases: Phrases, names: Iterator[str]) -> None:
        rng = phrases.rng
        self.rng, self.names = rng, names
        self.kinds = [compose_kind(phrases) for _ in range(rng.randint(2, 8))]
        self.relations = [compose_relation(phrases) for _ in range(rng.randint(3, 6))]
        self.link = compose_relation(phrases)
        self.facts = rng.randint(2, min(4, len(self.relations)))
        verb = rng.choice(("is", "was", "is known as", "had been"))
        self.first = rng.choice((f"{{name}} {verb} a {{what}}.", f"{{name}} {verb} a {{what}}.",
                                 f"{capital(phrases.some(2))} {{name}}, a {{what}}.",
                                 f"The {{what}} {{name}} {phrases.some(2)}."))  # fmt: skip
        self.plain = rng.random() < 0.25  # sentences name the subject
        self.titled = rng.random() < 0.4

    def entity(self, linked: str | None = None, name: str | None = None) -> Entity:
        """Return a subject, of that name if one is given, linked to another one."""
        rng = self.rng
        name, what = name or next(self.names), rng.choice(self.kinds)
        told = [(relation, next(self.names)) for relation in rng.sample(self.relations, self.facts)]
        if linked:
            told.insert(rng.randint(0, len(told)), (self.link, linked))
        sentences = [relation.sentence.format(what=what, value=value) for relation, value in told]
        if self.plain:
            sentences = [
                sentence.replace(f"The {what}", name).replace(f"the {what}", name)
                for sentence in sentences
            ]
        text = " ".join([self.first.format(name=name, what=what), *sentences])
        return Entity(text, f"the {what} {name}" if self.titled else name, told, self.link)


def documents(author: HarderAuthor, phrases: Phrases, goal: int) -> None:
    """Small documents about invented subjects, and questions about one of them, or two linked."""
    rng = phrases.rng
    start, first = opening(phrases), gap(phrases)
    author.open(start)
    names = distinct(lambda: author.word(rng, 0.15).capitalize())
    kinds = [Kind(author, phrases, names) for _ in range(rng.choice((1, 2, 2, 3)))]
    room = goal - len(author.ids)
    for_questions = max(90, int(room * rng.choice((0.15, 0.25, 0.35))))
    header = rng.choice(HEADERS).replace("{W}", capital(phrases.some(1)))
    parted = "\n" * rng.choice((1, 2, 2, 2))
    linked = rng.random() < 0.5
    groups, lines = written(author, rng, kinds, linked, header, parted, room - for_questions)
    (before, after), end = phrases.lead(), rng.choice(("", "", "."))
    again = first + (start.strip() + "\n" if start and rng.random() < 0.5 else "")

    def draw(index: int) -> Question:
        question, answer, kind = document_question(rng, rng.choice(groups))
        text = (again if not index else "\n") + before + question + after
        return author.ask(text, answer + end, kind)

    author.page(phrases, goal, "none", lines, author.asks(for_questions, draw))


def written(
    author: HarderAuthor, rng: random.Random, kinds: list[Kind], linked: bool, header: str,
    parted: str, room: int,
) -> tuple[list[list[Entity]], list[list[int]]]:  # fmt: skip
    """Return subjects, alone or linked pairs, and the tokens of their documents in random order."""
    groups: list[list[Entity]] = []
    coded: list[list[int]] = []
    gapped = " " if header.endswith(" ") else ""
    while True:
        kind = rng.choice(kinds)
        name = next(kind.names) if linked else None
        group = [kind.entity(linked=name)]
        if name:
            group.append(rng.choice(kinds).entity(name=name))
        more = [author.encode(gapped + entity.text + parted) for entity in group]
        room -= sum(len(ids) + 6 * bool(header) for ids in more)
        if groups and room < 0:
            break
        groups.append(group)
        coded += more
    rng.shuffle(coded)
    if header:
        coded = [author.encode(header.rstrip(" ").format(n=place)) + ids
                 for place, ids in enumerate(coded, 1)]  # fmt: skip
    return groups, coded


def document_question(rng: random.Random, group: list[Entity]) -> tuple[str, str, int]:
    """Return a question about a subject, or about what it is linked to, its answer and class."""
    if len(group) == 1 or rng.random() < 0.4:
        entity = rng.choice(group)
        relation, answer = rng.choice(entity.facts)
        return relation.question.format(who=entity.who), answer, ONE_HOP
    relation, answer = rng.choice(group[1].facts)
    who = group[0].link.clause.format(who=group[0].who)
    return relation.question.format(who=who), answer, TWO_HOPS


FAMILIES: dict[str, Callable[[HarderAuthor, Phrases, int], None]] = {
    "needles": needles, "traces": traces, "common": common, "frequent": frequent,
    "documents": documents,
}  # fmt: skip
