"""The models that are measured, and charlm's config for them. Imports no torch.

Shapes: T positions, D d_model, V vocabulary, L layers.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from charlm.config import (
    AuxConfig,
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    RunConfig,
    TargetsConfig,
    TrainConfig,
    UserError,
)
from charlm.config.train import Precision
from charlm.objective.count import dense_flops

VOCABULARY = 256
ENDLESS = 10**9
"""Steps of a run that the benchmark ends: at its start every row of the table is active."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions that all contestants share."""

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
    """S, P (T12 of Al-Rfou et al. 2018) or D (T64).

    Raises:
        UserError: D without a GPU: a step of all contestants would take minutes, and their memory more than 24 GB.
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
    """That of a trained run.

    Raises:
        UserError: it is none.
    """
    from charlm.runs.folder import Run

    config = Run.open(run).config()
    names = ("num_layers", "d_model", "num_heads", "d_ff", "context_length")
    dimensions = {name: getattr(config.model, name) for name in names}
    return Shape(name=run.name, batch_size=config.train.batch_size, **dimensions)


def flop_per_character(shape: Shape, num_targets: int = 1, num_exits: int = 1) -> int:
    """Floating-point operations of a training step per character, for a plain Transformer with biases uncounted.

        6 * (L * (4 D^2 + 2 D d_ff) + V * D * num_targets * num_exits) + 12 * L * D * T

    See `charlm.objective.count.dense_flops`.
    """
    D, L = shape.d_model, shape.num_layers
    parameters = L * (4 * D**2 + 2 * D * shape.d_ff) + VOCABULARY * D * num_targets * num_exits
    return dense_flops(parameters, L, D, shape.context_length)


def text_config(text: Path) -> DataConfig:
    """A file as a corpus, prepared beside it."""
    return DataConfig(corpus="file", path=text, cache_dir=text.parent / "cache")


def charlm_config(
    shape: Shape,
    text: Path,
    *,
    mixed_precision: Precision,
    auxiliary: bool = True,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> Config:
    """charlm as it comes, at this shape, with AdamW.

    `auxiliary` has all rows of the table active, two targets at every layer; without it, prediction at all positions
    is left: what the peers train on.
    """
    return Config(
        data=text_config(text),
        model=ModelConfig(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            context_length=shape.context_length,
        ),
        aux=AuxConfig(
            layers=LayersConfig(enabled=auxiliary, schedule="constant"), targets=TargetsConfig(enabled=auxiliary)
        ),
        train=TrainConfig(
            steps=ENDLESS,
            batch_size=shape.batch_size,
            optimizer="adamw",
            mixed_precision=mixed_precision,
            compile="yes" if compile else "no",
            activation_checkpointing=activation_checkpointing,
            log_every=100,
            valid_every=ENDLESS,
        ),
        run=RunConfig(dir=text.parent / f"run-{os.getpid()}"),
    )
