"""Every option of charlm, with its default, limits and docstring.

Progress, in all schedules, is the fraction of `train.steps` that is completed: a float in [0, 1].
"""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from charlm.config.data import DataConfig, TextConfig
from charlm.config.errors import ConfigError, Stopped, UserError
from charlm.config.model import ModelConfig
from charlm.config.objective import (
    AuxConfig,
    HedgeConfig,
    LayersConfig,
    PositionsConfig,
    TargetsConfig,
    count_of,
)
from charlm.config.run import RunConfig, TrackerName
from charlm.config.train import AttentionBackend, CrossEntropyBackend, TrainConfig, steps_of
from charlm.config.types import Mark, Precision, Section


class Config(Section):
    """All options of a run."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = ModelConfig()
    aux: AuxConfig = AuxConfig()
    train: TrainConfig = TrainConfig()
    run: Annotated[RunConfig, Mark.MAY_CHANGE, Mark.NO_EFFECT] = RunConfig()

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        layers, num_layers = self.aux.layers, self.model.num_layers
        named = {
            "aux.layers.at": layers.at or (),
            "aux.layers.weights": layers.weights if isinstance(layers.weights, dict) else (),
            "aux.tasks": [task.layer for task in self.aux.tasks.values()],
        }
        for option, depths in named.items():
            for depth in depths:
                if isinstance(depth, int) and not 1 <= depth <= num_layers:
                    text = f"there is no layer {depth} of model.num_layers={num_layers}"
                    raise self.mistake(option, text, "model.num_layers")
        if layers.enabled:
            for option, problem in layers.errors_for_depth(num_layers):
                raise self.mistake(f"aux.layers.{option}", problem, "model.num_layers")
        heads, weights = layers.intermediate(num_layers), layers.weights
        weights = weights.values() if isinstance(weights, dict) else weights or [layers.weight] * len(heads)
        weighed = sum(weight > 0 for weight in (*(weights if heads else ()), self.aux.main_weight))
        if self.aux.hedge.enabled and weighed < 2:
            text = "weighs layers against each other; give another a head (aux.layers)"
            raise self.mistake("aux.hedge.enabled", text, "model.num_layers", "aux.layers.enabled")
        return self


def flatten(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    """The leaves of nested dicts by their path: {"a": {"b": 1}} becomes {"a.b": 1}."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{name}{separator}{path}": leaf for path, leaf in flatten(value, separator).items()}
        else:
            leaves[name] = value
    return leaves


def differences(a: Section, b: Section) -> dict[str, tuple[Any, Any]]:
    """The options in which two configs differ, with both values (None if one lacks it)."""
    before, after = flatten(a.model_dump(), "."), flatten(b.model_dump(), ".")
    pairs = {name: (before.get(name), after.get(name)) for name in before | after}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def has_mark(name: str, mark: Mark) -> bool:
    """Whether an option, or its section, has a mark; data.mixture.NAME.path has that of data.path."""
    section, *_, option = name.split(".")
    field = Config.model_fields[section]
    own_field = field.annotation.model_fields.get(option, field)
    return mark in (*field.metadata, *own_field.metadata)
