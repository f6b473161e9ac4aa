"""A trained model, read back from its run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm.config import Config, UserError
from charlm.data.vocabulary import Vocabulary, vocabulary_from_dict
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.terms import build_terms
from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run


@dataclass(frozen=True)
class TrainedModel:
    """A model with all that it takes to use it."""

    config: Config
    transformer: CharTransformer
    heads: Heads
    vocabulary: Vocabulary
    checkpoint: str
    """The checkpoint's name, `step-00001000`."""
    step: int
    """Optimizer steps it was trained for."""
    corpus: dict[str, Any]
    """What the run recorded of its corpus: name, sha256, vocabulary, sizes."""
    device: torch.device


def build_objective(config: Config, vocabulary_size: int) -> Objective:
    """A fresh model, with the heads and the table of terms that the config asks for."""
    terms = build_terms(config.aux, config.model.num_layers)
    pairs = head_pairs(terms, config.model.num_layers)
    transformer = CharTransformer(config.model, vocabulary_size)
    return Objective(transformer, Heads(config.model, vocabulary_size, pairs), terms)


def load(run: Path | str, checkpoint: str | int = "best", device: torch.device | str | None = None) -> TrainedModel:
    """The model of a run, in evaluation mode and fp32.

    Args:
        run: the run's folder.
        checkpoint: "best" on validation, "last", or a step.
        device: by default a GPU if there is one.

    Raises:
        UserError: no run, no such checkpoint, a damaged file, or tensors or a vocabulary that are not the model's.
    """
    folder = Run.open(run)
    found = find_checkpoint(folder, checkpoint)
    config, corpus = folder.config(), folder.provenance()["corpus"]
    found.check_vocabulary(corpus.get("vocabulary"))
    vocabulary = vocabulary_from_dict(corpus.get("vocabulary"))
    tensors = found.tensors()
    embedding = tensors.get("transformer.embedding.weight")
    if embedding is not None and embedding.ndim > 0 and len(embedding) != vocabulary.size:
        raise UserError(
            f"{folder.provenance_path}: its vocabulary has {vocabulary.size} symbols, and the model {len(embedding)}; "
            "restore that file"
        )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        objective = build_objective(config, vocabulary.size)
    found.check_tensors(objective.state_dict())
    objective.load_state_dict(tensors, assign=True)
    objective.to(chosen).eval()
    return TrainedModel(
        config=config,
        transformer=objective.transformer,
        heads=objective.heads,
        vocabulary=vocabulary,
        checkpoint=found.name,
        step=found.step,
        corpus=corpus,
        device=chosen,
    )
