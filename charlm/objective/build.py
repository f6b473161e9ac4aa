"""A fresh model with its heads and the objective that a config describes."""

from collections.abc import Iterable

import torch

from charlm.config import Config, ConfigError, HedgeConfig
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.count import check_memory
from charlm.objective.hedge import Hedge
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.tasks import build_tasks
from charlm.objective.terms import Term, build_terms


def build_heads(
    config: Config, vocabulary_size: int, pairs: Iterable[tuple[int, int]], transformer: CharTransformer
) -> Heads:
    """Fresh heads, of the kind that the config asks for, for the (layer, offset) `pairs`."""
    return Heads(config.model, vocabulary_size, pairs, layers=config.aux.layers, final_norm=transformer.final_norm)


def build_objective(config: Config, vocabulary_size: int, *, training: bool = True) -> Objective:
    """A fresh model, with the heads and the table of terms that the config asks for.

    Args:
        training: false leaves out the user's own tasks, which then need not be registered, and leaves the choice of the
            attention kernel to the device.

    Raises:
        UserError: a task of aux.tasks is not registered.
        ConfigError: the machine has less memory than the parameters need; at some point of training no row of the table
            weighs anything; or aux.hedge has fewer than two layers to weigh.
    """
    model, train = config.model, config.train
    if torch.get_default_device().type != "meta":
        check_memory(model, vocabulary_size)
    terms = build_terms(config.aux, model.num_layers, train.steps)
    if not training:
        terms = tuple(term for term in terms if term.task is None)
    transformer = CharTransformer(
        model,
        vocabulary_size,
        attention=train.attention if training else "auto",
        activation_checkpointing=train.activation_checkpointing,
    )
    return Objective(
        transformer,
        build_heads(config, vocabulary_size, head_pairs(terms, model.num_layers), transformer),
        terms,
        hedge=_build_hedge(config.aux.hedge, terms),
        tasks=build_tasks(config, vocabulary_size) if training else None,
        cross_entropy=train.cross_entropy,
    )


def _build_hedge(config: HedgeConfig, terms: Iterable[Term]) -> Hedge | None:
    if not config.enabled:
        return None
    layers = {term.layer for term in terms if term.offset == 1}
    if len(layers) < 2:
        raise ConfigError(
            f"aux.hedge.enabled=true: weighs layers against each other, but only {len(layers)} predicts the next "
            "character; give more layers a head (aux.layers), or switch it off"
        )
    return Hedge(layers, config.beta, config.smoothing)
