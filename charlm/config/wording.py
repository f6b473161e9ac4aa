"""Options in words: what may be written for one, and what is wrong with a value."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from charlm.config.errors import ConfigError, Mistake

NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true|false", "null": "null"}
LOWER, UPPER = {"minimum": "[", "exclusiveMinimum": "("}, {"maximum": "]", "exclusiveMaximum": ")"}
MESSAGES = {
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "missing": "is missing",
    "extra_forbidden": "is no option",
}
"""What is said in place of pydantic's own message for its type of error."""


def in_words(schema: dict[str, Any]) -> str:
    """What may be written for a value of this JSON schema."""
    match schema:
        case {"title": "layer"}:
            return "layer"
        case {"anyOf": members} | {"oneOf": members}:
            return " or ".join(map(in_words, members))
        case {"enum": words}:
            return "|".join(words)
        case {"const": word}:
            return word
        case {"format": "path"}:
            return "path"
        case {"type": "array", "prefixItems": items}:
            return f"[{', '.join(map(in_words, items))}]"
        case {"type": "array", "items": item}:
            return f"[{in_words(item)}, ...]"
        case {"type": "object", "propertyNames": name, "additionalProperties": item}:
            return f"{{{in_words(name)}: {in_words(item)}, ...}}"
        case {"type": "object", "additionalProperties": item}:
            return f"{{name: {in_words(item)}, ...}}"
        case {"$ref": reference}:
            return reference.rpartition("/")[2].removesuffix("Config").lower()
    return NAMES[schema["type"]] + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    lower = next((f"{bracket}{schema[limit]:g}" for limit, bracket in LOWER.items() if limit in schema), "")
    upper = next((f"{schema[limit]:g}{bracket}" for limit, bracket in UPPER.items() if limit in schema), "")
    if lower and upper:
        return f" in {lower}, {upper}"
    return f" {'>' if lower[0] == '(' else '>='} {lower[1:]}" if lower else ""


def words_of(schema: dict[str, Any]) -> list[str]:
    """The words that may be written for a value of this JSON schema."""
    words = ["true", "false"] if schema.get("type") == "boolean" else schema.get("enum", [])
    words = [*words, schema["const"]] if "const" in schema else words
    parts = schema.get("anyOf", [schema["items"]] if "items" in schema else [])
    return [*words, *(word for part in parts for word in words_of(part))]


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself; without what `Annotated` says of them."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in members_of(part))
    return (annotation,)


def config_error(
    kind: type[BaseModel], error: ValidationError, places: Mapping[str, str] = {}, options: Iterable[str] = ()
) -> ConfigError:
    """All that is wrong with the values of a `kind`, in one message.

    Args:
        kind: the model that was validated.
        error: what pydantic found.
        places: the file and line that set each option.
        options: names to look for similar ones of an unknown name in.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    names = []
    for name, part, text, others in _mistakes(kind, error):
        if text == MESSAGES["extra_forbidden"] and name == part:
            text += did_you_mean(name, options)
        set_in = [f"\n  {one} is set in {places[one]}" for one in (name, *others) if places.get(one)]
        lines.setdefault((part, "".join(set_in)), []).append(text)
        names.append(name)
    message = "\n".join(f"{part}: {', or '.join(texts)}{set_in}" for (part, set_in), texts in lines.items())
    return ConfigError(message, names[0])


def _mistakes(kind: type[BaseModel], error: ValidationError) -> Iterator[tuple[str, str, str, list[str]]]:
    """Of each: the option, the part of it that is wrong with its value, what is wrong, and other options at fault."""
    for part in error.errors(include_url=False):
        location, value, others = part["loc"], part["input"], []
        if isinstance(mistake := part.get("ctx", {}).get("error"), Mistake):
            section = "".join(f"{key}." for key in location)
            location, value = (*location, *mistake.option.split(".")), mistake.value
            others = [f"{section}{name}" for name in mistake.others]
        path, inside = _split(kind, location)
        text = MESSAGES.get(part["type"], part["msg"].removeprefix("Value error, ").removeprefix("Input "))
        shown_value = "" if part["type"] in ("missing", "extra_forbidden") else f"={shown(value)}"
        yield ".".join(path), ".".join([*path, *inside]) + shown_value, text, others


def _split(kind: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The name of the option at an error's location, and the place inside of its value."""
    path: list[str] = []
    inside = [str(part) for part in location if part != "[key]"]
    while inside and isinstance(kind, type) and issubclass(kind, BaseModel):
        path.append(inside.pop(0))
        kind = kind.model_fields[path[-1]].annotation if path[-1] in kind.model_fields else None
    is_union = len([member for member in members_of(kind) if member is not NoneType]) > 1
    return path, inside[1:] if is_union else inside  # of a union pydantic names the member first


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
