"""Load a trained model: from a run, an exported folder, or the Hugging Face hub."""

from pathlib import Path
from typing import Any

import torch

from charlm.config import Config, UserError
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.data.windows import default_stride
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import Checkpoint, find_checkpoint
from charlm.runs.folder import Run
from charlm.runs.share.read import is_exported, read_model
from charlm.runs.trained import TrainedModel


def load(run: Path | str, checkpoint: str | int = "best", device: torch.device | str | None = None) -> TrainedModel:
    """The model of a run or of an exported folder, in evaluation mode and fp32.

    Args:
        run: a folder, or OWNER/NAME or OWNER/NAME@REVISION of an exported model on the Hugging Face hub.
        checkpoint: checkpoint of a run: "best" on validation, "last", or a step.
        device: by default a GPU if there is one.

    Raises:
        UserError: there is no such run, model or checkpoint, a file is damaged, or tensors or vocabulary are not those
            of the model.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not Path(run).exists():
        from charlm.runs.share.hub import download, is_hub_id  # imports a library that most runs do not need

        run = download(str(run)) if is_hub_id(str(run)) else run
    if is_exported(Path(run)):
        trained = read_model(Path(run), chosen)
        if checkpoint != "best":
            raise UserError(f"checkpoint={checkpoint}: {run} is an exported model, which has only one; leave it out")
        return trained
    return _load_run(Run.open(run), checkpoint, chosen)


def _load_run(folder: Run, checkpoint: str | int, device: torch.device) -> TrainedModel:
    found = find_checkpoint(folder, checkpoint)
    config, corpus = folder.config(), folder.provenance()["corpus"]
    found.check_vocabulary(corpus.get("vocabulary"))
    vocabulary = vocabulary_from_dict(corpus.get("vocabulary"))
    tensors = found.tensors()
    with torch.device("meta"):
        objective = build_objective(config, vocabulary.size, training=False)
    model = objective.state_dict()
    prefixes = tuple(f"tasks.{task}." for task in config.aux.tasks)  # modules of a task exist only in training
    found.check_tensors(model | {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)})
    objective.load_state_dict({name: tensors[name] for name in model}, assign=True)
    objective.to(device).eval()
    hedge = objective.hedge
    return TrainedModel(
        config=config,
        transformer=objective.transformer,
        heads=objective.heads,
        vocabulary=vocabulary,
        checkpoint=found.name,
        step=found.step,
        corpus=corpus,
        device=device,
        hedge_weights=dict(zip(hedge.layers, hedge.weights.tolist(), strict=True)) if hedge else None,
        scores=_validation(config, corpus, found),
    )


def _validation(config: Config, corpus: dict[str, Any], found: Checkpoint) -> tuple[dict[str, Any], ...]:
    """The validation score that the run noted, if this is its best checkpoint."""
    bits = found.state.get("best_bits")
    if found.state.get("best_step") != found.step or not isinstance(bits, float):
        return ()
    figure = {
        "bits_per_character": bits,
        "split": "valid",
        "symbols": f"the first {config.train.valid_symbols:,} at most",
        "stride": default_stride(config.model.context_length),
        "context_length": config.model.context_length,
        "checkpoint": found.name,
        "corpus": corpus.get("name"),
        "precision": "that of training",
    }
    return (figure,)
