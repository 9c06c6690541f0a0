"""What a report tells of the runs that it compares: input, output, versions, options, date."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_proxy.compare.results import Comparison

#: How many inputs are shown, and how many letters of a long prompt.
_SHOWN, _SHOWN_LETTERS = 4, 200
_LIBRARIES = ("torch", "transformers", "onnx")


def facts_of_dumps(comparison: Comparison) -> dict[str, str]:
    """The facts of a comparison of two dumps, as far as their provenance tells them."""
    facts: dict[str, str] = {}
    for label, made in (
        ("reference", comparison.reference_provenance),
        ("candidate", comparison.candidate_provenance),
    ):
        facts[f"{label}: input"] = described_texts(made.get("prompts"))
        facts[f"{label}: precision"] = str(made.get("dtype") or "")
        facts[f"{label}: options"] = described_options(made.get("options"))
        facts[f"{label}: versions"] = described_versions(made.get("made_by"), made.get("versions"))
    return {name: text for name, text in {**facts, "date": today()}.items() if text}


def today() -> str:
    """The date and time, in UTC."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def described_options(options: Any) -> str:
    """``num_cores=2, soc=SM8650``: the compile options that are set, and those of one backend."""
    if not isinstance(options, Mapping):
        return ""
    own = options.get("backend")
    plain = {name: value for name, value in options.items() if name != "backend"}
    both = {**plain, **(own if isinstance(own, Mapping) else {})}
    return ", ".join(f"{name}={value}" for name, value in both.items() if value is not None)


def described_versions(made_by: Any, backend: Any) -> str:
    """``torch 2.13.0, transformers 5.23.0, onnxruntime 1.32.0``, each once."""
    known = {
        name: made_by[name]
        for name in ("qeff-proxy", *_LIBRARIES)
        if isinstance(made_by, Mapping) and name in made_by
    }
    known |= backend if isinstance(backend, Mapping) else {}
    return ", ".join(f"{name} {version}" for name, version in known.items())


def described_input(inputs: Mapping[str, Any]) -> str:
    """Prompts, files and shapes in one line, of an input as JSON values."""
    shown = [repr(shortened(prompt, _SHOWN_LETTERS)) for prompt in inputs.get("prompts", ())]
    shown += [str(item) for kind in ("audio", "images") for item in inputs.get(kind, ())]
    for name in sorted(inputs.keys() - {"prompts", "audio", "images", "new_tokens"}):
        value = inputs[name]
        shown.append(f"{name} {[len(value), len(value[0])] if name == 'input_ids' else value}")
    return _listed(shown)


def described_texts(decoded: Any) -> str:
    """The texts in a decoded output, or the labels that it names, quoted."""
    return _listed([repr(text) for text in _texts_in(decoded)])


def shortened(text: str, letters: int) -> str:
    """``text``, or its first letters."""
    return text if len(text) <= letters else f"{text[:letters]}…"


def _listed(shown: list[str]) -> str:
    """The first items, and how many more there are."""
    more = len(shown) - _SHOWN
    listed = ", ".join(shown[:_SHOWN])
    return f"{listed} and {more} more" if more > 0 else listed


def _texts_in(decoded: Any) -> Iterator[str]:
    if isinstance(decoded, dict):
        decoded = decoded.get("label", decoded.get("texts"))
    if isinstance(decoded, str):
        yield decoded
    elif isinstance(decoded, list):
        for one in decoded:
            yield from _texts_in(one)
