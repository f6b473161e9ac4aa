"""How the gradients of several losses reach the trunk.

A loss here is that of one layer l: the weighted sum of its rows, or lambda_l times their weighted mean, where lambda_l
is the sum of their weights at a step's progress. theta_l, the trunk up to layer l, are embeddings, position tables and
blocks. All else is heads: the exits' norms, too, of which the last layer's is the transformer's final norm.

Clipping and weight decay belong to an update: where a step has several, what is in more than one decays in each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import AuxConfig, Config, UserError
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import LossReport, Objective
from charlm.objective.terms import Term, active

OptimizerFactory = Callable[[Sequence[nn.Parameter]], list[Optimizer]]
"""Optimizers that together own the given parameters, each once."""


@dataclass(frozen=True)
class Update:
    """What moves parameters once: gradients, and the optimizers that take them."""

    gradients: dict[nn.Parameter, Tensor]
    step_sizes: dict[Optimizer, float]
    """What each optimizer's learning rate is to be multiplied by."""

    def install(self) -> None:
        """Lay the gradients where optimizers look for them."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def clear(self) -> None:
        """Take them away again."""
        for parameter in self.gradients:
            parameter.grad = None


class Joint:
    """One backward pass of the sum of all losses, and one update."""

    one_backward = True
    """A forward pass has one backward pass, as DDP's reducer expects; otherwise the gradients are averaged by hand."""

    def __init__(self, objective: Objective, aux: AuxConfig, build: OptimizerFactory):
        self.objective, self.aux = objective, aux
        self.parameters, self.heads = list(objective.parameters()), head_parameters(objective)
        self.optimizers = self._build(build)

    def passes(self, progress: float) -> list[list[int] | None]:
        """The layers whose losses each pass over a step's windows computes (None: all); updates follow each pass."""
        return [None]

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        """Add the gradient of a micro-batch, times `factor`, to what this pass has already.

        Args:
            backward: torch.autograd.backward of a scalar, or what stands in for it; takes its keywords.
        """
        backward(report.total * factor)

    def updates(self, progress: float) -> list[Update]:
        """The updates that follow a pass, in their order; the gradients are theirs from then on."""
        return [Update(self._take_gradients(), dict.fromkeys(self.optimizers, 1.0))]

    def _build(self, build: OptimizerFactory) -> list[Optimizer]:
        return build(self.parameters)

    def _take_gradients(self) -> dict[nn.Parameter, Tensor]:
        gradients = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        return gradients


class Relay(Joint):
    """The loss of layer l < L reaches its head and the layers l-k+1 to l, k = `aux.relay_layers`, and nothing below, as
    if the states that layer l-k hands on were constant (the method that PSPNet contrasts itself with).

    A layer's own position table is part of it. Embeddings, and a table at the input, learn from the last layer's loss,
    which reaches everything, and from those of layers l <= k.
    """

    one_backward = False

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        transformer, depth = self.objective.transformer, self.aux.relay_layers
        blocked = blocked_layers(report.by_layer, transformer.config.num_layers, depth)
        whole = [loss for layer, loss in report.by_layer.items() if layer not in blocked]
        for index, layer in enumerate(blocked, start=1):
            reached = [*self.heads, *trunk_parameters(transformer, layer - depth + 1, layer)]
            more = index < len(blocked) or bool(whole)
            backward(report.by_layer[layer] * factor, inputs=reached, retain_graph=more)
        if whole:
            backward(torch.stack(whole).sum() * factor)


class Pairwise(Joint):
    """For one loss after the other, from the lowest layer on: a forward pass to its layer, a backward pass, and an
    update of theta_l and the layer's heads; the next loss sees them updated (AuxNet, "pair-wise").

    A micro-batch has the same dropout noise in all these passes. All losses share one optimizer state.
    """

    def passes(self, progress: float) -> list[list[int] | None]:
        return [[layer] for layer in loss_weights(self.objective.terms, progress)]


class Multiway(Joint):
    """One forward pass and the gradient of every loss by itself; then, from the lowest layer on, an update of theta_l
    and the layer's heads for each, by optimizers that learn from no other loss (AuxNet, "multi-way").

    The trunk's gradient is that of lambda_l times the layer's mean loss. Under `aux.step_sizes` "auxnet" the trunk's
    learning rate is divided by the sum of lambda_j over the active layers j >= l, and the heads learn from the mean
    loss itself; under "common" neither: plain SGD then makes the same step as the joint way.
    """

    one_backward = False

    def _build(self, build: OptimizerFactory) -> list[Optimizer]:
        self.gradients: dict[int, dict[nn.Parameter, Tensor]] = {}
        self.of_trunk, self.of_heads = {}, {}
        for layer in sorted({term.layer for term in self.objective.terms}):
            self.of_trunk[layer] = build(trunk_parameters(self.objective.transformer, 1, layer))
            self.of_heads[layer] = build(self.heads)
            for optimizer in (*self.of_trunk[layer], *self.of_heads[layer]):
                for group in optimizer.param_groups:
                    group["state_prefix"] = f"layer{layer}/"
        return [optimizer for of in (self.of_trunk, self.of_heads) for own in of.values() for optimizer in own]

    def backward(self, report: LossReport, factor: float, backward: Callable[..., None]) -> None:
        highest = max(report.by_layer)
        for layer, loss in report.by_layer.items():
            Update(self.gradients.get(layer, {}), {}).install()
            backward(loss * factor, retain_graph=layer != highest)
            self.gradients[layer] = self._take_gradients()

    def updates(self, progress: float) -> list[Update]:
        weights = loss_weights(self.objective.terms, progress)
        of_auxnet = self.aux.step_sizes == "auxnet"
        sizes = auxnet_step_sizes(weights) if of_auxnet else dict.fromkeys(weights, 1.0)
        heads = set(self.heads) if of_auxnet else set()
        updates = []
        for layer, gradients in self.gradients.items():
            for parameter in heads & gradients.keys():
                gradients[parameter] /= weights[layer]
            step_sizes = dict.fromkeys(self.of_trunk[layer], sizes[layer]) | dict.fromkeys(self.of_heads[layer], 1.0)
            updates.append(Update(gradients, step_sizes))
        self.gradients = {}
        return updates


ROUTES: dict[str, type[Joint]] = {"joint": Joint, "relay": Relay, "pairwise": Pairwise, "multiway": Multiway}


def one_backward(aux: AuxConfig) -> bool:
    """Whether a forward pass of `aux.route` has one backward pass."""
    return ROUTES[aux.route].one_backward


def build_route(aux: AuxConfig, objective: Objective, build: OptimizerFactory) -> Joint:
    """The way of `aux.route`, with its optimizers."""
    return ROUTES[aux.route](objective, aux, build)


def check_route(config: Config, precision: str | None = None, sharded: bool = False) -> None:
    """Raise UserError if `aux.route` cannot be taken.

    Args:
        precision: that the machine and its launcher made of train.mixed_precision; as configured by default.
        sharded: whether parameters are in shards.
    """
    aux, train = config.aux, config.train
    if aux.route == "joint":
        return
    complaints = {
        "fp16 needs a scale for its gradients, which is found for one loss; use --train.mixed_precision=bf16 or fp32": (
            (precision or train.mixed_precision) == "fp16"
        ),
        "FSDP2 gathers and frees shards for one backward pass per step; use --train.sharding=no": sharded,
        "train.micro_batch_size=auto tries out a joint step, and this one needs other memory; give a number": (
            train.micro_batch_size == "auto"
        ),
        "AuxNet's step sizes are made of weights that are known beforehand, and aux.hedge learns them; use "
        "--aux.step_sizes=common, or another route": (
            aux.route == "multiway" and aux.step_sizes == "auxnet" and aux.hedge.enabled
        ),
    }
    for complaint, holds in complaints.items():
        if holds:
            raise UserError(f"aux.route={aux.route}: {complaint}")


def loss_weights(terms: Sequence[Term], progress: float) -> dict[int, float]:
    """lambda_l of every layer with an active row, from the lowest on."""
    weights: dict[int, float] = {}
    for term, weight in active(terms, progress):
        weights[term.layer] = weights.get(term.layer, 0.0) + weight
    return dict(sorted(weights.items()))


def auxnet_step_sizes(weights: dict[int, float]) -> dict[int, float]:
    """1 / sum of lambda_j over j >= l, for every layer l: lower layers are in more updates, and make smaller ones."""
    return {layer: 1.0 / sum(weights[above] for above in weights if above >= layer) for layer in weights}


def blocked_layers(layers: Sequence[int], num_layers: int, depth: int) -> list[int]:
    """Those whose loss does not reach the embeddings, if a loss is blocked `depth` layers below its head."""
    return [layer for layer in layers if depth < layer < num_layers]


def trunk_parameters(transformer: CharTransformer, lowest: int, highest: int) -> list[nn.Parameter]:
    """The parameters of layers `lowest` to `highest`, each with its position table; of the embeddings, too, if
    `lowest` is 1 or less."""
    layers = slice(max(lowest, 1) - 1, highest)
    modules: list[nn.Module] = [*transformer.blocks[layers]]
    if lowest <= 1:
        modules += [transformer.embedding]
        if transformer.ngram_embedding is not None:
            modules += [transformer.ngram_embedding]
    return [*transformer.position_tables[layers], *(p for module in modules for p in module.parameters())]


def head_parameters(objective: Objective) -> list[nn.Parameter]:
    """All that is no part of the trunk."""
    trunk = set(trunk_parameters(objective.transformer, 1, objective.transformer.config.num_layers))
    return [parameter for parameter in objective.parameters() if parameter not in trunk]
