"""The base class of all options, number types with limits, and marks for options."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from charlm.config.errors import ConfigError, did_you_mean, first_line, shown
from charlm.text import visible

MAX_YAML, MAX_ALIASES = 2**16, 10  # characters that take a second to read
NULLS = ("null", "none", "~", "")
MESSAGES = {
    "missing": "is missing",
    "extra_forbidden": "unknown option",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "path_type": "should be a path",
    "bool_parsing": "should be true or false",
}
"""Our messages for pydantic's types of errors."""
UNION_MEMBER = re.compile(r"int|list|mapping|.*\[.*\]")  # pydantic's names, in a location


class Mark(Enum):
    """A property of an option, in the `Annotated` of its type."""

    MAY_CHANGE = "a resumed run may change the option"
    NO_EFFECT = "the option does not affect what a run learns"
    ESCAPES = "a flag may contain escapes such as \\n"


class Section(BaseModel):
    """A group of options, frozen. Help prints the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], places: Mapping[str, str] = {}) -> Self:
        """A section of these values. Raises ConfigError, with the file and line of each fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(cls, error, places) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`. Raises ConfigError for values that cannot work."""
        return self.read(dict(self) | changes)

    def mistake(self, option: str, text: str, *others: str) -> PydanticCustomError:
        """The error of a check of `option`; `others` are further options in `text`."""
        value = [attrgetter(option)(self)]  # in a list: pydantic cannot render a str that is not UTF-8
        context = {"option": option, "value": value, "others": others}
        return PydanticCustomError("mistake", text, context)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Turn text into null, a list or a mapping if the option may be one."""
        field = cls.model_fields[info.field_name]
        kinds = parts_of(field.annotation)
        if isinstance(value, str):
            if NoneType in kinds and value.strip().lower() in NULLS:
                return None
            if (tuple in kinds or dict in kinds) and value.lstrip()[:1] in ("[", "{"):
                return read_yaml(value)
        if tuple in kinds and isinstance(value, (str, int, float)):  # brackets may be left out
            text = str(value).strip().removesuffix(",")
            value = [item.strip() for item in text.split(",")] if text else []
        if Path in kinds and str(value) != str(field.get_default(call_default_factory=True)):
            return list(map(expanded, value)) if isinstance(value, (list, tuple)) else expanded(value)
        return value


def expanded(path: Any) -> Any:
    """A path with the home folder for `~`. Raises ValueError if it is none, or there is none."""
    if not isinstance(path, (str, Path)):
        return path
    if not str(path) or b"\0" in os.fsencode(path):
        raise ValueError("should be a path")
    found = Path(os.path.expanduser(path))
    if str(path).startswith("~") and not found.is_absolute():
        raise ValueError("there is no such home folder; give a full path, or set HOME")
    return found.absolute() if str(found).startswith("~") else found  # from ./~, which pathlib shortens


@cache
def parts_of(annotation: Any) -> list[Any]:
    """The types in a type: tuple, int and NoneType in `tuple[int, ...] | None`."""
    parts = [get_origin(annotation) or annotation]
    for argument in get_args(annotation):
        parts += parts_of(argument)
    return parts


@cache
def sections_of(kind: type[Section], name: str = "") -> dict[str, type[Section]]:
    """A section, named "", and the sections in it, by dotted name."""
    found = {name: kind}
    for field, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found |= sections_of(info.annotation, f"{name}.{field}".lstrip("."))
    return found


@cache
def options_of(kind: type[Section]) -> dict[str, FieldInfo]:
    """The options in a section, by dotted name: all fields with a docstring."""
    return {
        f"{section}.{name}".lstrip("."): info
        for section, part in sections_of(kind).items()
        for name, info in part.model_fields.items()
        if info.description
    }


def _config_error(kind: type[Section], error: ValidationError, places: Mapping[str, str]) -> ConfigError:
    """All faults in the values of a `kind`, in one message."""
    options, names = options_of(kind), []
    lines: dict[tuple[str, str], list[str]] = {}
    for fault in error.errors(include_url=False)[:20]:  # looking for similar names takes time
        location, value, others = _place_of(fault)
        name = next((option for option in options if f"{location}.".startswith(f"{option}.")), location)
        names.append(name)
        text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        text = MESSAGES.get(fault["type"], text.partition(", unable to")[0])
        if fault["type"] not in ("missing", "extra_forbidden"):
            location += f"={shown(value)}"
        elif name not in options:
            text += did_you_mean(location, [*options, *sections_of(kind)]) or "; docs/configuration.md has all"
        set_in = [f"\n  {one} is set in {places[one]}" for one in (name, *others) if places.get(one)]
        lines.setdefault((location, "".join(set_in)), []).append(text)
    message = [f"{location}: {', or '.join(texts)}{set_in}" for (location, set_in), texts in lines.items()]
    return ConfigError("\n".join(message), names[0])


def _place_of(fault: ErrorDetails) -> tuple[str, Any, list[str]]:
    """The dotted name of a value at fault, the value, and other options in the message."""
    location, value, others = fault["loc"], fault["input"], []
    if fault["type"] == "mistake":
        mistake = fault["ctx"]
        others = [".".join(map(str, [*location, other])) for other in mistake["others"]]
        location, (value,) = (*location, mistake["option"]), mistake["value"]
    keys = [str(key) for key in location if not UNION_MEMBER.fullmatch(str(key))]
    return ".".join(keys), value, others


class Lines(dict):
    """A mapping in a YAML file, with the line of each key."""

    lines: dict[str, int]


class _TextLoader(yaml.BaseLoader):
    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:  # nested ones could stand for a billion values
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="too many aliases", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Lines:
        mapping = Lines(super().construct_mapping(node, deep=True))
        mapping.lines = {}
        for key, value in node.value:
            if key.value in mapping.lines:
                problem = f"{key.value} is set twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            mapping.lines[key.value] = key.start_mark.line + 1
            if value.value == "null" and value.style is None:  # without quotes
                mapping[key.value] = None
        return mapping


def read_yaml(text: str) -> Any:
    """Read YAML as text, lists and mappings. Raises ValueError, also for a key set twice."""
    if len(text) > MAX_YAML:
        raise ValueError(f"has more than {MAX_YAML:,} characters")
    try:
        return _TextLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"is not valid YAML{line}: {visible(problem or first_line(error))}") from None


def _whole(value: Any) -> Any:
    """Accept text such as 1e6 as a whole number, and refuse true and false."""
    if isinstance(value, bool):
        raise ValueError("should be a valid integer")
    with suppress(ValueError):
        if isinstance(value, str) and "e" in value.lower() and float(value).is_integer():
            value = int(float(value))
    if isinstance(value, int | str) and len(str(value)) > 19:
        raise ValueError("should have at most 19 digits")  # torch counts in 64 bits
    return value


def seconds_of(duration: str) -> int:
    """A duration such as 1d3h50m10s in seconds. Raises ValueError."""
    pattern = r"(?:(\d{1,5})d)?(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,9})s)?"
    match = re.fullmatch(pattern, duration)
    days, hours, minutes, seconds = map(int, match.groups("0")) if match else [0] * 4
    total = seconds + 60 * (minutes + 60 * (hours + 24 * days))
    if total == 0:
        raise ValueError("must be a time like 1d3h50m10s")
    return total


# In `Annotated`, limits precede the function; else the JSON schema, from which help is made, lacks them.
Whole = BeforeValidator(_whole)
Index = Annotated[int, Field(ge=0), Whole]
Count = Annotated[int, Field(ge=1), Whole]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Duration = Annotated[str, AfterValidator(lambda duration: seconds_of(duration) and duration)]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(lambda word: "fp32" if word == "no" else word)]
"""Precision of matrix products; `no` is accelerate's word for fp32."""
