"""What each config field means, allows and defaults to, read off the dataclasses: for `--help` and for errors."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter

from vlarl_ray.config import ExperimentConfig


@dataclass(frozen=True)
class FieldDoc:
    """One field of the config, as a user sees it."""

    path: str
    """`section.field`, as in a preset and on the command line."""
    sentence: str
    allowed: str
    """What values it takes, in words."""
    default: Any
    is_text: bool
    """Whether a bare word on the command line is its value as it stands."""
    is_list: bool = False
    """Whether it takes a list (too)."""


@functools.cache
def field_docs() -> Mapping[str, FieldDoc]:
    """Describe every leaf field of `ExperimentConfig`, by dotted path, in declaration order."""
    schema = TypeAdapter(ExperimentConfig).json_schema()
    docs: dict[str, FieldDoc] = {}
    _collect(schema, schema["$defs"], ExperimentConfig(), "", docs)
    return docs


def section_sentences() -> Mapping[str, str]:
    """First line of each section's docstring, by dotted path (`""` is the top level)."""
    sentences = {"": (ExperimentConfig.__doc__ or "").strip()}

    def visit(config: Any, prefix: str) -> None:
        for member in fields(config):
            value = getattr(config, member.name)
            if is_dataclass(value):
                sentences[prefix + member.name] = (type(value).__doc__ or "").strip().splitlines()[0]
                visit(value, f"{prefix}{member.name}.")

    visit(ExperimentConfig(), "")
    return sentences


def format_fields() -> str:
    """Lay out every field with its allowed values, default and sentence, for `--help`."""
    sections: dict[str, list[FieldDoc]] = {}
    for doc in field_docs().values():
        sections.setdefault(doc.path.rpartition(".")[0], []).append(doc)
    sentences = section_sentences()
    lines = []
    for section, members in sections.items():
        lines.append(f"\n{section or 'run'}: {sentences[section]}")
        for doc in members:
            lines.append(f"  --{doc.path}  ({doc.allowed}; default {format_value(doc.default)})")
            lines.extend(textwrap.wrap(doc.sentence, 110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """Write a value the way a preset would.

    Example:
        >>> format_value(None), format_value(True), format_value((1, "a")), format_value("x")
        ('null', 'true', '[1, a]', 'x')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    return str(value)


def _collect(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], config: Any, prefix: str, docs: dict[str, FieldDoc]
) -> None:
    for name, entry in schema["properties"].items():
        value = getattr(config, name)
        path = prefix + name
        if is_dataclass(value):
            _collect(definitions[entry["$ref"].rpartition("/")[2]], definitions, value, f"{path}.", docs)
            continue
        kinds = [option.get("type") for option in entry.get("anyOf", [entry])]
        docs[path] = FieldDoc(path, entry["description"], _allowed(entry), value, "string" in kinds, "array" in kinds)


def _allowed(entry: Mapping[str, Any]) -> str:
    """Put one JSON-schema type into words."""
    if "anyOf" in entry:
        return " or ".join(_allowed(option) for option in entry["anyOf"])
    if "enum" in entry:
        return "one of " + ", ".join(entry["enum"])
    kind = entry.get("type")
    if kind in ("integer", "number"):
        return f"{'an integer' if kind == 'integer' else 'a number'}{_range(entry)}"
    if kind == "array":
        if "prefixItems" in entry:
            return "a list [" + ", ".join(_allowed(item) for item in entry["prefixItems"]) + "]"
        return f"a list, each {_allowed(entry['items'])}"
    words = {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}
    return words[str(kind)] + (", not empty" if entry.get("minLength") else "")


def _range(entry: Mapping[str, Any]) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " and".join(f" {sign} {entry[key]}" for key, sign in bounds.items() if key in entry)
