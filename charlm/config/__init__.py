"""Every option of charlm: frozen dataclasses, one docstring per field.

`Config` is what YAML files and command-line flags fill (see `charlm.cli`) and what a run keeps as `config.yaml`.
A value that cannot work raises `ConfigError` here, before anything heavy is imported: this module imports nothing
of ours and no torch.

Progress, in every schedule, is the number of completed optimizer steps divided by `train.steps`: a float in [0, 1].
"""

from dataclasses import dataclass, field
from typing import Any

from charlm.config.data import DataConfig
from charlm.config.errors import ConfigError, Stopped, UserError
from charlm.config.model import ModelConfig
from charlm.config.objective import (
    AuxConfig,
    Depth,
    HedgeConfig,
    LayersConfig,
    PositionsConfig,
    Stage,
    TargetsConfig,
    TaskConfig,
    layer_at,
)
from charlm.config.run import RunConfig, TrackerName
from charlm.config.train import AttentionBackend, CrossEntropyBackend, TrainConfig, steps_of

__all__ = [
    "AttentionBackend",
    "AuxConfig",
    "Config",
    "ConfigError",
    "CrossEntropyBackend",
    "DataConfig",
    "Depth",
    "HedgeConfig",
    "LayersConfig",
    "ModelConfig",
    "PositionsConfig",
    "RunConfig",
    "Stage",
    "Stopped",
    "TargetsConfig",
    "TaskConfig",
    "TrackerName",
    "TrainConfig",
    "UserError",
    "flatten",
    "layer_at",
    "steps_of",
]


def flatten(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    """The leaves of nested dicts by their path: {"a": {"b": 1}} becomes {"a.b": 1}."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{name}{separator}{path}": leaf for path, leaf in flatten(value, separator).items()}
        else:
            leaves[name] = value
    return leaves


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: what a YAML file and flags describe, and what `RUN/config.yaml` records."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    aux: AuxConfig = field(default_factory=AuxConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        for name, value, way_out in self.aux.problems(self.model.num_layers):
            raise ConfigError(f"{name}={value}: {way_out}")
