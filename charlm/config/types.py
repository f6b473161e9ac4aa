"""What options share: a frozen pydantic model that knows no other names, numbers with their limits, and marks."""

import os
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from charlm.config.errors import Mistake
from charlm.config.wording import config_error, members_of

NULLS = ("null", "none", "~", "")


class Mark(Enum):
    """What an option says about itself; stands in the `Annotated` of its type."""

    MAY_CHANGE = "a resumed run may set the option anew"
    NO_EFFECT = "the option does not affect what a run learns"


@dataclass(frozen=True)
class Formerly:
    """The name that an option had in older versions; it is still understood."""

    name: str


class _RaisesConfigError(type(BaseModel)):
    """The class of sections: building one from wrong values raises ConfigError in place of pydantic's error."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise config_error(cls, error) from None


class Section(BaseModel, metaclass=_RaisesConfigError):
    """A group of options. Help and docs/configuration.md print the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`. Raises ConfigError for values that cannot work."""
        return type(self)(**dict(self) | changes)

    def mistake(self, option: str, text: str, *others: str) -> Mistake:
        """The error to raise for the value of `option`; `others` are options that the text names, too."""
        return Mistake(option, getattr(self, option), text, others)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        """What the text of a flag or of a YAML file stands for: null, a list, a mapping, else itself."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if isinstance(value, str):
            if NoneType in kinds and value.strip().lower() in NULLS:
                return None
            if Path in kinds and (not value or b"\0" in os.fsencode(value)):
                raise ValueError("should be a path")
            if {tuple, dict} & kinds and value.lstrip()[:1] in ("[", "{"):
                return _from_yaml(value)
        if tuple in kinds and isinstance(value, (str, int, float)):  # a list may go without its brackets
            return [item.strip() for item in value.split(",")] if isinstance(value, str) else [value]
        return value


@cache
def _kinds(annotation: Any) -> set[Any]:
    """The types of a field, with tuple and dict for those of any content."""
    return {get_origin(member) or member for member in members_of(annotation)}


def _from_yaml(text: str) -> Any:
    try:
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not valid YAML: {getattr(error, 'problem', None) or 'nested too deeply'}") from None


def read_yaml(text: str) -> Any:
    """The text, lists and mappings of a YAML document. Raises YAMLError, or RecursionError."""
    return TextLoader(text).get_single_data()


class Lines(dict):
    """A mapping of a YAML file; `lines` has the line of each key."""

    lines: dict[str, int]


class TextLoader(yaml.BaseLoader):
    """Reads text, lists and mappings: no numbers, no tags, no key twice. The options' types do the rest."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Lines:
        mapping = Lines(super().construct_mapping(node, deep=True))
        mapping.lines = {}
        for key, _ in node.value:
            if key.value in mapping.lines:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            mapping.lines[key.value] = key.start_mark.line + 1
        return mapping


def _whole(value: Any) -> Any:
    """1e6 is a whole number as text, too; true is none."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str) and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _precision(value: Any) -> Any:
    return "fp32" if value == "no" else value


# Limits come before the function: behind it the JSON schema, which help is made from, would lack them.
Whole = BeforeValidator(_whole)
Index = Annotated[int, Field(ge=0), Whole]
Count = Annotated[int, Field(ge=1), Whole]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_precision)]
"""Precision of matrix products. `no`, accelerate's word for fp32, is understood as well."""
