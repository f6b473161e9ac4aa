"""A trained model, whether it was read from a run or from what somebody shared."""

from dataclasses import dataclass
from typing import Any

import torch

from charlm.config import Config
from charlm.data.vocabulary import Vocabulary
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer


@dataclass(frozen=True)
class TrainedModel:
    """A model with all that it takes to use it."""

    config: Config
    transformer: CharTransformer
    """It and the heads, or what reads as they do."""
    heads: Heads
    vocabulary: Vocabulary
    checkpoint: str
    """The checkpoint's name, `step-00001000`."""
    step: int
    """Optimizer steps it was trained for."""
    corpus: dict[str, Any]
    """What the run recorded of its corpus: name, sha256, vocabulary, sizes."""
    device: torch.device
    hedge_weights: dict[int, float] | None = None
    """What aux.hedge has made of the layers' weights, which sum to 1; None without it."""
    scores: tuple[dict[str, Any], ...] = ()
    """Figures with their protocols for the model's card, as `Score.as_dict` gives them or parts of that."""
    options: str | None = None
    """YAML of the options it was trained with, where `config` no longer has them all."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the model with its card as OWNER/NAME on the Hugging Face hub; `charlm.load(repo_id)` reads it back.

        `options` are those of `huggingface_hub.ModelHubMixin.push_to_hub`, such as private=True.

        Returns:
            The address of the commit.
        """
        from charlm.runs.hub import HubModel

        return HubModel.of(self).push_to_hub(repo_id, **options)
