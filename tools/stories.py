"""Generate short stories from a grammar, and check whether a text is one of them.

The grammar is in ``stories.toml``. Generating and checking follow the same beats: a story keeps its
hero, place and objects from the first sentence to the last, and a text is a story only if it does
so, too.
"""

from __future__ import annotations

import math
import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

GRAMMAR = Path(__file__).with_name("stories.toml")
GIRLS: tuple[str, ...] = ("Anna", "Maria", "Lena", "Sara", "Nora", "Ida")
GIRLS += ("Clara", "Rosa", "Emma", "Julia", "Mina", "Grace")
BOYS: tuple[str, ...] = ("Tom", "Ben", "Paul", "David", "Leo", "Omar")
BOYS += ("Max", "Sam", "Hugo", "Felix", "Noah", "Ivan")
NAMES = [name for pair in zip(GIRLS, BOYS, strict=True) for name in pair]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("third", "first")
LONG_LIST = 12
SENTENCE_START = re.compile(r'(?<=[.!?"]) (?=["A-Z])')

Bindings = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """A slot of a template: the name of its value, and how the value is written."""

    name: str
    form: str
    capital: bool

    def write(self, value: str) -> str:
        """Write a value in the form that this slot needs."""
        if self.form == "a":
            value = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
        elif self.form == "noun":
            value = value.rsplit(" ", 1)[-1]
        return value[0].upper() + value[1:] if self.capital else value


@dataclass(frozen=True)
class Beat:
    """One step of a plot: its sentences, and its probability."""

    keep: float
    templates: tuple[tuple[str | Slot, ...], ...]


@dataclass(frozen=True)
class Story:
    """A story, and the information content of the choices in it."""

    text: str
    nats: float


def _template(text: str) -> tuple[str | Slot, ...]:
    """Split a template into its literal text and its slots."""
    parts: list[str | Slot] = []
    for literal, name, form in re.findall(r"([^{]*)(?:\{(\w+)\|?(\w*)\})?", text):
        if literal:
            parts.append(literal)
        if name:
            parts.append(Slot(name.lower(), form, name[0].isupper()))
    return tuple(parts)


def _weights(count: int) -> list[float]:
    """The probability of each of ``count`` options; the first is the likeliest.

    In a long list, such as that of the names, all others are equally likely: to repeat a name, a
    model has to look back.
    """
    raw = [1 / (rank + 1) if count < LONG_LIST else 1.0 for rank in range(count)]
    raw[0] *= 1 if count < LONG_LIST else count / 5
    return [weight / sum(raw) for weight in raw]


def _person(name: str) -> tuple[str, str, str, str]:
    """The words for a person in a story."""
    return ("she", "her", "her", "girl") if name in GIRLS else ("he", "him", "his", "boy")


def _derived(bound: Bindings) -> Bindings:
    """Every word that follows from the bound slots."""
    he, him, his, girl = _person(bound["name"])
    first = bound["voice"] == "first"
    words = {
        "hero": "I" if first else bound["name"],
        "he": "I" if first else he,
        "him": "me" if first else him,
        "his": "my" if first else his,
        "girl": girl,
        "they": "we" if first else "they",
        "them": "us" if first else "them",
        "their": "our" if first else "their",
    }
    if friend := bound.get("friend"):
        words["fhe"], words["fhim"], *_ = _person(friend)
        words["both"] = f"{friend} and I" if first else f"{bound['name']} and {friend}"
    if coins := bound.get("coins"):
        left = NUMBERS.index(coins) - NUMBERS.index(bound["price"])
        words["left"] = f"{NUMBERS[left]} coin{'s' if left > 1 else ''} left"
    return words


@cache
def _derivable(voice: str) -> dict[str, set[str]]:
    """For every derived word, all its possible values in this voice."""
    found: dict[str, set[str]] = {}
    for name, friend, coins in product(NAMES, NAMES, NUMBERS[2:]):
        bound = {"voice": voice, "name": name, "friend": friend, "price": "one", "coins": coins}
        for word, value in _derived(bound).items():
            found.setdefault(word, set()).add(value)
    return found


class Grammar:
    """The plots, sentences and words of the stories."""

    def __init__(self, path: Path = GRAMMAR) -> None:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        self._slots: dict[str, dict[str, Any]] = data["slots"]
        self._places: dict[str, list[str]] = data["places"]
        self._plots: dict[tuple[str, str], list[Beat]] = {}
        for plot, beats in data["plot"].items():
            closing = data["closings"].get(plot, data["closings"]["*"])
            for voice in VOICES:
                shared = data["shared"]
                told = [*shared[voice], *shared["weather"], *beats, *shared[closing]]
                self._plots[voice, plot] = [
                    Beat(beat.get("keep", 1.0), tuple(_template(text) for text in beat["any"]))
                    for beat in told
                ]
        self._sentences: list[re.Pattern[str]] = []

    def _options(self, slot: str, bound: Bindings) -> Sequence[str]:
        """The possible values of an unbound slot, the likeliest first.

        Every hero has habits: if the options depend on nothing else, the hero's index in the list
        of names decides which comes first.
        """
        if slot == "friend":
            return self._habit([n for n in NAMES if n != bound["name"]], bound)
        if slot == "place":
            return self._habit(self._places[bound["plot"]], bound)
        spec = self._slots[slot]
        if "by" not in spec:
            return self._habit(spec["options"], bound)
        table: dict[str, list[str]] = spec["options"]
        options = table.get(bound[spec["by"]]) or table["*"]
        return [option for option in options if option != bound.get(spec.get("differs", ""))]

    @staticmethod
    def _habit(options: Sequence[T], bound: Bindings) -> Sequence[T]:
        """Put the options in the order of this hero's habits."""
        turn = NAMES.index(bound["name"]) % len(options)
        return [*options[turn:], *options[:turn]]

    def _value(self, slot: Slot, bound: Bindings) -> str | None:
        """The value of a slot, or None if it is not bound."""
        return bound.get(slot.name) or _derived(bound).get(slot.name)

    def _needed(self, slot: Slot, bound: Bindings) -> str | None:
        """A slot that must be bound before this one, if any."""
        name = "friend" if slot.name in ("fhe", "fhim", "both") else slot.name
        by = self._slots.get(name, {}).get("by")
        if by and by not in bound:
            return self._needed(Slot(by, "", False), bound) or str(by)
        return name if name != slot.name and name not in bound else None

    def tell(self, rng: random.Random) -> Story:
        """Generate one story."""
        nats = 0.0

        def choose(options: Sequence[T]) -> T:
            """Choose one of the options, and add the information of the choice."""
            nonlocal nats
            weights = _weights(len(options))
            index = rng.choices(range(len(options)), weights)[0]
            nats -= math.log(weights[index])
            return options[index]

        bound = {"name": choose(NAMES), "voice": choose(VOICES)}
        bound["plot"] = choose(self._habit(list(self._places), bound))
        told: list[str] = []
        for beat in self._plots[bound["voice"], bound["plot"]]:
            if beat.keep < 1:
                kept = rng.random() < beat.keep
                nats -= math.log(beat.keep if kept else 1 - beat.keep)
                if not kept:
                    continue
            sentence = ""
            for part in choose(self._habit(beat.templates, bound)):
                if isinstance(part, str):
                    sentence += part
                    continue
                while needed := self._needed(part, bound):
                    bound[needed] = choose(self._options(needed, bound))
                if (value := self._value(part, bound)) is None:
                    value = bound[part.name] = choose(self._options(part.name, bound))
                sentence += part.write(value)
            told.append(sentence)
        return Story(" ".join(told), nats)

    def is_story(self, text: str) -> bool:
        """Whether the text is a complete, consistent story with its sentences in order."""
        named = [name for name in NAMES if re.search(rf"\b{name}\b", text)]
        return any(
            self._walk(beats, 0, text, 0, {"name": name, "voice": voice, "plot": plot})
            for (voice, plot), beats in self._plots.items()
            for name in named
        )

    def _walk(self, beats: list[Beat], index: int, text: str, at: int, bound: Bindings) -> bool:
        """Whether the beats from ``index`` on can generate the text from ``at`` to its end."""
        if index == len(beats):
            return at == len(text) + 1
        beat = beats[index]
        for template in beat.templates:
            for end, then in self._match(template, text, at, bound):
                if text[end : end + 1] in ("", " ") and self._walk(
                    beats, index + 1, text, end + 1, then
                ):
                    return True
        return beat.keep < 1 and self._walk(beats, index + 1, text, at, bound)

    def _match(
        self, parts: tuple[str | Slot, ...], text: str, at: int, bound: Bindings
    ) -> Iterator[tuple[int, Bindings]]:
        """Every way to parse the parts at this position: where it ends, and what it binds."""
        if not parts:
            yield at, bound
            return
        part, rest = parts[0], parts[1:]
        if isinstance(part, str):
            if text.startswith(part, at):
                yield from self._match(rest, text, at + len(part), bound)
            return
        if needed := self._needed(part, bound):
            for option in self._options(needed, bound):
                yield from self._match(parts, text, at, {**bound, needed: option})
            return
        known = self._value(part, bound)
        for value in self._options(part.name, bound) if known is None else [known]:
            written = part.write(value)
            if text.startswith(written, at):
                then = bound if known is not None else {**bound, part.name: value}
                yield from self._match(rest, text, at + len(written), then)

    def strange_sentences(self, text: str) -> list[str]:
        """The sentences of the text that are in no story of this grammar.

        Each sentence is checked alone; ``is_story`` checks that names and objects agree between
        sentences.
        """
        if not self._sentences:
            self._sentences = self._patterns()
        pieces = SENTENCE_START.split(text)
        strange: list[str] = []
        at = 0
        while at < len(pieces):
            for size in (4, 3, 2, 1):
                run = " ".join(pieces[at : at + size])
                if any(pattern.fullmatch(run) for pattern in self._sentences):
                    at += size
                    break
            else:
                strange.append(pieces[at])
                at += 1
        return strange

    def _patterns(self) -> list[re.Pattern[str]]:
        """Write every template as a pattern in which each slot may hold any of its values."""
        patterns: set[str] = set()
        for (voice, plot), beats in self._plots.items():
            fixed = {"name": NAMES[0], "voice": voice, "plot": plot}
            for beat in beats:
                for template in beat.templates:
                    patterns.add("".join(self._pattern(part, fixed) for part in template))
        return [re.compile(pattern) for pattern in sorted(patterns)]

    def _pattern(self, part: str | Slot, fixed: Bindings) -> str:
        """Write one part of a template as a pattern."""
        if isinstance(part, str):
            return re.escape(part)
        values: set[str] = set()
        if part.name in ("name", "friend"):
            values.update(NAMES)
        elif part.name == "place":
            values.update(self._places[fixed["plot"]])
        elif part.name in self._slots:
            options = self._slots[part.name]["options"]
            tables = [options] if isinstance(options, list) else options.values()
            values.update(value for table in tables for value in table)
        else:
            values.update(_derivable(fixed["voice"])[part.name])
        return "(?:" + "|".join(sorted(re.escape(part.write(value)) for value in values)) + ")"
