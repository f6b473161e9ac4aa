"""A trained model, read back from its run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from charlm.config import Config, ConfigError, HedgeConfig, UserError
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.hedge import Hedge
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.tasks import build_tasks
from charlm.objective.terms import Term, build_terms
from charlm.runs.checkpoints import Checkpoint, find_checkpoint
from charlm.runs.exported import is_exported, is_hub_id, read_model
from charlm.runs.folder import Run
from charlm.runs.trained import TrainedModel


def build_heads(
    config: Config, vocabulary_size: int, pairs: Iterable[tuple[int, int]], transformer: CharTransformer
) -> Heads:
    """Fresh heads, of the kind that the config asks for, for the (layer, offset) `pairs`."""
    return Heads(config.model, vocabulary_size, pairs, layers=config.aux.layers, final_norm=transformer.final_norm)


def build_objective(config: Config, vocabulary_size: int, *, tasks: bool = True) -> Objective:
    """A fresh model, with the heads and the table of terms that the config asks for.

    `tasks` false leaves out the user's own, which then need not be registered.

    Raises:
        UserError: a task of aux.tasks is not registered.
        ConfigError: at some point of training no row of the table weighs anything, or aux.hedge lacks layers.
    """
    terms = build_terms(config.aux, config.model.num_layers, config.train.steps)
    if not tasks:
        terms = tuple(term for term in terms if term.task is None)
    transformer = CharTransformer(config.model, vocabulary_size)
    heads = build_heads(config, vocabulary_size, head_pairs(terms, config.model.num_layers), transformer)
    modules = build_tasks(config, vocabulary_size) if tasks else None
    return Objective(transformer, heads, terms, hedge=_build_hedge(config.aux.hedge, terms), tasks=modules)


def _build_hedge(hedge: HedgeConfig, terms: Iterable[Term]) -> Hedge | None:
    if not hedge.enabled:
        return None
    layers = {term.layer for term in terms if term.offset == 1}
    if len(layers) < 2:
        raise ConfigError(
            f"aux.hedge.enabled=true: weighs layers against each other, and {len(layers)} predicts the next character; "
            "give others a head (aux.layers), or leave it out"
        )
    return Hedge(layers, hedge.beta, hedge.smoothing)


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
        objective = build_objective(config, vocabulary.size, tasks=False)
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
