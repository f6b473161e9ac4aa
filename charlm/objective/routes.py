"""Routes: ways in which the gradients of several losses reach the trunk (`aux.route`).

The loss of layer l is the weighted sum of its rows; lambda_l is the sum of their weights. theta_l,
the trunk up to layer l, is embeddings, position tables and blocks; other parameters count as heads.
Each update clips by itself, and decays what it moves.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import AuxConfig, Config, UserError
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import LossReport, Objective
from charlm.objective.terms import Term, active_by_layer

OptimizerFactory = Callable[[Sequence[nn.Parameter]], list[Optimizer]]
"""Builds optimizers that own each parameter once."""


@dataclass(frozen=True)
class Update:
    """One move of parameters by some optimizers."""

    step_sizes: dict[Optimizer, float]
    """Factor of each optimizer's learning rate."""
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Those that are not in `.grad` already."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the update's gradients are in `.grad`."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        yield
        for parameter in self.gradients:
            self.gradients[parameter], parameter.grad = parameter.grad, None


class Joint:
    """One backward pass of the sum of all losses, and one update. Gradients stay in `.grad`."""

    one_backward = True
    """Whether a forward pass has one backward pass, as DDP's reducer expects."""

    def __init__(self, objective: Objective, aux: AuxConfig, build: OptimizerFactory):
        self.objective = objective
        self.aux = aux
        self.parameters = list(objective.parameters())
        trunk = set(trunk_parameters(objective.transformer, 1, objective.heads.last_layer))
        self.heads = [parameter for parameter in self.parameters if parameter not in trunk]
        self.optimizers = self._build(build)

    def passes(self, progress: float) -> list[list[int] | None]:
        """The layers of each pass over the windows; None: all."""
        return [None]

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        """Add `factor` times a gradient; `backward` is like torch.autograd.backward."""
        self.passed = list(report.by_layer)
        backward(report.total * factor)

    def updates(self, progress: float) -> list[Update]:
        """Updates to make after a pass, in order."""
        if self.aux.step_sizes == "weighted":
            for parameter, divisor in self._divisors(progress).items():
                if parameter.grad is not None:
                    parameter.grad /= divisor
        return [Update(dict.fromkeys(self.optimizers, 1.0))]

    def _divisors(self, progress: float) -> dict[nn.Parameter, float]:
        """lambda_l for the heads of layer l, the sum of lambda_j over j >= l for theta_l."""
        objective, at_or_above, divisors = self.objective, 0.0, defaultdict(float)
        for layer, rows in reversed(active_by_layer(objective.terms, progress).items()):
            weight = sum(weight for _, weight in rows)
            at_or_above += weight
            if layer in self.passed:
                for parameter in learning_from(objective, [term for term, _ in rows]):
                    divisors[parameter] += weight
                trunk = trunk_parameters(objective.transformer, 1, layer)
                divisors |= dict.fromkeys(trunk, at_or_above)
        return divisors

    def _build(self, build: OptimizerFactory) -> list[Optimizer]:
        return build(self.parameters)


class Relay(Joint):
    """The loss of layer l < L reaches its head and layers l-k+1 to l, k = `aux.relay_layers`.

    PSPNet compares itself with this. A layer includes its position table, layer 1 the embeddings.
    """

    one_backward = False

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        transformer, depth = self.objective.transformer, self.aux.relay_layers
        blocked = blocked_layers(report.by_layer, transformer.config.num_layers, depth)
        whole = [loss for layer, loss in report.by_layer.items() if layer not in blocked]
        for layer in blocked:
            reached = [*self.heads, *trunk_parameters(transformer, layer - depth + 1, layer)]
            last = layer == blocked[-1] and not whole
            backward(report.by_layer[layer] * factor, inputs=reached, retain_graph=not last)
        if whole:
            backward(torch.stack(whole).sum() * factor)


class Pairwise(Joint):
    """A forward and a backward pass and an update for each loss (AuxNet, "pair-wise").

    From the lowest layer up each pass runs to its layer, with the same dropout, and each update
    moves theta_l and the layer's heads. They share one optimizer state.
    """

    def passes(self, progress: float) -> list[list[int] | None]:
        return [[layer] for layer in loss_weights(self.objective.terms, progress)]


class Multiway(Joint):
    """One forward pass, and for each loss a gradient, an update and optimizers (AuxNet, "multi-way").

    From the lowest layer up each update moves theta_l and the layer's heads. `aux.step_sizes` sums
    over active layers j >= l; under "common" plain SGD makes the joint step.
    """

    one_backward = False

    def _build(self, build: OptimizerFactory) -> list[Optimizer]:
        self.gradients: dict[int, dict[nn.Parameter, Tensor]] = {}
        self.of_trunk: dict[int, list[Optimizer]] = {}
        self.of_heads: dict[int, list[Optimizer]] = {}
        for layer in sorted({term.layer for term in self.objective.terms}):
            self.of_trunk[layer] = build(trunk_parameters(self.objective.transformer, 1, layer))
            self.of_heads[layer] = build(self.heads)
            for optimizer in (*self.of_trunk[layer], *self.of_heads[layer]):
                for group in optimizer.param_groups:
                    group["state_prefix"] = f"layer{layer}/"
        return list(chain(*self.of_trunk.values(), *self.of_heads.values()))

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        highest = max(report.by_layer)
        for layer, loss in report.by_layer.items():
            with Update({}, self.gradients.get(layer, {})).in_place():
                backward(loss * factor, retain_graph=layer != highest)
                self.gradients[layer] = {p: p.grad for p in self.parameters if p.grad is not None}
                for parameter in self.gradients[layer]:
                    parameter.grad = None

    def updates(self, progress: float) -> list[Update]:
        weights = loss_weights(self.objective.terms, progress)
        updates, weighted = [], self.aux.step_sizes == "weighted"
        for layer, gradients in self.gradients.items():
            step_size = 1.0
            if self.aux.step_sizes != "common":
                above = [weight for other, weight in weights.items() if other >= layer]
                step_size = (weights[layer] if weighted else 1.0) / sum(above)
                divided = self.parameters if weighted else self.heads
                for parameter in gradients.keys() & set(divided):
                    gradients[parameter] /= weights[layer]
            step_sizes = dict.fromkeys(self.of_trunk[layer], step_size)
            step_sizes |= dict.fromkeys(self.of_heads[layer], 1.0)
            updates.append(Update(step_sizes, gradients))
        self.gradients = {}
        return updates


ROUTES = {"joint": Joint, "relay": Relay, "pairwise": Pairwise, "multiway": Multiway}


def check_route(config: Config, precision: str | None = None, sharded: bool = False) -> None:
    """Raise UserError if `aux.route` excludes an option; `precision` is the one in use."""
    aux, train = config.aux, config.train
    apart, weighted = aux.route != "joint", aux.step_sizes == "weighted"
    fp16 = (precision or train.mixed_precision) == "fp16"
    searched = train.micro_batch_size == "auto"
    fixed = weighted or (aux.route == "multiway" and aux.step_sizes == "auxnet")
    for holds, complaint in (
        (apart and fp16, "fp16 scales one loss; use --train.mixed_precision=bf16"),
        (apart and sharded, "FSDP2 allows one backward pass; use --train.sharding=no"),
        (apart and searched, "train.micro_batch_size=auto is for joint; give a number"),
        (fixed and aux.hedge.enabled, "aux.hedge changes weights; use --aux.step_sizes=common"),
        (weighted and aux.route == "relay", "has no step sizes; use --aux.step_sizes=common"),
    ):
        if holds:
            raise UserError(f"aux.route={aux.route}: {complaint}", "aux.route")


def loss_weights(terms: Sequence[Term], progress: float) -> dict[int, float]:
    """lambda_l of every layer with an active row, from the lowest up."""
    rows = active_by_layer(terms, progress)
    return {layer: sum(weight for _, weight in own) for layer, own in rows.items()}


def blocked_layers(layers: Sequence[int], num_layers: int, depth: int) -> list[int]:
    """The layers whose loss, going down `depth` layers, reaches no embeddings."""
    return [layer for layer in layers if depth < layer < num_layers]


def learning_from(objective: Objective, rows: Sequence[Term]) -> list[nn.Parameter]:
    """The parameters that the loss of one layer's `rows` reaches, except by relay."""
    layer, heads = rows[0].layer, objective.heads
    offsets = sorted({term.offset for term in rows if term.task is None})
    last = layer == heads.last_layer
    modules: list[nn.Module] = [objective.transformer.final_norm] if last else []
    if offsets and (last or not heads.frozen):
        modules += [heads.norm(layer), *heads.linears(layer, offsets)]
    modules += [objective.tasks[term.task] for term in rows if term.task is not None]
    trunk = trunk_parameters(objective.transformer, 1, layer)
    return [*trunk, *nn.ModuleList(modules).parameters()]


def trunk_parameters(transformer: CharTransformer, lowest: int, highest: int) -> list[nn.Parameter]:
    """The parameters of layers `lowest` to `highest`; with layer 1 the embeddings."""
    layers = slice(max(lowest, 1) - 1, highest)
    modules: list[nn.Module] = [*transformer.blocks[layers]]
    if lowest <= 1:
        modules += [transformer.embedding, transformer.ngram_embedding or nn.Identity()]
    return [*transformer.position_tables[layers], *nn.ModuleList(modules).parameters()]
