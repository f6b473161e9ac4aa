"""Load a trained model: from a run, an exported folder, or the Hugging Face hub."""

from pathlib import Path
from typing import Any

import torch

from charlm.config import UserError
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.data.windows import default_stride
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import MODEL, digest, find_checkpoint
from charlm.runs.exported import CONFIG, read_model
from charlm.runs.folder import Run
from charlm.runs.tensors import check_tensors, load_tensors
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
        from charlm.runs.hub import download, is_hub_id  # imports a library that most runs do not need

        run = download(str(run)) if is_hub_id(str(run)) else run
    if Path(run, "config.yaml").exists() or not Path(run, CONFIG).exists():
        return _load_run(Run.open(run), checkpoint, chosen)
    if checkpoint != "best":
        text = f"checkpoint={checkpoint}: {run} is an exported model, which has only one; leave it out"
        raise UserError(text, "checkpoint")
    return read_model(Path(run), chosen)


def _load_run(folder: Run, checkpoint: str | int, device: torch.device) -> TrainedModel:
    found = find_checkpoint(folder, checkpoint)
    config, corpus = folder.config(), folder.provenance()["corpus"]
    tensors, metadata = load_tensors(found.path / MODEL)
    if metadata.get("vocabulary") not in (None, digest(corpus.get("vocabulary"))):
        raise UserError(
            f"{found.path}: was trained with another vocabulary than provenance.json has; restore that file"
        )
    vocabulary = vocabulary_from_dict(corpus.get("vocabulary"))
    with torch.device("meta"):
        objective = build_objective(config, vocabulary.size, training=False)
    of_tasks = tuple(f"tasks.{task}." for task in config.aux.tasks)  # modules that exist only in training
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(of_tasks)}
    owner = "the model of config.yaml and provenance.json"
    check_tensors(found.path / MODEL, tensors, objective.state_dict(), owner)
    objective.load_state_dict(tensors, assign=True)
    objective.to(device).eval()
    hedge = objective.hedge
    bits, context_length = found.state.get("best_bits"), config.model.context_length
    score: dict[str, Any] = {
        "bits_per_character": bits,
        "split": "valid",
        "symbols": f"the first {config.train.valid_symbols:,} at most",
        "stride": default_stride(context_length),
        "context_length": context_length,
        "checkpoint": found.name,
        "corpus": corpus.get("name"),
        "precision": "that of training",
    }
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
        scores=(score,) if bits is not None and found.state.get("best_step") == found.step else (),
    )
