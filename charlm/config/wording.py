"""Options in words: what may be written for one, and how values are shown."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

NAMES = {"integer": "INTEGER", "number": "NUMBER", "string": "TEXT", "boolean": "true | false", "null": "null"}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def in_words(schema: dict[str, Any]) -> str:
    """Spell out what a JSON schema allows: words in lower case as they are, kinds in capitals."""
    match schema:
        case {"title": ("layer" | "name") as kind}:
            return kind.upper()
        case {"anyOf": members} | {"oneOf": members}:
            return " | ".join(map(in_words, members))
        case {"enum": words}:
            return " | ".join(words)
        case {"const": word}:
            return word
        case {"format": "path"}:
            return "PATH"
        case {"prefixItems": items}:
            return f"[{', '.join(map(in_words, items))}]"
        case {"items": item}:
            return f"[{in_words(item)}, ...]"
        case {"type": "object", "additionalProperties": item}:
            return f"{{{in_words(schema.get('propertyNames', {'title': 'name'}))}: {in_words(item)}, ...}}"
        case {"$ref": reference}:
            return reference.rpartition("/")[2].removesuffix("Config").upper()
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in LIMITS.items() if limit in schema]
    return f"{NAMES[schema['type']]} {', '.join(limits)}".rstrip()


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: similar ones, if there are any."""
    found = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def written(value: Any) -> str:
    """A value as it is written in a config file, on one line."""
    if isinstance(value, str) and value.isprintable():
        return value
    text = json.dumps(value, ensure_ascii=False, default=lambda v: dict(v) if isinstance(v, BaseModel) else str(v))
    return text.replace('"', "")


def shown(value: Any) -> str:
    """A value as it is written in a config file, cut where it is long."""
    text = written(value)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text):,} characters)"
