"""Load a trained model: from a run, an exported folder, or the Hugging Face hub."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from charlm.config import UserError
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.data.windows import default_stride
from charlm.hardware import default_device
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import MODEL, OPTIMIZER, OWNER, digest, find_checkpoint
from charlm.runs.exported import EXPORT_CONFIG, read_model
from charlm.runs.folder import Run
from charlm.runs.tensors import load_tensors
from charlm.runs.trained import TrainedModel, filled


def load(
    run: Path | str, checkpoint: str | int = "best", device: torch.device | str | None = None, weights: str = "average"
) -> TrainedModel:
    """The model of a run or of an exported folder, in evaluation mode and fp32.

    Args:
        run: a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub.
        checkpoint: checkpoint of a run: "best" on validation, "last", or a step.
        device: by default the machine's accelerator if it has one.
        weights: "average" if the run has train.average, or "raw".

    Raises UserError if there is no such run, model or checkpoint, or its files are damaged.
    """
    device = torch.device(device or default_device())
    if not Path(run).exists():
        from charlm.runs.hub import download  # a library that most runs do not need

        run = download(str(run))
    is_exported = Path(run, EXPORT_CONFIG).exists()
    if not is_exported or Path(run, "config.yaml").exists():
        return _load_run(Run.open(run), checkpoint, device, raw=weights == "raw")
    if (checkpoint, weights) != ("best", "average"):
        name, value = ("weights", weights) if checkpoint == "best" else ("checkpoint", checkpoint)
        problem = f"{run} is an exported model, which has only one"
        raise UserError(f"{name}={value}: {problem}; leave it out", name)
    return read_model(Path(run), device)


def _load_run(folder: Run, checkpoint: str | int, device: torch.device, *, raw: bool) -> TrainedModel:
    found = find_checkpoint(folder, checkpoint)
    config = folder.config()
    provenance = folder.provenance()
    corpus, started_from = provenance["corpus"], provenance.get("started_from", {})
    raw = raw and config.train.average != "no"
    tensors, metadata = load_tensors(found.path / MODEL)
    tensors |= {} if raw else found.averages()
    if metadata.get("vocabulary") not in (None, digest(corpus.get("vocabulary"))):
        problem = "has another vocabulary than provenance.json"
        raise UserError(f"{found.path} {problem}; restore that file")
    vocabulary = vocabulary_from_dict(corpus.get("vocabulary"))
    only_trained = tuple(f"tasks.{task}." for task in config.aux.tasks)
    tensors = {name: own for name, own in tensors.items() if not name.startswith(only_trained)}
    build = partial(build_objective, config, vocabulary.size, training=False)
    objective = filled(build, config.model, tensors, found.path / MODEL, OWNER).to(device)
    hedge_weights = None
    if hedge := objective.hedge:
        hedge_weights = dict(zip(hedge.layers, hedge.weights.tolist(), strict=True))
    bits = found.state.get("best_bits")
    context_length = config.model.context_length
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
    is_scored = bits is not None and found.state.get("best_step") == found.step
    return TrainedModel(
        config=config,
        transformer=objective.transformer,
        heads=objective.heads,
        vocabulary=vocabulary,
        checkpoint=f"{found.name}, raw weights" if raw else found.name,
        step=found.step,
        corpus=corpus,
        device=device,
        hedge_weights=hedge_weights,
        scores=(score,) if is_scored and not raw else (),
        started_from=started_from,
        file=found.path / (MODEL if raw or config.train.average == "no" else OPTIMIZER),
    )
