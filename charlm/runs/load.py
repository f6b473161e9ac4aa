"""A trained model, read back from its run."""

from pathlib import Path
from typing import Any

import torch

from charlm.config import Config, UserError
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import Checkpoint, find_checkpoint
from charlm.runs.exported import is_exported, is_hub_id, read_model
from charlm.runs.folder import Run
from charlm.runs.trained import TrainedModel


def load(run: Path | str, checkpoint: str | int = "best", device: torch.device | str | None = None) -> TrainedModel:
    """The model of a run or of an exported folder, in evaluation mode and fp32.

    Args:
        run: the folder, or OWNER/NAME of an exported model on the Hugging Face hub, if need be with @REVISION behind
            it. No code of others is run.
        checkpoint: of a run: "best" on validation, "last", or a step.
        device: by default a GPU if there is one.

    Raises:
        UserError: no run or model, no such checkpoint, a damaged file, or tensors or a vocabulary that are not the
            model's.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not Path(run).exists() and is_hub_id(str(run)):
        from charlm.runs.hub import download

        run = download(str(run))
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
    embedding = tensors.get("transformer.embedding.weight")
    if embedding is not None and embedding.ndim > 0 and len(embedding) != vocabulary.size:
        raise UserError(
            f"{folder.provenance_path}: its vocabulary has {vocabulary.size} symbols, and the model {len(embedding)}; "
            "restore that file"
        )
    with torch.device("meta"):
        objective = build_objective(config, vocabulary.size, training=False)
    model = objective.state_dict()
    prefixes = tuple(f"tasks.{task}." for task in config.aux.tasks)  # only what trains them knows their modules
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
    """What the run noted of its best checkpoint, if this is that one."""
    bits = found.state.get("best_bits")
    if found.state.get("best_step") != found.step or not isinstance(bits, float):
        return ()
    figure = {
        "bits_per_character": bits,
        "split": "valid",
        "symbols": f"the first {config.train.valid_symbols:,} at most",
        "stride": max(1, config.model.context_length // 2),
        "context_length": config.model.context_length,
        "checkpoint": found.name,
        "corpus": corpus.get("name"),
        "precision": "that of training",
    }
    return (figure,)
