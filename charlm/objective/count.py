"""Parameters, floating-point operations (FLOPs) and memory, before training.

Shapes: T positions of the context, D d_model, V vocabulary, L layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import psutil
import torch
from torch import nn

from charlm.config import Config, ConfigError, ModelConfig, TrainConfig
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import Objective
from charlm.objective.routes import blocked_layers, learning_from
from charlm.objective.terms import Term, active_by_layer


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def transformer_parameters(config: ModelConfig, vocabulary_size: int) -> int:
    """The parameters of a `CharTransformer` that may be too large to build."""
    L, T, D, F = config.num_layers, config.context_length, config.d_model, config.d_ff
    block = 4 * (D * D + D) + (2 * D * F + F + D) + 2 * 2 * D
    positions = {"per_layer": L, "input": 1, "rotary": 0}[config.position_encoding] * T * D
    ngrams = len(config.ngrams) * config.ngram_width * (config.ngram_buckets + D)
    final_norm = 2 * D if config.norm == "pre" else 0
    return vocabulary_size * D + ngrams + positions + L * block + final_norm


def check_memory(config: ModelConfig, vocabulary_size: int) -> None:
    """Raise ConfigError if the parameters do not fit in memory (on meta: in torch's counts)."""
    parameters = transformer_parameters(config, vocabulary_size)
    memory = psutil.virtual_memory().total
    if 4 * parameters > (2**62 if torch.get_default_device().type == "meta" else memory):
        names = ("num_layers", "d_model", "d_ff", "context_length", "ngram_buckets")
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        needed, present = (f"{size / 1e9:,.0f}" for size in (4 * parameters, memory))
        text = f"parameters take {needed} GB, and this machine has {present}; make them smaller"
        raise ConfigError(f"model.{sizes}: {parameters:.3g} {text}")


def dense_flops(parameters: float, depth: int, d_model: int, context_length: int) -> int:
    """FLOPs per character of a training step of `depth` layers.

    A matrix product costs 2 per parameter forward and 4 backward. Attention makes two products of
    2 * D * T per layer and position, the masked half included.
    """
    return round(6 * parameters + 12 * depth * d_model * context_length)


def training_flops(transformer: CharTransformer, heads: Heads, active_terms: Sequence[Term]) -> int:
    """`dense_flops` of a training step up to the highest active layer, without the user's tasks.

    A layer's heads run at all T positions if a row does, else at the last; rotated ones on turn.
    """
    config = transformer.config
    depth = max(term.layer for term in active_terms)
    parameters = float(_trunk_matrices(transformer, depth))
    for layer in {term.layer for term in active_terms}:
        rows = [term for term in active_terms if term.layer == layer]
        frozen = heads.frozen and layer < config.num_layers
        products = 2 / 3 if frozen else 1  # none for the head's own gradient
        matrices = _head_matrices(heads, rows, config.context_length)
        parameters += products * matrices / rows[0].weight.period
    return dense_flops(parameters, depth, config.d_model, config.context_length)


def inference_flops(transformer: CharTransformer, head: Heads) -> int:
    """FLOPs per generated character with a full cache."""
    config = transformer.config
    parameters = _trunk_matrices(transformer, config.num_layers) + _matrices(head)
    return 2 * parameters + 4 * config.num_layers * config.d_model * config.context_length


@dataclass(frozen=True)
class RouteCost:
    """Cost of a route at the start of training, when the most losses are active."""

    forward: float
    backward: float
    total: float
    """These three: FLOPs of a step, in those of the joint route."""
    gradients: int
    optimizer_state: int
    """These two: numbers in memory beyond those of the joint route."""
    copies: int
    """Numbers kept of parameters and their state, for a step that must be undone."""


def route_cost(config: Config, objective: Objective) -> RouteCost:
    """The cost of `aux.route` for a model, which may be on the meta device.

    n layers run, each at f FLOPs per character in a forward pass (2 per matrix parameter, 4 D T for
    attention), and r f in a backward pass: r = 2, or 3 if activations are recomputed. Layers
    l_1 < ... < l_K = n have losses, and heads that take h_1, ..., h_K in a forward pass.

              forward             backward
        joint      n f + sum h_k       r n f + 2 sum h_k
        relay      n f + sum h_k       r (a + sum of k over blocked losses) f + 2 sum h_k
        pairwise   sum (l_k f + h_k)   sum (r l_k f + 2 h_k)
        multiway   n f + sum h_k       sum (r l_k f + 2 h_k)

    where a is the highest layer whose loss is not blocked. Embeddings and updates do not count.
    """
    aux, transformer, model = config.aux, objective.transformer, config.model
    active = active_by_layer(objective.terms, 0.0)
    rows = {layer: [term for term, _ in own] for layer, own in active.items()}
    blocked = blocked_layers(list(rows), model.num_layers, aux.relay_layers)
    once, each = max(rows), sum(rows)
    relayed = max(rows.keys() - blocked, default=0) + aux.relay_layers * len(blocked)
    layers = {"joint": (once, once), "relay": (once, relayed), "pairwise": (each, each), "multiway": (once, each)}
    T = model.context_length
    of_layer = 2 * _matrices(transformer.blocks[0]) + 4 * model.d_model * T
    of_heads = 2 * sum(_head_matrices(objective.heads, own, T) for own in rows.values())
    factor = 3 if config.train.activation_checkpointing else 2

    def passes(forward: int, backward: int) -> tuple[float, float]:
        return forward * of_layer + of_heads, factor * backward * of_layer + 2 * of_heads

    forward, backward = passes(*layers[aux.route])
    joint = passes(once, once)
    learning = [learning_from(objective, own) for own in rows.values()]
    repeated, moved, moments = [], set(), _moments(objective, config.train)
    if aux.route == "multiway":
        reached = Counter(chain(*learning))
        repeated = [*(reached - Counter(set(reached))).elements()]
    if aux.route == "pairwise":
        moved = set(chain(*learning[:-1]))
    return RouteCost(
        forward=forward / joint[0],
        backward=backward / joint[1],
        total=(forward + backward) / sum(joint),
        gradients=sum(p.numel() for p in repeated),
        optimizer_state=round(sum(moments[p] * p.numel() for p in repeated)),
        copies=round(sum((1 + moments[p]) * p.numel() for p in moved)),
    )


def step_memory(config: Config, objective: Objective, windows: int, processes: int = 1) -> int:
    """Peak bytes of a step on each GPU, whose passes have `windows` of full length; exact to 5 %.

    Parameters and optimizer state stay. Beside them are most bytes where heads compute their losses
    after the blocks, where the last block is recomputed, or in the update. Compiled blocks keep less.
    """
    model, train, inside = config.model, config.train, objective.transformer.blocks
    half = _product_bytes(train)
    moments, cost, parameters = _moments(objective, train), route_cost(config, objective), num_parameters(objective)
    state = parameters + cost.gradients + cost.optimizer_state + cost.copies
    state += sum(count * parameter.numel() for parameter, count in moments.items())
    state += parameters * (train.average != "no")
    positions = windows * model.context_length
    update, muon = 4 * parameters, [p.numel() for p in inside[0].parameters() if p.ndim == 2]
    if train.optimizer == "muon":  # four copies of the matrices of a shape
        update += 16 * len(inside) * max(4 * muon[0], *muon)
    more = 0
    if processes > 1 and train.sharding == "fsdp2":  # what is outside of blocks stays gathered, in two copies
        state, update = state / processes, update / processes
        more = 8 * (parameters - num_parameters(inside))
    elif processes > 1:  # buckets of DDP
        more = 4 * parameters
    accumulated = update if train.batch_size > windows * processes else 0
    block, exits, losses = kept_bytes(config, objective)
    stored = 4 * model.d_model if train.activation_checkpointing else block
    forward = _matrices(inside) * (half if half < 4 else 0) + positions * (len(inside) * stored + exits)
    recomputed = block + 2 * half * model.d_ff - exits / 2 if train.activation_checkpointing else 0
    passes = accumulated + forward + positions * max(losses, recomputed)
    return round(4 * state + more + max(update, passes))


def kept_bytes(config: Config, objective: Objective) -> tuple[int, float, float]:
    """Bytes per position that a block and all heads keep for the backward pass, and of the losses of one layer.

    Numbers of products have 2 bytes under autocast, those between blocks and in norms 4.
    """
    model, half = config.model, _product_bytes(config.train)
    D, F, T = model.d_model, model.d_ff, model.context_length
    drops = model.activation_dropout > 0
    attention = 6 + 2 * (model.position_encoding == "rotary")  # both norms, q, k, v, the output; q and k rotated
    inner = 1 + (drops or model.activation != "relu")
    masks = 2 * D * (model.residual_dropout > 0) + F * drops
    block = 2 * (4 * D + 8) + half * (attention * D + inner * F) + 4 * model.num_heads + masks
    exits, losses = 0.0, 0.0
    rows = active_by_layer(objective.terms, 0.0)
    for layer, own in rows.items():
        predictions = [term for term, _ in own if term.task is None]
        share = 1 if any(term.positions == "all" for term in predictions) else 1 / T
        logits = len({term.offset for term in predictions}) * objective.transformer.vocabulary_size
        # The next block keeps what heads read, unless it adds a position table.
        apart = model.position_encoding == "per_layer" or (model.norm == "pre" and layer == model.num_layers)
        exits += share * half * D + 4 * D * apart
        losses = max(losses, share * (8 + half) * logits)
    return block, exits, losses + 4 * D + (4 * D if len(rows) > 1 else half * D)


def step_work(config: Config, objective: Objective, positions: int) -> tuple[float, float]:
    """FLOPs and bytes of a step while most losses are on, recomputation included.

    Kernels beside products pass 7 times over what is kept for the backward pass: within 30 %.
    """
    active = [term for term in objective.terms if term.weight.at_next_turn(0.0) != 0.0]
    depth = max(term.layer for term in active)
    block, exits, _ = kept_bytes(config, objective)
    again = 4 / 3 if config.train.activation_checkpointing else 1
    flops = positions * training_flops(objective.transformer, objective.heads, active)
    return again * flops, again * 7 * positions * (depth * block + exits) + 32 * num_parameters(objective)


def _product_bytes(train: TrainConfig) -> int:
    return 4 if train.mixed_precision == "fp32" else 2


def _head_matrices(heads: Heads, rows: Sequence[Term], context_length: int) -> float:
    """Matrix parameters that a layer's predictions use per position."""
    predictions = [term for term in rows if term.task is None]
    if not predictions:
        return 0.0
    offsets = sorted({term.offset for term in predictions})
    linears = heads.linears(predictions[0].layer, offsets)
    everywhere = any(term.positions == "all" for term in predictions)
    return _matrices(*linears) / (1 if everywhere else context_length)


def _trunk_matrices(transformer: CharTransformer, depth: int) -> int:
    return _matrices(transformer.blocks[:depth], transformer.ngram_embedding or nn.Identity())


def _matrices(*modules: nn.Module) -> int:
    parts = (part for module in modules for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def _moments(objective: Objective, train: TrainConfig) -> dict[nn.Parameter, float]:
    """How many numbers optimizers keep for each element of a parameter."""
    usual = {"adamw": 2, "muon": 2, "sgd": int(train.momentum > 0)}[train.optimizer]
    moments = dict.fromkeys(objective.parameters(), usual)
    transformer = objective.transformer
    if transformer.ngram_embedding is not None:
        moments |= {table: 1 / table.shape[1] for table in transformer.ngram_embedding.tables.parameters()}
    if train.optimizer == "muon":
        blocks = transformer.blocks.parameters()
        moments |= {parameter: 1 for parameter in blocks if parameter.ndim == 2}
    return moments
