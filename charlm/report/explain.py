"""A config explained: its table of terms, parameters and FLOPs."""

import html
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass

import torch

from charlm.config import Config, TrainConfig, count_of
from charlm.data.corpus import prepared_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.model.heads import Heads
from charlm.objective.build import build_objective
from charlm.objective.count import RouteCost, inference_flops, num_parameters, route_cost, training_flops
from charlm.objective.objective import Objective
from charlm.objective.routes import check_route
from charlm.objective.schedules import Schedule
from charlm.objective.terms import Term, build_terms
from charlm.text import counted

PROGRESSES = (0.0, 0.25, 0.5, 0.75, 1.0)
TERM_FIELDS = ("name", "layer", "offset", "positions", "task", "hinge")
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`."""

    config: Config
    vocabulary_size: int
    vocabulary_is_known: bool  # else the size is that of bytes
    terms: tuple[Term, ...]  # by layer, offset and positions; own tasks come last
    parameters: dict[str, int]
    """training (all heads, own tasks) and inference (the last layer's head)."""
    flops_per_character: dict[str, int]
    """training_start, training_end (by the joint route) and inference."""
    route_cost: RouteCost

    def to_dict(self) -> dict:
        """For JSON. Weights are pairs [progress, weight], at progress 1 the limit."""
        aux, train = self.config.aux, self.config.train
        context_length = self.config.model.context_length
        route = {"name": aux.route, "relay_layers": aux.relay_layers, "step_sizes": aux.step_sizes}
        return {
            "parameters": self.parameters,
            "flops_per_character": self.flops_per_character,
            "steps": train.steps if train.time is None else None,
            "time": train.time,
            "characters_per_step": train.batch_size * context_length,
            "context_length": context_length,
            "vocabulary_size": self.vocabulary_size,
            "vocabulary_is_known": self.vocabulary_is_known,
            "head": aux.layers.head,
            "hedge": aux.hedge.model_dump() if aux.hedge.enabled else None,
            "route": route | asdict(self.route_cost),
            "terms": [_term_to_dict(term, train) for term in self.terms],
        }

    def to_text(self, width: int = 80) -> str:
        """For people: sizes, costs and the table, `width` characters wide."""
        table = _table(self.terms, self.config.train, width)
        return "\n".join([*_summary(self), "", *table])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.to_text())}</pre>"


def meta_objective(config: Config) -> tuple[Objective, bool]:
    """The objective on the meta device, and whether its vocabulary is known; else that of bytes is taken.

    Raises UserError if every loss has weight zero at some time, for a route that cannot be taken,
    and for a task that is not registered.
    """
    check_route(config)
    is_bytes = config.data.vocabulary == ByteVocabulary.name
    corpus = None if is_bytes else prepared_corpus(config.data)
    vocabulary_size = corpus.vocabulary.size if corpus else ByteVocabulary().size
    with torch.device("meta"):
        return build_objective(config, vocabulary_size), is_bytes or corpus is not None


def explain(config: Config) -> Explanation:
    """Build the model of `config` on the meta device, and count. Raises as `meta_objective`."""
    objective, is_known = meta_objective(config)
    transformer, heads = objective.transformer, objective.heads
    vocabulary_size = transformer.vocabulary_size
    with torch.device("meta"):
        last_head = Heads(config.model, vocabulary_size, [(config.model.num_layers, 1)])
    starting = [term for term in objective.terms if term.weight.at_next_turn(0.0) != 0.0]
    ending = [term for term in objective.terms if term.weight.stops_at is None]
    at_inference = num_parameters(transformer, last_head)
    return Explanation(
        config=config,
        vocabulary_size=vocabulary_size,
        vocabulary_is_known=is_known,
        terms=objective.terms,
        parameters={"training": num_parameters(objective), "inference": at_inference},
        flops_per_character={
            "training_start": training_flops(transformer, heads, starting),
            "training_end": training_flops(transformer, heads, ending),
            "inference": inference_flops(transformer, last_head),
        },
        route_cost=route_cost(config, objective),
    )


def stops_at_step(weight: Schedule, train: TrainConfig) -> int | None:
    """The first optimizer step from which `weight` stays zero, or None."""
    if weight.stops_at is None:
        return None
    step = bisect_left(range(train.steps), weight.stops_at, key=train.progress)
    return step if step < train.steps else None


def silent_from(config: Config) -> dict[str, int]:
    """The step from which each head is not trained any more, by "layer/offset"; others are left out."""
    stops: dict[str, list[int | None]] = {}
    for term in build_terms(config.aux, config.model.num_layers, config.train.planned):
        stops.setdefault(f"{term.layer}/{term.offset}", []).append(stops_at_step(term.weight, config.train))
    return {head: max(steps) for head, steps in stops.items() if None not in steps}


def _term_to_dict(term: Term, train: TrainConfig) -> dict:
    weight = term.weight
    weights = [*map(weight.at_next_turn, PROGRESSES[:-1]), weight.limit]
    return {name: getattr(term, name) for name in TERM_FIELDS} | {
        "one_of_steps": weight.period,
        "weights": list(map(list, zip(PROGRESSES, weights, strict=True))),
        "stops_at": weight.stops_at,
        "stops_at_step": stops_at_step(weight, train) if train.time is None else None,
    }


def _short(number: float) -> str:
    """Three or more digits and a unit: 44.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            decimals = 2 if number < 10 * size else 1
            return f"{number / size:.{decimals}f}{unit}"
    return f"{number:.0f}"


def _summary(explanation: Explanation) -> list[str]:
    model, train = explanation.config.model, explanation.config.train
    parameters = map(_short, explanation.parameters.values())
    flops = map(_short, explanation.flops_per_character.values())
    characters = train.batch_size * model.context_length
    steps = f"{train.steps:,} steps" if train.time is None else f"as many steps as fit into {train.time},"
    lines = {
        "model": f"{model.num_layers} layers of width {model.d_model}, context {model.context_length}",
        "parameters": "{} in training, {} at inference".format(*parameters),
        "FLOPs per character": "{} in training ({} at the end), {} at inference".format(*flops),
        "training": f"{steps} of {characters:,} characters",
    }
    lines |= _methods(explanation)
    lines |= _route(explanation.config, explanation.route_cost)
    if not explanation.vocabulary_is_known:
        size = explanation.vocabulary_size
        lines["vocabulary"] = f"{size} symbols assumed: scripts/prepare.py counts them"
    return [f"{name:<20} {text}" for name, text in lines.items()]


def _methods(explanation: Explanation) -> dict[str, str]:
    aux, model = explanation.config.aux, explanation.config.model
    layers, hedge = aux.layers, aux.hedge
    width = count_of(layers.tower_width or 1.0, model.d_model)
    turns = max(term.weight.period for term in explanation.terms)
    lines = {}
    heads = {
        "shared": "the last layer's, on every layer",
        "shared_frozen": "the last layer's, as constants on intermediate layers",
        "tower": f"towers of width {width}, dropout {layers.tower_dropout:g}",
    }
    has_heads = bool(layers.intermediate(model.num_layers))
    if has_heads and layers.head in heads:
        lines["heads"] = heads[layers.head]
    if has_heads and layers.hinge:
        lines["hinge"] = f"losses of intermediate layers count above {layers.hinge:g} nats"
    if turns > 1:
        lines["rotation"] = f"each intermediate head is on at one of {turns} steps"
    if hedge.enabled:
        settings = f"beta {hedge.beta:g}, smoothing {hedge.smoothing:g}"
        lines["hedge"] = f"weights times alphas, learned with {settings}"
    return lines


def _route(config: Config, cost: RouteCost) -> dict[str, str]:
    aux, optimizer = config.aux, config.train.optimizer
    weighted = aux.step_sizes == "weighted"
    if aux.route == "joint" and not weighted:
        return {}
    route = f"{aux.route}, an update per exit layer"
    if aux.route == "joint":
        route = "joint, one update"
    elif aux.route == "relay":
        route = f"relay, down to {counted(aux.relay_layers, 'layer')} below each head"
    if weighted or aux.route == "multiway":
        route += f", step sizes: {aux.step_sizes}"
    lines = {"route": route}
    if optimizer != "sgd" and aux.route == "multiway" and not weighted:
        lines["- weights"] = f"cancel out under {optimizer}, not with step sizes: weighted"
    if optimizer != "sgd" and aux.route == "joint":
        lines["- step sizes"] = f"hardly any effect under {optimizer}, which ignores a factor"
    memory = {"gradients": cost.gradients, "optimizer state": cost.optimizer_state}
    memory["copies"] = cost.copies
    more = ", ".join(f"+{_short(count)} {name}" for name, count in memory.items() if count)
    parts = f"{cost.forward:.2f} forward, {cost.backward:.2f} backward"
    lines["- operations"] = f"{cost.total:.2f} of the joint route's ({parts})"
    lines["- memory"] = f"{more} (numbers)" if more else "the joint route's"
    return lines


def _table(terms: tuple[Term, ...], train: TrainConfig, width: int) -> list[str]:
    rows = [("term", "at start", "stops at step" if train.time is None else "stops at progress")]
    for term in terms:
        step, stop = stops_at_step(term.weight, train), "never"
        if step is not None:
            stop = f"{step:,}" if train.time is None else f"{term.weight.stops_at:.3g}"
        rows.append((term.name, f"{term.weight.at_next_turn(0.0):.3g}", stop))
    names, weights, stops = (max(map(len, column)) for column in zip(*rows, strict=True))
    cells = max(16, width - names - weights - stops - 6)
    title = " weight over training " if cells > 24 else " weight "
    progresses = [cell / cells for cell in range(cells)]
    over_time = [list(map(term.weight.at_next_turn, progresses)) for term in terms]
    unit = max(map(max, over_time)) / (len(BLOCKS) - 1)
    strips = [f"0{title:─^{cells - 2}}1"]
    strips += ["".join(BLOCKS[math.ceil(round(w / unit, 8))] for w in row) for row in over_time]
    return [
        f"{name:{names}}  {weight:>{weights}}  {stop:>{stops}}  {strip}".rstrip()
        for (name, weight, stop), strip in zip(rows, strips, strict=True)
    ]
