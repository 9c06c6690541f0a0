"""The rules of the dump format, by name: what `docs/dump-format.md` says a dump MUST be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from qeff_proxy.common.json_schema import parse_strictly
from qeff_proxy.errors import DumpError

# Rule -> what it asks. The page of the specification has one paragraph for each.
RULES = {
    "COMPLETE": "a folder with a regular file manifest.json is a dump; another is incomplete",
    "JSON": "the manifest is strict UTF-8 JSON: no duplicate key, NaN or Infinity",
    "VERSION": "format is qeff-proxy-dump, version is 1 and byte_order is little",
    "FIELDS": "every field is there, of its type, and no other",
    "STEPS": "steps are unique, and their numbers rise",
    "NAME": "a tensor's name is canonical, and its components agree with it",
    "UNIQUE": "no two entries of a phase have one name, whatever the case of their letters",
    "FILE": "a tensor's file is <phase>/<name>.npy",
    "DTYPE": "dtype is a known one and stored is how it is stored",
    "SHAPE": "a shape has at most 8 dimensions and 2**48 elements",
    "RECORDS": "the records of a file are steps of its phase, rising, each with shape and checksum",
    "KV": "delta records are [batch, heads, rows, size] of steps whose past_length is known",
    "REGULAR": "a tensor's file is a regular file, not a link",
    "HEADER": "a file's .npy header is the canonical one of its stored dtype and shape",
    "SIZE": "a file holds its header and its records, and not a byte more or less",
    "CHECKSUM": "the bytes of a record have the CRC-32 of the manifest",
}


class BrokenRuleError(DumpError):
    """A dump that is not what the specification says.

    Attributes:
        rule: The name of the rule it breaks, a key of `RULES`.
    """

    def __init__(self, rule: str, problem: str) -> None:
        super().__init__(f"{problem} [rule {rule}: {RULES[rule]}]")
        self.rule = rule


def refuse(rule: str, problem: str) -> NoReturn:
    """Raise `BrokenRuleError`."""
    raise BrokenRuleError(rule, problem)


def parse_json(data: bytes, path: Path) -> Any:
    """Return the JSON document in ``data``, read strictly.

    Raises:
        BrokenRuleError: It is not UTF-8, not JSON, or repeats a key (rule ``JSON``).
    """
    try:
        return parse_strictly(data)
    except ValueError as error:
        refuse("JSON", f"{path} is not strict JSON: {error}")
