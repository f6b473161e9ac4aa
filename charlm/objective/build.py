"""A fresh model, its heads, the user's own tasks and the objective that a config describes."""

from charlm.config import Config
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.count import check_memory
from charlm.objective.hedge import Hedge
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.tasks import build_tasks
from charlm.objective.terms import build_terms


def build_objective(config: Config, vocabulary_size: int, *, training: bool = True) -> Objective:
    """A fresh model with its heads and terms; the user's tasks only for `training`.

    Raises UserError if a task is not registered, ConfigError if the parameters do not fit in memory,
    or all terms have weight zero at some time.
    """
    model, aux, train = config.model, config.aux, config.train
    check_memory(model, vocabulary_size)
    terms = build_terms(aux, model.num_layers, train.planned)
    if not training:
        terms = tuple(term for term in terms if term.task is None)
    transformer = CharTransformer(
        model,
        vocabulary_size,
        attention=train.attention if training else "auto",  # the device of a run may be another
        activation_checkpointing=train.activation_checkpointing,
    )
    pairs = head_pairs(terms, model.num_layers)
    heads = Heads(model, vocabulary_size, pairs, layers=aux.layers, final_norm=transformer.final_norm)
    next_character = {term.layer for term in terms if term.offset == 1}
    hedge = Hedge(next_character, aux.hedge.beta, aux.hedge.smoothing) if aux.hedge.enabled else None
    tasks = build_tasks(aux.tasks, model, vocabulary_size) if training and aux.tasks else None
    return Objective(transformer, heads, terms, hedge=hedge, tasks=tasks, cross_entropy=train.cross_entropy)
