"""A trained model, read from a run or from an exported folder."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from charlm.config import Config
from charlm.data.vocabulary import Vocabulary
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer


@dataclass(frozen=True)
class TrainedModel:
    """A model with everything needed to use it."""

    config: Config
    transformer: CharTransformer
    heads: Heads
    vocabulary: Vocabulary
    checkpoint: str
    """Name of the checkpoint, `step-00001000`."""
    step: int
    """Number of optimizer steps it was trained for."""
    corpus: dict[str, Any]
    """The run's record of its corpus: name, sha256, vocabulary, sizes."""
    device: torch.device
    hedge_weights: dict[int, float] | None = None
    """Weight of each layer learned by aux.hedge, summing to 1; None without it."""
    scores: tuple[dict[str, Any], ...] = ()
    """Scores for the model card with their protocols, as `Score.as_dict` gives them or parts of that."""
    options: str | None = None
    """YAML of the options it was trained with, if `config` no longer has them all."""

    @property
    def modules(self) -> nn.ModuleDict:
        """Transformer and heads as one module, whose parameters have the names they have in a checkpoint."""
        return nn.ModuleDict({"transformer": self.transformer, "heads": self.heads})


def exit_layers(trained: TrainedModel) -> list[int]:
    """The layers that have a head for the next symbol, which always include the last."""
    return [layer for layer, offset in trained.heads.pairs if offset == 1]


def empty_model(
    config: Config, vocabulary_size: int, pairs: Iterable[tuple[int, int]], last_tower: bool
) -> nn.ModuleDict:
    """Transformer and heads without values, on the meta device; `pairs` and `last_tower` as in `Heads`."""
    with torch.device("meta"):
        transformer = CharTransformer(config.model, vocabulary_size)
        heads = Heads(
            config.model,
            vocabulary_size,
            pairs,
            layers=config.aux.layers,
            final_norm=transformer.final_norm,
            last_tower=last_tower,
        )
    return nn.ModuleDict({"transformer": transformer, "heads": heads})
