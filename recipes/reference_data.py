"""The training data of the reference model: permissive text, and questions that make it retrieve.

Three kinds of document fill every sequence: plain text, text with facts hidden in it and asked at
the end, and keyed records with questions among or after them. Wording is composed at random from
parts, so that the model learns to look things up rather than to know a format. Everything is a
function of (seed, step): a run can be repeated and resumed.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import queue
import random
import re
import signal
import string
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dynmask.evals import lines, needle
from dynmask.evals.text import held_out, pronounceable, stream

BOS, EOS, PAD = 0, 1, 2
SPECIAL = ["<s>", "</s>", "<pad>"]
# What a token is for the loss: padding, unpredictable records, text around facts, text, answers.
NOTHING, RECORD, AROUND, TEXT, ANSWER = range(5)
CLASS_WEIGHTS = (0.0, 0.1, 0.5, 1.0, 1.0)
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
ASCII_SPLIT = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s*[\r\n]+|\s+(?!\S)|\s+", re.ASCII)

# --------------------------------------------------------------------------------------- the text

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD)\b", re.I)
RESTRICTIVE = re.compile(r"GPL|GNU|Mozilla|MPL|EPL|CDDL|Proprietary|NVIDIA|Commercial|EULA", re.I)
SKIPPED_PARTS = {
    "pydoc_data", "site-packages", "dist-packages", "_vendor", "_vendored", "vendor", "vendored",
    "third_party", "thirdparty", "extern", "externals", "licenses", "locale",
}  # fmt: skip
UNWANTED = re.compile(r"REGISTER_CONTENT|longeval|longchat", re.I)


@dataclass(frozen=True)
class Source:
    """One source of text: a name, its licence as the metadata gives it, and its files."""

    name: str
    licence: str
    files: tuple[Path, ...]


def licence_of(metadata: Any) -> str | None:
    """Return the licence that a distribution's metadata names, if it is a permissive one."""
    classifiers = [
        entry.rsplit("::", 1)[-1].strip()
        for entry in metadata.get_all("Classifier") or []
        if entry.startswith("License ::")
    ]
    declared = (metadata.get("License") or "").strip().split("\n")[0][:60]
    named = metadata.get("License-Expression") or "; ".join(classifiers) or declared
    if PERMISSIVE.search(named) and not RESTRICTIVE.search(named + " " + declared):
        return named
    return None


def text_sources() -> list[Source]:
    """Return the standard library and the permissively licensed packages installed here."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if _wanted(path.relative_to(root)))
    sources = [Source("python standard library", "PSF-2.0", tuple(files))]
    found: dict[str, Source] = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        licence = licence_of(distribution.metadata)
        if licence is None or not name or name in found or name == "dynmask":
            continue
        paths = [
            Path(str(distribution.locate_file(file)))
            for file in distribution.files or []
            if file.suffix in (".py", ".md", ".rst") and _wanted(Path(*file.parts))
        ]
        if paths:
            found[name] = Source(name, licence, tuple(sorted(paths)))
    return sources + [found[name] for name in sorted(found)]


def _wanted(path: Path) -> bool:
    return not SKIPPED_PARTS.intersection(path.parts) and ".dist-info" not in str(path)


def read_source(source: Source, limit: int) -> tuple[list[str], list[str]]:
    """Return (code files, prose) of a source, about ``limit`` characters; prose is docstrings."""
    code: list[str] = []
    prose: list[str] = []
    paths = list(source.files)
    stream("files", source.name).shuffle(paths)
    room = limit
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not 500 <= len(text) <= 400_000 or UNWANTED.search(text):
            continue
        if path.suffix == ".py":
            code.append(text)
            found = re.findall(r'"""(.{160,}?)"""', text, re.S)
            prose += ["\n".join(textwrap.dedent("    " + part).strip().split("\n")) + "\n"
                      for part in found]  # fmt: skip
        else:
            prose.append(text)
        room -= len(text)
        if room < 0:
            break
    return code, prose


def train_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of ``size`` entries whose digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


@dataclass
class Corpus:
    """Tokenised text: ids of code and of prose, where their lines start, and words for keys."""

    tokenizer: Tokenizer
    code: np.ndarray
    prose: np.ndarray
    words: list[str]
    sources: list[dict[str, Any]]
    starts: dict[str, np.ndarray] = field(default_factory=dict)
    newlines: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        size = self.tokenizer.get_vocab_size()
        pieces = [self.tokenizer.decode([index]) for index in range(size)]
        ends = np.array([piece.endswith("\n") for piece in pieces])
        begins = np.array([not piece[:1].isspace() and bool(piece) for piece in pieces])
        self.newlines = set(np.flatnonzero(ends).tolist())
        for name in ("code", "prose"):
            ids = getattr(self, name)
            # A line may be put in before a token that starts a line and is no indentation: there
            # the pieces of the text and of the line do not merge.
            self.starts[name] = 1 + np.flatnonzero(ends[ids[:-1]] & begins[ids[1:]])


def build_corpus(
    characters: int, per_source: int, vocabulary: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Read permissive text of this machine and tokenise it, with a new tokenizer if none is given.

    Args:
        characters: how much text to read.
        per_source: how much of it one source may give; the standard library gives three times it.
        vocabulary: entries of a new tokenizer, trained on this text.
        tokenizer: the tokenizer of a model whose training goes on.
    """
    code: list[str] = []
    prose: list[str] = []
    used: list[dict[str, Any]] = []
    total = 0
    sources = text_sources()
    sources[1:] = sorted(sources[1:], key=lambda source: -len(source.files))
    for source in sources:
        if total >= characters:
            break
        limit = per_source * (3 if source is sources[0] else 1)
        new_code, new_prose = read_source(source, min(limit, characters - total))
        size = sum(map(len, new_code)) + sum(map(len, new_prose))
        if not size:
            continue
        code += new_code
        prose += new_prose
        total += size
        used.append({"name": source.name, "licence": source.licence, "characters": size})
    stream("order").shuffle(code)
    stream("order").shuffle(prose)
    sample = min(12_000_000, characters // 3)
    tokenizer = tokenizer or train_tokenizer(
        (text for texts in (prose, code) for text in _first(texts, sample)), vocabulary
    )
    counts = Counter(
        word for text in _first(prose, 12_000_000) for word in re.findall(r"\b[a-z]{3,10}\b", text)
    )
    frequent = sorted(word for word, count in counts.items() if count >= 12)
    words = [word for word in frequent if not held_out(word)]
    return Corpus(tokenizer, _encode(tokenizer, code), _encode(tokenizer, prose), words, used)


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    parts = []
    for first in range(0, len(texts), 512):
        for coded in tokenizer.encode_batch_fast(texts[first : first + 512]):
            parts.append(np.array(coded.ids, dtype=np.uint16))
    return np.concatenate(parts)


class Encoder(dict[str, list[int]]):
    """Encode ASCII text a pre-token at a time, each looked up: many times faster than anew."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, piece: str) -> list[int]:
        ids = self.tokenizer.encode(piece, add_special_tokens=False).ids
        if len(self) > 300_000:
            self.clear()
        self[piece] = ids
        return ids

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in ASCII_SPLIT.findall(text):
            ids += self[piece]
        return ids


# ------------------------------------------------------------------------------------ the wording

NOUNS = [
    "item", "row", "entry", "record", "key", "node", "user", "unit", "room", "slot", "port",
    "host", "file", "part", "order", "parcel", "badge", "station", "vessel", "account",
    "sample", "page", "topic", "city", "ticket", "machine", "field", "register", "cell",
    "object", "case",
]  # fmt: skip
LABELS = [
    "value", "code", "number", "total", "weight", "price", "score", "count", "offset",
    "size", "index", "amount", "level", "id", "pin", "seed", "checksum", "address", "mark",
    "grade", "rank", "quota", "distance", "year", "content", "reading",
]  # fmt: skip
WRAPS = [("", "")] * 8 + [
    ("<", ">"), ("<", ">"), ("[", "]"), ("(", ")"), ("{", "}"), ('"', '"'), ("'", "'"),
    ("`", "`"), ("**", "**"), ("#", ""), ("$", ""), ("<<", ">>"), ("=", ""),
]  # fmt: skip
KEY_WRAPS = [("", "")] * 9 + [
    ("<", ">"), ("[", "]"), ("(", ")"), ('"', '"'), ("'", "'"), ("`", "`"), ("**", "**"),
    ("{", "}"), ("@", ""), ("#", ""), ("/", ""),
]  # fmt: skip
RECORDS = [
    "{N}{K}: {V}", "{N}{K} = {V}", "{N}{K}={V}", "{N}{K}:{V}", "{N}{K} {A} {V}", "{N}{K}, {V}",
    "{N}{K}: {L} is {V}", "{N}{K}: {L} = {V}", "{N}{K}: {L} {V}", "{N}{K}: the {L} is {V}",
    "{N}{K} has {L} {V}", "{N}{K} has the {L} {V}", "{N}{K}, {L} {V}", "{N}{K} | {V}",
    "| {N}{K} | {L} | {V}", "{N}{K} - {L}: {V}", "{L} of {N}{K}: {V}", "{L}({K}) = {V}",
    "{N}{K}\t{V}", "{N}{K} holds {V}", "{N}{K} with {L} {V}", "- {N}{K}: {V}", "* {K} {A} {V}",
    "set {K} {V}", "{K} {V}", "{I}. {N}{K}: {V}", "{I} {K} {A} {V}", "({K}, {V})", "{K}; {L}; {V}",
    "{N}{K} {L}={V}", "In {N}{K} the {L} was {V}", "{N}{K}: {L} -> {V}", "{L} {V} is for {N}{K}",
    "{V} {A} {K}", "{V} is the {L} of {N}{K}",
]  # fmt: skip
SENTENCES = [
    "The {L} of {K} is {V}", "The {L} for {K} is {V}", "{K} has the {L} {V}", "{K}'s {L} is {V}",
    "For {K}, the {L} is {V}", "Remember that the {L} of {K} is {V}", "Note: {K} has {L} {V}",
    "It is known that {K} received {L} {V}", "The {L} assigned to {K} was {V}",
    "According to the list, {K} keeps the {L} {V}", "{K} wrote down {V} as {L}",
    "A visitor called {K} left the {L} {V}", "Please keep in mind: {L} of {K} = {V}",
    "The {N}{K} carries the {L} {V}", "{V} is the {L} of {K}", "At {K} the {L} reads {V}",
    "Do not forget {K}: {V}", "The {L} which goes with {K} is {V}",
]  # fmt: skip
# Parts of sentences that are composed anew for every document: no list of whole sentences is long
# enough to teach that the number of the sentence with the name is asked, however it is put.
VERBS = [
    "has", "got", "received", "keeps", "uses", "holds", "took", "carries", "bears", "owns", "shows",
    "lists", "reports", "remembers", "picked", "chose", "found", "wrote", "signed", "returned with",
    "ended up with", "was handed", "is known by", "was seen with", "goes by", "arrived with",
    "was assigned", "went home with", "is filed under", "asked for", "will need", "must show",
    "paid for", "had to repeat", "sent", "drew", "called out", "is listed with", "won", "obtained",
]  # fmt: skip
PREPOSITIONS = [
    "of", "of", "for", "for", "from", "at", "by", "with", "on", "in", "under", "kept by", "used by",
    "linked to", "assigned to", "written on", "known to", "registered for", "filed for", "held by",
]  # fmt: skip
COPULAS = [
    "is", "is", "is", "was", "was", "reads", "equals", "became", "will be", "stays", "turned into",
    "turns out to be", "must be", "is now", "has been", "=", "comes to", "is exactly", "remains",
]  # fmt: skip
DETERMINERS = ["the", "the", "the", "a", "this", "that", "one", "its", "some", "our", "a new"]
OPENERS = [
    "As noted", "In the end", "Also", "Later", "Once more", "For the record", "So", "And yet",
    "Somewhere", "Today", "Nobody knew it, but", "Between us", "In short", "To be clear", "Then",
]  # fmt: skip
ARROWS = ["->", "-->", "=>", ":=", "::", "|", "~", "to", "maps to", "gives", "equals", ".."]
QUESTIONS = [
    "What is the {L} of {N}{K}?", "What is the {L} in {N}{K}?", "What {L} does {N}{K} have?",
    "Which {L} belongs to {N}{K}?", "Give the {L} for {N}{K}.", "{L} of {N}{K}?", "Find {N}{K}.",
    "Look up {N}{K} and report its {L}.", "Say the {L} of {N}{K}.", "{N}{K}?",
    "What was recorded for {N}{K}?", "Can you recall the {L} of {N}{K}?", "Return the {L} of {K}.",
    "And {K}?", "The {L} of {N}{K}, please.", "What did {N}{K} get?", "get {K}",
]  # fmt: skip
Q_LEADS = ["", "", "", "Question: ", "Q: ", "Query: ", "User: ", "> ", "Now answer: ", "? "]
Q_TAILS = ["", "", "", " Reply with the {L} only.", " Answer briefly.", " Only the {L}, please.",
           " Use the list above.", " One number is enough."]  # fmt: skip
A_LEADS = ["\nAnswer: ", "\nA: ", " ", " ", "\n", "\n\n", "\nReply: ", " -> ", "\nSystem: ", " = "]
ANSWERS = [
    "{V}", "{V}", "{V}", "{R}", "{R}", "{R}", "The {L} of {N}{K} is {V}", "The {L} of {K} is {V}",
    "The {L} in {N}{K} is {V}", "{K}: {V}", "It is {V}", "{N}{K} has {L} {V}", "{L}: {V}",
    "The answer is {V}", "The {L} is {V}",
]  # fmt: skip
INTROS = [
    "Here are the {n}s with their {L}s.", "Each {n} has a {L}.", "Keep the {L} of every {n}.",
    "List of {n}s:", "A table of {n}s and {L}s follows.", "{L} by {n}", "Read these {n}s closely.",
    "The following {n}s were noted down.", "# {n}s",
]  # fmt: skip
OUTROS = ["That is all.", "End of the list.", "The {n}s end here.", "Questions:", "---", "No more.",
          "Answer from the {n}s above.", "This was the last {n}."]  # fmt: skip


def cased(word: str, style: int) -> str:
    """Return ``word`` in lower case, Title case or UPPER case."""
    return (word, word.capitalize(), word.upper())[style]


class Words:
    """Words for keys, names and labels, none of them held out."""

    def __init__(self, real: list[str]) -> None:
        self.real = real

    def one(self, rng: random.Random, letters: bool = False) -> str:
        """Return a word: real, pronounceable, or random letters."""
        while True:
            if letters:
                word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
            elif self.real and rng.random() < 0.6:
                return rng.choice(self.real)
            else:
                word = pronounceable(rng)
            if not held_out(word):
                return word

    def keys(self, rng: random.Random, sentence: bool) -> Iterator[str]:
        """Yield distinct keys of one style; their words are shared as in a list of pairs."""
        letters = rng.random() < 0.15
        count = rng.choice((1, 1, 2)) if sentence else rng.choice((1, 2, 2, 2, 2, 2, 3))
        joiner = rng.choice((" ", "-") if sentence else ("-", "-", "-", "_", "_", " ", ".", "/"))
        style = rng.choice((0, 1, 1, 1) if sentence else (0, 0, 0, 0, 1, 2))
        numbered = rng.random() < 0.06
        size = int(2 ** rng.uniform(4, 11))
        pools: list[list[str]] = [[] for _ in range(count)]
        taken: set[str] = set()
        while True:
            parts = []
            for pool in pools:
                if len(pool) < size and (len(pool) < 4 or rng.random() < 0.7):
                    pool.append(self.one(rng, letters))
                    parts.append(pool[-1])
                else:
                    parts.append(rng.choice(pool))
            key = joiner.join(cased(part, style) for part in parts)
            if numbered:
                key += f"-{rng.randint(1, 99)}"
            if key not in taken:
                taken.add(key)
                yield key
            elif count == 1 or len(taken) > size:
                size += 1


def value_maker(rng: random.Random, words: Words, codes: float = 0.06) -> Any:
    """Return a function that draws values of one style: numbers mostly, codes, words."""
    if rng.random() < codes:
        letters, width, joiner = rng.randint(1, 3), rng.randint(2, 4), rng.choice("--- _/.")
        return lambda: (
            "".join(rng.choices(string.ascii_uppercase, k=letters))
            + f"{joiner}{rng.randint(1, 10**width)}".replace(" ", "")
        )
    kind = 0.06 + 0.94 * rng.random()
    if kind < 0.10:
        return lambda: words.one(rng)
    digits = rng.choice((1, 2, 3, 4, 4, 5, 5, 5, 6, 6))
    high = rng.randint(10 ** (digits - 1), 10**digits)
    if kind < 0.2:
        return lambda: str(rng.randint(0, high)).zfill(digits)
    low = 10 ** (digits - 1) if kind < 0.4 and high > 10 ** (digits - 1) else 1
    return lambda: str(rng.randint(low, high))


def compose_sentence(rng: random.Random, words: Words) -> str:
    """Return a random sentence about {K}, {L} and {V}."""

    def filler(most: int) -> str:
        return " ".join(words.one(rng) for _ in range(rng.randint(1, most)))

    verb = rng.choice(VERBS) if rng.random() < 0.8 else filler(2)
    copula = rng.choice(COPULAS) if rng.random() < 0.9 else filler(2)
    place, what = rng.choice(PREPOSITIONS), rng.choice(DETERMINERS) + " {L}"
    sentence = rng.choice(
        (
            f"{{K}} {verb} {what} {{V}}",
            f"{{K}} {verb} {what} {{V}}",
            f"{{K}} {verb} {{L}} {{V}}",
            f"{{K}} {verb} {{V}}",
            f"{{K}} {verb} {{V}} as {what}",
            f"{{K}}, {filler(5)}, {verb} {what} {{V}}",
            f"{{K}} {filler(4)} {what} {{V}}",
            f"{{K}} {filler(4)} and {verb} {what} {{V}}",
            f"{what} {place} {{K}} {copula} {{V}}",
            f"{what} {place} {{K}} {copula} {{V}}",
            f"{what} {place} {{K}}, {filler(4)}, {copula} {{V}}",
            f"{what} {{V}} {copula} {place} {{K}}",
            f"{{L}} {{V}} {verb} {{K}}",
            f"{{K}}'s {{L}} {copula} {{V}}",
            f"{{V}} {copula} {what} {place} {{K}}",
            f"{place} {{K}} {what} {copula} {{V}}",
            f"{filler(3)} {place} {{K}} {verb} {what} {{V}}",
            f"{what} that {{K}} {verb} {copula} {{V}}",
        )
    )
    if rng.random() < 0.35:
        opener = rng.choice(OPENERS) if rng.random() < 0.6 else filler(4)
        sentence = opener + rng.choice((", ", " ", ": ")) + sentence
    if rng.random() < 0.2:
        sentence += rng.choice((", ", " ", " in the ", " because of ")) + filler(4)
    return sentence if sentence[0] == "{" else sentence[0].upper() + sentence[1:]


class Form:
    """One random wording: how a document writes its records, questions and answers."""

    def __init__(self, rng: random.Random, words: Words, sentence: bool) -> None:
        self.rng = rng
        kinds = 1 if not sentence or rng.random() < 0.5 else rng.randint(2, 6)
        self.shapes = [self._shape(words, sentence) for _ in range(kinds)]
        self.noun = rng.choice(NOUNS) if rng.random() < 0.7 else words.one(rng)
        label = rng.choice(LABELS) if rng.random() < 0.5 else words.one(rng)
        if rng.random() < 0.4:
            label = f"{words.one(rng)}{rng.choice((' ', '_', ' '))}{label}"
        style = rng.random()
        plain = sentence or style < 0.6
        self.label = label if plain else cased(label, 2 if style < 0.85 else 1)
        wrap = rng.choice(WRAPS[8:]) if rng.random() < 0.1 else ("", "")
        self.shown_label = self.label if sentence else wrap[0] + self.label + wrap[1]
        self.named = self.noun + " " if rng.random() < 0.6 else ""
        self.wrap = ("", "") if sentence and rng.random() < 0.8 else rng.choice(WRAPS)
        self.key_wrap = ("", "") if sentence else rng.choice(KEY_WRAPS)
        self.arrow = rng.choice(ARROWS)
        self.end = rng.choice((".", ".", ".", "!")) if sentence else rng.choice(
            ("", "", "", ".", ";", ",", " |"))  # fmt: skip
        self.separator = "\n" if sentence or rng.random() < 0.88 else rng.choice(("\n\n", " "))
        self.asks = [self._ask() for _ in range(1 if rng.random() < 0.6 else 3)]

    def _shape(self, words: Words, sentence: bool) -> str:
        """Draw the wording of records or of facts."""
        if not sentence:
            return self.rng.choice(RECORDS)
        if self.rng.random() < 0.25:
            return self.rng.choice(SENTENCES)
        return compose_sentence(self.rng, words)

    def _ask(self) -> tuple[str, str, str, str]:
        """Draw a question with its answer's lead, form and end."""
        rng = self.rng
        ordered = all(shape.index("{K}") < shape.index("{V}") for shape in self.shapes)
        if rng.random() < 0.1 and ordered:
            return "", "", "{R}", self.end
        question = rng.choice(Q_LEADS) + rng.choice(QUESTIONS) + rng.choice(Q_TAILS)
        return question, rng.choice(A_LEADS), rng.choice(ANSWERS), rng.choice(("", "", ".", "!"))

    def write(self, template: str, key: str, value: str, index: int) -> str:
        """Fill in a template."""
        return template.format(
            N=self.named, K=self.key_wrap[0] + key + self.key_wrap[1], L=self.shown_label,
            n=self.noun, A=self.arrow, I=index, R="{R}",
            V=self.wrap[0] + value + self.wrap[1],
        )  # fmt: skip

    def record(self, key: str, value: str, index: int) -> str:
        """Return a record or sentence."""
        return self.write(self.shapes[index % len(self.shapes)], key, value, index) + self.end

    def ask(self, key: str, value: str, index: int) -> tuple[str, str]:
        """Return (question up to where the value starts, value and what ends the answer)."""
        question, lead, answer, end = self.rng.choice(self.asks)
        answer = answer.replace("{R}", self.shapes[index % len(self.shapes)])
        before, after = self.write(answer, key, "\0", index).split("\0")
        text = (self.write(question, key, "", index) + lead if question else "") + before
        if not self.wrap[0] and text.endswith(" "):
            return text[:-1], " " + value + after + end
        return text, value + after + end


class OwnForm:
    """The wording of the project's own tasks, about words of training: words are what is held out.

    It has what :class:`Form` has; ``before`` and ``gap`` are the texts around the records.
    """

    def __init__(self, rng: random.Random, sentence: bool) -> None:
        self.separator, self.rng = "\n", rng
        if sentence:
            kind, fact = rng.choice(needle.KINDS), rng.choice(needle.FACTS)
            blank = {"kind": kind, "name": "{key}", "value": "{value}"}
            self.before, self.shape, self.gap = "", fact.format(**blank), "\n\n"
            self.asked = needle.QUESTION.format(**blank).lstrip()
        else:
            intro, record, outro, asked = rng.choice(list(lines.TEMPLATES.values()))
            self.before, self.shape, self.gap = intro, record.removesuffix("\n"), "\n" + outro
            self.asked = asked
        coded = sentence and rng.random() < 0.3
        low, high = (1_000, 999_999) if sentence else (1, rng.choice((999, 9_999, 99_999)))
        self.value = lambda: (needle._code if coded else self._number)(rng)
        self._low, self._high = low, high

    def _number(self, rng: random.Random) -> str:
        return str(rng.randint(self._low, self._high))

    def record(self, key: str, value: str, index: int) -> str:
        """Return a record or sentence."""
        return self.shape.format(key=key, value=value)

    def ask(self, key: str, value: str, index: int) -> tuple[str, str]:
        """Return (question up to where the value starts, value and what ends the answer)."""
        text = self.asked.format(key=key)
        return text, value + ">" if text.endswith("<") else " " + value


# ---------------------------------------------------------------------------------- the documents


class Author:
    """Write documents of a given number of tokens, with a loss class for every token."""

    def __init__(
        self, corpus: Corpus, facts: float = 0.25, own: float = 0.0, most: int = 10**9
    ) -> None:
        self.corpus = corpus
        self.share = facts
        self.own = own
        self.most = most  # facts in a text
        self.encode = Encoder(corpus.tokenizer)
        self.words = Words(corpus.words)
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []

    def sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, classes) of one sequence: one document, or several of random sizes."""
        self.ids, self.spans = [], []
        while len(self.ids) < length:
            room = length - len(self.ids)
            size = room
            if room > 400 and rng.random() < 0.5:
                size = int(room * rng.uniform(0.3, 0.75))
            goal = len(self.ids) + size
            self.add([BOS], NOTHING)
            self.document(rng, goal, size)
            self.cut(goal)
        ids = np.array(self.ids[:length], dtype=np.uint16)
        lengths, classes = zip(*self.spans, strict=True)
        return ids, np.repeat(np.array(classes, np.uint8), lengths)[:length]

    def document(self, rng: random.Random, goal: int, size: int) -> None:
        """Append one document of about ``size`` tokens up to ``goal``; its first token is there."""
        kind = rng.random()
        if kind < 0.2:
            self.plain(rng, goal)
        elif kind < 0.2 + self.share:
            self.facts(rng, goal)
        elif kind < 0.23 + self.share and size < 2500:
            self.copies(rng, goal)
        elif rng.random() < 0.5:
            self.interleaved(rng, goal)
        else:
            self.asked_at_end(rng, goal)

    def add(self, ids: list[int], kind: int) -> None:
        """Append tokens of one loss class."""
        self.ids += ids
        self.spans.append((len(ids), kind))

    def cut(self, length: int) -> None:
        """Drop the tokens after ``length``, where there are any."""
        extra = len(self.ids) - length
        if extra <= 0:
            return
        del self.ids[length:]
        while extra > 0:
            count, kind = self.spans.pop()
            if count > extra:
                self.spans.append((count - extra, kind))
            extra -= count

    def text(self, rng: random.Random, size: int, prose: float) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, line starts) of a slice of text of ``size`` tokens that starts a line."""
        name = "prose" if rng.random() < prose else "code"
        ids, starts = getattr(self.corpus, name), self.corpus.starts[name]
        last = np.searchsorted(starts, max(len(ids) - size, int(starts[0]) + 1))
        first = int(starts[rng.randrange(max(int(last), 1))])
        inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + size)]
        return ids[first : first + size], inside - first

    def plain(self, rng: random.Random, goal: int) -> None:
        """Text as it is."""
        ids, _ = self.text(rng, goal - len(self.ids), prose=0.5)
        self.add(ids.tolist(), TEXT)
        if len(self.ids) < goal:
            self.add([EOS] * (goal - len(self.ids)), NOTHING)

    def copies(self, rng: random.Random, goal: int) -> None:
        """Random tokens, then the same again: teaches to find and continue."""
        vocabulary = self.corpus.tokenizer.get_vocab_size()
        while len(self.ids) < goal:
            ids = [rng.randrange(len(SPECIAL), vocabulary) for _ in range(rng.randint(8, 160))]
            self.add(ids, RECORD)
            for _ in range(rng.randint(1, 2)):
                self.add(ids[:1], RECORD)
                self.add(ids[1:], ANSWER)

    def form(self, rng: random.Random, sentence: bool, own: float) -> Form | OwnForm:
        """Draw a wording: with probability ``own`` that of the project's tasks."""
        if own and rng.random() < own:
            return OwnForm(rng, sentence)
        return Form(rng, self.words, sentence)

    def question(self, form: Form | OwnForm, fact: tuple[str, str, int], start: str = "\n") -> None:
        """Append a question, its answer and the end-of-answer token."""
        text, answer = form.ask(*fact)
        self.add(self.encode(start + text), RECORD)
        self.add([*self.encode(answer), EOS], ANSWER)

    def facts(self, rng: random.Random, goal: int) -> None:
        """Text with facts on lines of their own; questions at the end."""
        form = self.form(rng, True, self.own)
        make, keys = value_maker(rng, self.words, 0.2), self.words.keys(rng, sentence=True)
        if isinstance(form, OwnForm):
            make = form.value
        size = goal - len(self.ids)
        count = max(2, int(2 ** rng.uniform(1, np.log2(max(size / 60, 2.5)))))
        count = min(count, self.most)
        known = [(next(keys), make(), index) for index in range(1, count + 1)]
        lines = [self.encode(form.record(*fact) + "\n") for fact in known]
        spent = sum(map(len, lines))
        asked = rng.randint(max(1, count // 2), 2 * count)
        start = len(self.ids)
        ids, starts = self.text(rng, max(size - spent - 32 * asked, size // 3), prose=0.75)
        places = [0, *starts.tolist()]
        rng.shuffle(known)
        ends: list[int] = []
        done = 0
        for place, fact in zip(sorted(rng.choices(places, k=count)), known, strict=True):
            self.add(ids[done:place].tolist(), AROUND)
            self.add(lines[fact[2] - 1], RECORD)
            ends.append(len(self.ids))
            done = place
        self.add(ids[done:].tolist(), AROUND)
        self.cut(start + size - min(size // 3, 40))
        while self.ids[-1] in self.corpus.newlines:
            self.cut(len(self.ids) - 1)
        known = [fact for fact, end in zip(known, ends, strict=True) if end <= len(self.ids) + 1]
        gap = self.outro(rng, form)
        while len(self.ids) < goal and asked > 0 and known:
            self.question(form, rng.choice(known), gap)
            gap, asked = "\n", asked - 1

    def interleaved(self, rng: random.Random, goal: int) -> None:
        """Records with questions about earlier ones among them."""
        form = Form(rng, self.words, sentence=rng.random() < 0.15)
        make, keys = value_maker(rng, self.words), self.words.keys(rng, sentence=False)
        share = rng.uniform(0.15, 0.5)
        known: list[tuple[str, str, int]] = []
        first = self.intro(rng, form)
        while len(self.ids) < goal:
            if len(known) > 3 and rng.random() < share:
                self.question(form, rng.choice(known))
                first = "\n"
                continue
            known.append((next(keys), make(), len(known) + 1))
            self.add(self.encode(first + form.record(*known[-1])), RECORD)
            first = form.separator

    def asked_at_end(self, rng: random.Random, goal: int) -> None:
        """Records, then many questions."""
        form = self.form(rng, False, self.own / 2)
        if not isinstance(form, OwnForm) and rng.random() < 0.15:
            form = Form(rng, self.words, sentence=True)
        make, keys = value_maker(rng, self.words), self.words.keys(rng, sentence=False)
        if isinstance(form, OwnForm):
            make = form.value
        size = goal - len(self.ids)
        until = goal - size * rng.choice((0.1, 0.2, 0.3, 0.3, 0.5))
        known: list[tuple[str, str, int]] = []
        first = self.intro(rng, form)
        while len(self.ids) < until or len(known) < 2:
            known.append((next(keys), make(), len(known) + 1))
            self.add(self.encode(first + form.record(*known[-1])), RECORD)
            first = form.separator
        gap = self.outro(rng, form)
        order: list[tuple[str, str, int]] = []
        while len(self.ids) < goal:
            if not order:
                order = rng.sample(known, len(known))
            self.question(form, order.pop(), gap)
            gap = "\n"

    def intro(self, rng: random.Random, form: Form | OwnForm) -> str:
        """Append a sentence about what follows, or nothing; return what must come after it."""
        if isinstance(form, OwnForm):
            return form.before
        if rng.random() < 0.35:
            return ""
        self.add(self.encode(rng.choice(INTROS).format(n=form.noun, L=form.label)), RECORD)
        return "\n" * rng.randint(1, 2)

    def outro(self, rng: random.Random, form: Form | OwnForm) -> str:
        """Append a sentence that ends the context, or nothing; return what must come after it."""
        if isinstance(form, OwnForm):
            return form.gap
        if rng.random() < 0.6:
            text = "\n" * rng.randint(1, 2) + rng.choice(OUTROS).format(n=form.noun)
            self.add(self.encode(text), RECORD)
            if rng.random() < 0.2:
                return " "
        return "\n" * rng.randint(1, 2)


# ------------------------------------------------------------------------------------ the workers


class Batches:
    """Batches written ahead by worker processes, delivered in the order they were asked for.

    Workers are forked, so they share the corpus; they write into shared memory. The batch of a
    step depends on (seed, step, length) only.
    """

    def __init__(self, author: Author, seed: int, tokens: int, workers: int, ahead: int) -> None:
        context = multiprocessing.get_context("fork")
        self.ids = np.frombuffer(context.RawArray("H", ahead * tokens), np.uint16)
        self.ids = self.ids.reshape(ahead, tokens)
        self.classes = np.frombuffer(context.RawArray("B", ahead * tokens), np.uint8)
        self.classes = self.classes.reshape(ahead, tokens)
        self.wanted, self.ready = context.Queue(), context.Queue()
        self.free = list(range(ahead))
        self.done: dict[int, tuple[int, int]] = {}
        self.workers = [
            context.Process(target=self._work, args=(author, seed), daemon=True)
            for _ in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def _work(self, author: Author, seed: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = os.getppid()
        while True:
            try:
                slot, step, length = self.wanted.get(timeout=5)
            except queue.Empty:
                if os.getppid() != parent:  # it was killed
                    return
                continue
            for row in range(self.ids.shape[1] // length):
                rng = stream("train", seed, step, row)
                ids, classes = author.sequence(rng, length)
                where = slice(row * length, (row + 1) * length)
                self.ids[slot, where], self.classes[slot, where] = ids, classes
            self.ready.put((slot, step, length))

    def ask(self, step: int, length: int) -> None:
        """Ask for the batch of a step; there must be a free slot."""
        self.wanted.put((self.free.pop(), step, length))

    def take(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return copies of (ids, classes) of a step [rows, length], and its length."""
        while step not in self.done:
            try:
                slot, done, length = self.ready.get(timeout=120)
            except queue.Empty:
                alive = sum(worker.is_alive() for worker in self.workers)
                raise RuntimeError(
                    f"data: no batch in 120 s, {alive} of {len(self.workers)} workers alive; "
                    "look for an error of a worker above"
                ) from None
            self.done[done] = slot, length
        slot, length = self.done.pop(step)
        ids = self.ids[slot].copy().reshape(-1, length)
        classes = self.classes[slot].copy().reshape(-1, length)
        self.free.append(slot)
        return ids, classes, length

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.terminate()
