"""The dimensions of the measured models, and charlm's config for them. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm.config import AuxConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig, UserError

VOCABULARY = 256
DIMENSIONS = ("num_layers", "d_model", "num_heads", "d_ff", "context_length")
ENDLESS = 10**9
"""Steps of a training run, which the benchmark ends early. At its start every row of the table is active."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions that charlm and its peers share."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    context_length: int
    batch_size: int

    @property
    def characters(self) -> int:
        """Characters of one step."""
        return self.batch_size * self.context_length

    def in_words(self) -> str:
        """The dimensions, for people."""
        return (
            f"{self.num_layers} layers, d_model {self.d_model}, {self.num_heads} heads, d_ff {self.d_ff}, "
            f"context {self.context_length}, batch {self.batch_size}"
        )


def named_shape(name: str, *, gpu: bool) -> Shape:
    """S, a small model; P, T12 of Al-Rfou et al. 2018; or D, their T64.

    Raises:
        UserError: D without a GPU, where a step takes minutes.
    """
    if name == "D" and not gpu:
        raise UserError("shape=D: needs a GPU; take S or P")
    if name == "S":
        return Shape(name="S", num_layers=6, d_model=256, num_heads=8, d_ff=1024, context_length=512, batch_size=8)
    paper = {"d_model": 512, "num_heads": 2, "d_ff": 2048, "context_length": 512}
    if name == "P":
        return Shape(name="P", num_layers=12, batch_size=64 if gpu else 2, **paper)
    return Shape(name="D", num_layers=64, batch_size=16, **paper)


def shape_of(run: Path) -> Shape:
    """The shape of a trained run.

    Raises:
        UserError: the folder holds no run.
    """
    from charlm.runs.folder import Run

    config = Run.open(run).config()
    dimensions = {name: getattr(config.model, name) for name in DIMENSIONS}
    return Shape(name=run.name, batch_size=config.train.batch_size, **dimensions)


def text_config(text: Path) -> DataConfig:
    """The corpus that consists of a file; prepared files go beside it."""
    return DataConfig(corpus="file", path=text, cache_dir=text.parent / "cache")


def charlm_config(shape: Shape, text: Path, *, auxiliary: bool = True, **train: Any) -> Config:
    """charlm's defaults at this shape, with AdamW and the given options of training.

    With `auxiliary` all rows of the table are active: two targets at every layer. Without it only the next character is
    predicted, at all positions, as the peers do.
    """
    return Config(
        data=text_config(text),
        model=ModelConfig(**{name: getattr(shape, name) for name in DIMENSIONS}),
        aux=AuxConfig(layers={"enabled": auxiliary, "schedule": "constant"}, targets={"enabled": auxiliary}),
        train=TrainConfig(
            steps=ENDLESS,
            batch_size=shape.batch_size,
            optimizer="adamw",
            log_every=100,
            valid_every=ENDLESS,
            **train,
        ),
        run=RunConfig(dir=text.parent / f"run-{os.getpid()}"),
    )
