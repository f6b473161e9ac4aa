"""What a way of gradients costs in time and memory, counted before anything is trained."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from charlm.config import Config, TrainConfig
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import Objective
from charlm.objective.routes.routing import blocked_layers, trunk_parameters
from charlm.objective.terms import active


@dataclass(frozen=True)
class RouteCost:
    """What a way costs at the start of training, when the most losses are active, against the joint way."""

    forward: float
    """Floating-point operations of the forward passes of a step, the joint way's being 1."""
    backward: float
    """Of the backward passes, likewise."""
    total: float
    """Of both together: the time of a step, about, where it is spent computing."""
    gradients: int
    """Numbers that gradients take beyond one for each parameter."""
    optimizer_state: int
    """Numbers that optimizers keep beyond the joint way's."""
    copies: int
    """Numbers copied in each step, of parameters and optimizer state, in case that it must be taken back."""


def route_cost(config: Config, objective: Objective) -> RouteCost:
    """The cost of `aux.route` for a model, which may be on the meta device.

    Of n layers up to the highest active one, of f operations each per character in a forward pass (2 for each matrix
    parameter, and attention's 4 D T), with losses at layers l_1 < ... < l_K = n whose heads take h_1, ..., h_K. A
    backward pass takes twice the operations; 3 f in place of 2 f a layer, r = 3, where activations are recomputed.

              forward             backward
        joint      n f + sum h_k       r n f + 2 sum h_k
        relay      n f + sum h_k       r (a + sum of k over blocked losses) f + 2 sum h_k
        pairwise   sum (l_k f + h_k)   sum (r l_k f + 2 h_k)
        multiway   n f + sum h_k       sum (r l_k f + 2 h_k)

    where a is the highest layer whose loss reaches everything. Embeddings and updates are not counted.

    P_k parameters learn from loss k. Multiway holds sum P_k gradients and state for as many, where the joint way has
    one for each parameter that learns at all; pairwise copies what the losses but the last move, once, with its state.
    """
    aux, transformer, depth = config.aux, objective.transformer, config.aux.relay_layers
    losses = sorted({term.layer for term, _ in active(objective.terms, 0.0)})
    blocked = blocked_layers(losses, transformer.config.num_layers, depth)
    relayed = max((layer for layer in losses if layer not in blocked), default=0) + depth * len(blocked)
    once, each = losses[-1], sum(losses)
    forward_layers = {"pairwise": each}.get(aux.route, once)
    backward_layers = {"relay": relayed, "pairwise": each, "multiway": each}.get(aux.route, once)
    of_layer, of_heads = _layer_flops(transformer), sum(_head_flops(objective, layer) for layer in losses)
    factor = 3 if config.train.activation_checkpointing else 2
    forward, joint_forward = (layers * of_layer + of_heads for layers in (forward_layers, once))
    backward, joint_backward = (factor * layers * of_layer + 2 * of_heads for layers in (backward_layers, once))

    learning = [_learning_from(objective, layer) for layer in losses]
    everything = {parameter for own in learning for parameter in own}
    repeated = [parameter for own in learning for parameter in own] if aux.route == "multiway" else everything
    moved = {parameter for own in learning[:-1] for parameter in own} if aux.route == "pairwise" else ()
    state_of = _state_sizes(config.train, transformer)
    return RouteCost(
        forward=forward / joint_forward,
        backward=backward / joint_backward,
        total=(forward + backward) / (joint_forward + joint_backward),
        gradients=_size(repeated) - _size(everything),
        optimizer_state=sum(map(state_of, repeated)) - sum(map(state_of, everything)),
        copies=_size(moved) + sum(map(state_of, moved)),
    )


def _layer_flops(transformer: CharTransformer) -> int:
    matrices = sum(parameter.numel() for parameter in transformer.blocks[0].parameters() if parameter.ndim == 2)
    return 2 * matrices + 4 * transformer.config.d_model * transformer.config.context_length


def _head_flops(objective: Objective, layer: int) -> float:
    """Of the predictions of a layer; a task of one's own is not counted."""
    rows = [term for term, _ in active(objective.terms, 0.0) if term.layer == layer and term.task is None]
    if not rows:
        return 0.0
    matrices = objective.heads.linears(layer, sorted({term.offset for term in rows}))
    everywhere = any(term.positions == "all" for term in rows)
    positions = 1 if everywhere else 1 / objective.transformer.config.context_length
    return 2 * sum(matrix.weight.numel() for matrix in matrices) * positions


def _learning_from(objective: Objective, layer: int) -> list[nn.Parameter]:
    """The parameters that learn from the loss of `layer` at the start of training."""
    rows = [term for term, _ in active(objective.terms, 0.0) if term.layer == layer]
    offsets = sorted({term.offset for term in rows if term.task is None})
    last = layer == objective.transformer.config.num_layers
    modules: list[nn.Module] = [objective.transformer.final_norm] if last else []
    if offsets and (last or not objective.heads.frozen):
        modules += [objective.heads.norm(layer), *objective.heads.linears(layer, offsets)]
    modules += [objective.tasks[term.task] for term in rows if term.task is not None]
    return [*trunk_parameters(objective.transformer, 1, layer), *(p for module in modules for p in module.parameters())]


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _state_sizes(train: TrainConfig, transformer: CharTransformer) -> Callable[[nn.Parameter], int]:
    """How many numbers the optimizer of a parameter keeps: two moments of Adam's for each, a momentum, or none."""
    matrices = {parameter for parameter in transformer.blocks.parameters() if parameter.ndim == 2}
    ngrams = transformer.ngram_embedding
    tables = set(ngrams.tables.parameters()) if ngrams is not None else set()

    def size(parameter: nn.Parameter) -> int:
        if parameter in tables or train.optimizer == "adamw":
            return 2 * parameter.numel()
        if train.optimizer == "muon":
            return (1 if parameter in matrices else 2) * parameter.numel()
        return parameter.numel() if train.momentum else 0

    return size
