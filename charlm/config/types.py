"""The base of all options: a frozen pydantic model that refuses unknown names, number types with limits, and marks."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from charlm.config.errors import ConfigError, did_you_mean, first_line, shown

NULLS = ("null", "none", "~", "")
MESSAGES = {
    "missing": "is missing",
    "extra_forbidden": "is no option",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "bool_parsing": "should be true or false",
}
"""Our message for each type of error of pydantic's."""
UNION_MEMBER = re.compile(r"int|list|mapping|.*\[.*\]")  # pydantic's names for members of a union, in a location


class Mark(Enum):
    """A property of an option; stands in the `Annotated` of its type."""

    MAY_CHANGE = "a resumed run may set the option anew"
    NO_EFFECT = "the option does not affect what a run learns"


class Section(BaseModel):
    """A group of options. Help and docs/configuration.md print the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], places: Mapping[str, str] = {}) -> Self:
        """A section of these values. Raises ConfigError; `places` has the file and line that set an option."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(cls, error, places) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`. Raises ConfigError for values that cannot work."""
        return self.read(dict(self) | changes)

    def mistake(self, option: str, text: str, *others: str) -> PydanticCustomError:
        """The error to raise in a check for the value of `option`; `others` are options that the text names, too."""
        value = reduce(getattr, option.split("."), self)
        return PydanticCustomError("mistake", text, {"option": option, "value": value, "others": others})

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Read the text of a flag or YAML file: as null, a list or a mapping, else leave it as it is."""
        kinds = parts_of(cls.model_fields[info.field_name].annotation)
        if isinstance(value, str):
            if NoneType in kinds and value.strip().lower() in NULLS:
                return None
            if Path in kinds and (not value or b"\0" in os.fsencode(value)):
                raise ValueError("should be a path")
            if (tuple in kinds or dict in kinds) and value.lstrip()[:1] in ("[", "{"):
                return read_yaml(value)
        if tuple in kinds and isinstance(value, (str, int, float)):  # a list may go without its brackets
            return [item.strip() for item in value.split(",")] if isinstance(value, str) else [value]
        return value


@cache
def parts_of(annotation: Any) -> list[Any]:
    """The types that a type is made of: of `tuple[int, ...] | None`, tuple and int and NoneType among others."""
    return [get_origin(annotation) or annotation, *(part for one in get_args(annotation) for part in parts_of(one))]


@cache
def sections_of(kind: type[Section], name: str = "") -> dict[str, type[Section]]:
    """A section and those inside of it, by dotted name; its own is ""."""
    found = {name: kind}
    for field, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found |= sections_of(info.annotation, f"{name}.{field}".lstrip("."))
    return found


@cache
def options_of(kind: type[Section]) -> dict[str, FieldInfo]:
    """The options of a section and of those inside of it, by dotted name: every field that has a docstring."""
    return {
        f"{section}.{name}".lstrip("."): info
        for section, part in sections_of(kind).items()
        for name, info in part.model_fields.items()
        if info.description
    }


def _config_error(kind: type[Section], error: ValidationError, places: Mapping[str, str]) -> ConfigError:
    """All that is wrong with the values of a `kind`, in one message."""
    options, names = options_of(kind), []
    lines: dict[tuple[str, str], list[str]] = {}
    for part in error.errors(include_url=False):
        location, value, others = part["loc"], part["input"], []
        if part["type"] == "mistake":
            others = [".".join(map(str, [*location, other])) for other in part["ctx"]["others"]]
            location, value = (*location, part["ctx"]["option"]), part["ctx"]["value"]
        place = ".".join(str(key) for key in location if not UNION_MEMBER.fullmatch(str(key)))
        names.append(next((option for option in options if f"{place}.".startswith(f"{option}.")), place))
        text = part["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to")[0]
        text = MESSAGES.get(part["type"], text)
        if part["type"] not in ("missing", "extra_forbidden"):
            place += f"={shown(value)}"
        elif names[-1] not in options:
            text += did_you_mean(place, [*options, *sections_of(kind)])
        set_in = [f"\n  {name} is set in {places[name]}" for name in (names[-1], *others) if places.get(name)]
        lines.setdefault((place, "".join(set_in)), []).append(text)
    message = "\n".join(f"{place}: {', or '.join(texts)}{set_in}" for (place, set_in), texts in lines.items())
    return ConfigError(message, names[0])


class Lines(dict):
    """A mapping of a YAML file; `lines` has the line of each key."""

    lines: dict[str, int]


class _TextLoader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Lines:
        mapping = Lines(super().construct_mapping(node, deep=True))
        mapping.lines = {}
        for key, _ in node.value:
            if key.value in mapping.lines:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            mapping.lines[key.value] = key.start_mark.line + 1
        return mapping


def read_yaml(text: str) -> Any:
    """Text, lists and mappings of YAML: no numbers, no tags, no key twice. Raises ValueError."""
    try:
        return _TextLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"is not valid YAML{line}: {problem or first_line(error)}") from None


def _whole(value: Any) -> Any:
    """1e6 is a whole number as text, too; true is none."""
    if isinstance(value, bool):
        raise ValueError("should be a valid integer")
    with suppress(ValueError):
        if isinstance(value, str) and "e" in value.lower() and float(value).is_integer():
            return int(float(value))
    return value


# Limits come before the function: behind it the JSON schema, which help is made from, would lack them.
Whole = BeforeValidator(_whole)
Index = Annotated[int, Field(ge=0), Whole]
Count = Annotated[int, Field(ge=1), Whole]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(lambda word: "fp32" if word == "no" else word)]
"""Precision of matrix products. `no`, accelerate's word for fp32, is understood as well."""
