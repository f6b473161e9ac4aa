"""The routes of gradients against updates written out by hand, with torch.autograd.grad and p -= lr * g."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from charlm.config import AuxConfig, Config, LayersConfig, TrainConfig
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.objective.routes import ROUTES, Joint, OptimizerFactory, check_route, loss_weights, trunk_parameters
from charlm.training.optimizers import build_optimizers, set_learning_rates
from tiny import refused, small_model

V, LR, STEPS = 5, 0.05, 3
HEDGE = {"enabled": True}
LAYERS = LayersConfig(schedule="constant", weight=0.5)
# Of each layer the next character at full weight and the one after it at half.
LAMBDAS = {1: 0.75, 2: 0.75, 3: 1.5}


def objective_of(randomise, aux: AuxConfig, **model) -> Objective:
    config = Config(model=small_model(num_layers=3, context_length=6, **model), aux=aux)
    return randomise(build_objective(config, V), 3)


def some_windows(objective: Objective, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(V, (4, objective.window_length), generator=generator)


def sgd(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=LR)]


def route_of(objective: Objective, aux: AuxConfig, build: OptimizerFactory = sgd) -> Joint:
    return ROUTES[aux.route](objective, aux, build)


def take_step(route: Joint, windows_BW: Tensor, progress: float = 0.0, parts: int = 1) -> None:
    """A step as the training loop makes it, the windows cut into equal parts."""
    for layers in route.passes(progress):
        for part_BW in windows_BW.chunk(parts):
            report = route.objective(part_BW, progress, layers)
            route.backward(report, 1 / parts, lambda loss, **options: loss.backward(**options))
        for update in route.updates(progress):
            for optimizer, step_size in update.step_sizes.items():
                rates = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    group["lr"] *= step_size
                with update.in_place():
                    optimizer.step()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
        route.objective.zero_grad()
    assert all(parameter.grad is None for parameter in route.objective.parameters())


def gradients_of(loss: Tensor, objective: Objective) -> dict[str, Tensor]:
    """The gradients of a loss by parameter name, of those that it reaches."""
    named = dict(objective.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def is_head(name: str) -> bool:
    return name.startswith("heads.") or "final_norm" in name


@torch.no_grad()
def move(objective: Objective, gradients: dict[str, Tensor], rate: Callable[[str], float] = lambda _: LR) -> None:
    for name, gradient in gradients.items():
        objective.get_parameter(name).sub_(rate(name) * gradient)


def joint_by_hand(objective: Objective, windows_BW: Tensor) -> None:
    report = objective(windows_BW, 0.0)
    move(objective, gradients_of(sum(report.by_layer.values()), objective))


def pairwise_by_hand(objective: Objective, windows_BW: Tensor) -> None:
    for layer in LAMBDAS:
        move(objective, gradients_of(objective(windows_BW, 0.0).by_layer[layer], objective))


def joint_with_step_sizes_by_hand(objective: Objective, windows_BW: Tensor) -> None:
    """AuxNet's: layer l of the trunk at the rate over the sum of lambda_j, j >= l; heads by their mean loss."""
    report = objective(windows_BW, 0.0)
    gradients = gradients_of(sum(report.by_layer.values()), objective)

    def rate(name: str) -> float:
        if "final_norm" in name:
            return LR / LAMBDAS[3]
        layer = re.search(r"layer(\d)", name) if is_head(name) else None
        block = re.search(r"(?:blocks|position_tables)\.(\d)", name)
        lowest = int(block[1]) + 1 if block else 1
        return LR / (LAMBDAS[int(layer[1])] if layer else sum(LAMBDAS[own] for own in LAMBDAS if own >= lowest))

    move(objective, gradients, rate)


def pairwise_with_step_sizes_by_hand(objective: Objective, windows_BW: Tensor) -> None:
    for layer, weight in LAMBDAS.items():
        above = sum(other for number, other in LAMBDAS.items() if number >= layer)
        gradients = gradients_of(objective(windows_BW, 0.0).by_layer[layer], objective)
        move(objective, gradients, lambda name, rates=(LR / weight, LR / above): rates[not is_head(name)])


def multiway_by_hand(objective: Objective, windows_BW: Tensor) -> None:
    report = objective(windows_BW, 0.0)
    mean_loss_gradients = {
        layer: gradients_of(report.by_layer[layer] / weight, objective) for layer, weight in LAMBDAS.items()
    }
    for layer, weight in LAMBDAS.items():
        above = sum(other for number, other in LAMBDAS.items() if number >= layer)
        move(
            objective,
            mean_loss_gradients[layer],
            lambda name, weight=weight, above=above: LR if is_head(name) else LR / above * weight,
        )


def relay_by_hand(objective: Objective, windows_BW: Tensor, depth: int) -> None:
    """One forward pass for each loss, in which the states below are detached."""
    transformer = objective.transformer
    total = objective(windows_BW, 0.0).by_layer[3]
    for layer in (1, 2):
        x_BTD = transformer.embedding(windows_BW[:, :6])
        for number in range(1, layer + 1):
            if number == layer - depth + 1 and number > 1:
                x_BTD = x_BTD.detach()
            if number <= len(transformer.position_tables):
                x_BTD = x_BTD + transformer.position_tables[number - 1]
            x_BTD = transformer.blocks[number - 1](x_BTD)
        total = total + objective.losses({layer: x_BTD}, windows_BW, objective.active_rows(0.0, [layer])).total
    move(objective, gradients_of(total, objective))


BY_HAND = {
    "joint": joint_by_hand,
    "pairwise": pairwise_by_hand,
    "multiway": multiway_by_hand,
    "joint-weighted": joint_with_step_sizes_by_hand,
    "pairwise-weighted": pairwise_with_step_sizes_by_hand,
    "multiway-weighted": multiway_by_hand,
    "relay-1": lambda objective, windows_BW: relay_by_hand(objective, windows_BW, 1),
    "relay-2": lambda objective, windows_BW: relay_by_hand(objective, windows_BW, 2),
}


def aux_of(way: str, **options) -> AuxConfig:
    route, _, how = way.partition("-")
    if how == "weighted":
        options["step_sizes"] = how
    elif how:
        options["relay_layers"] = int(how)
    return AuxConfig(layers=LAYERS, route=route, **options)


def assert_same_parameters(left: Objective, right: Objective, tolerance: float = 1e-6) -> None:
    """Compare norms: the order of additions differs between processors and moves single weights further."""
    for (name, parameter), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert (parameter - other).norm() <= tolerance * (other.norm() + LR), name


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("way", BY_HAND)
def test_updates_by_hand(way, norm, randomise):
    """Guards against a loss that reaches too many or too few parameters; a later loss of pairwise that sees parameters
    from before the update; one of multiway that sees them after; step sizes of the wrong losses."""
    routed, by_hand = (
        objective_of(randomise, aux_of(way), norm=norm, position_encoding="input" if norm == "pre" else "per_layer")
        for _ in range(2)
    )
    route = route_of(routed, aux_of(way))
    for step in range(STEPS):
        take_step(route, some_windows(routed, step))
        BY_HAND[way](by_hand, some_windows(by_hand, step))
        assert_same_parameters(routed, by_hand, 1e-5)


@pytest.mark.parametrize("way", ["pairwise", "multiway", "relay-3"])
def test_learned_weights_scale_the_gradients_of_every_route(way, randomise):
    """Guards against a route that ignores the weights of aux.hedge, and gradients that are lost, counted twice, or
    taken after an update: with one step size multiway makes the steps of joint."""
    hedged = {"hedge": HEDGE, "step_sizes": "common"}
    apart, together = (objective_of(randomise, aux_of(each, **hedged)) for each in (way, "joint"))
    for objective, each in ((apart, way), (together, "joint")):
        objective.hedge.weights.copy_(torch.tensor([0.2, 0.7, 0.1]))
        route = route_of(objective, aux_of(each, **hedged))
        if way == "pairwise":  # whose first loss alone is that of joint
            objective.terms = tuple(term for term in objective.terms if term.layer == 1)
        for step in range(1 if way == "pairwise" else 5):
            take_step(route, some_windows(objective, step))
    assert_same_parameters(apart, together, 1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("step_sizes", ["weighted", "auxnet"])
def test_weights_of_multiway_under_every_optimizer(step_sizes, optimizer, randomise):
    """Guards against a weight that a loss's own scale-free state cancels, and old runs that continue by other steps."""
    train, moved = TrainConfig(optimizer=optimizer, momentum=0.0), []
    for weight in (0.5, 5.0):
        aux = AuxConfig(layers=LAYERS.replace(weight=weight), route="multiway", step_sizes=step_sizes)
        objective = objective_of(randomise, aux)
        route = route_of(objective, aux, partial(build_optimizers, train, objective))
        matrix = objective.transformer.blocks[0].feed_forward.up.weight
        before = matrix.detach().clone()
        route.backward(objective(some_windows(objective, 0), 0.0), 1.0, torch.autograd.backward)
        first = route.updates(0.0)[0]  # of layer 1's loss
        set_learning_rates(first.step_sizes, 1.0)
        with first.in_place():
            for rule in first.step_sizes:
                rule.step()
        moved.append(float((matrix - before).detach().norm()))
    # lambda / sum of lambdas: 0.75 / 3 and 7.5 / 16.5; where the weight cancels 1 / 3 and 1 / 16.5.
    counts = optimizer == "sgd" or step_sizes == "weighted"
    assert moved[1] / moved[0] == pytest.approx(20 / 11 if counts else 2 / 11, rel=0.02)


@pytest.mark.parametrize("way", ["pairwise", "multiway", "relay-1"])
def test_accumulated_gradients_are_those_of_the_whole_batch(way, randomise):
    """Guards against micro-batches of one loss that are added to those of another, or that update in between."""
    whole, accumulated = (objective_of(randomise, aux_of(way)) for _ in range(2))
    routes = [route_of(objective, aux_of(way)) for objective in (whole, accumulated)]
    for step in range(STEPS):
        for route, parts in zip(routes, (1, 4), strict=True):
            take_step(route, some_windows(whole, step), parts=parts)
    assert_same_parameters(whole, accumulated, 1e-5)


@pytest.mark.parametrize("way", ["pairwise", "multiway", "relay-1"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_updates(way, precision, randomise):
    """Guards against a graph that is freed, or recomputed with other dropout, between two losses of one pass."""
    noisy = {"residual_dropout": 0.3, "attention_dropout": 0.3}
    plain, recomputing = (objective_of(randomise, aux_of(way), **noisy) for _ in range(2))
    recomputing.transformer.activation_checkpointing = True
    for objective in (plain, recomputing):
        route = route_of(objective, aux_of(way))
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            take_step(route, some_windows(objective, 0))
    assert_same_parameters(plain, recomputing, 1e-6)


@pytest.mark.parametrize("way", ["joint", "pairwise", "multiway", "relay-1"])
def test_a_silent_loss_moves_nothing_and_has_no_state(way, randomise):
    """Guards against a head that momentum or decay carries on, and a loss that costs memory before it wakes."""
    aux = AuxConfig(route=way.partition("-")[0])  # layer 1 falls silent at 1/6, layer 2 at 1/3
    objective = objective_of(randomise, aux)
    route = route_of(objective, aux, lambda own: [torch.optim.AdamW(own, lr=LR, weight_decay=0.1)])
    take_step(route, some_windows(objective, 0), progress=0.2)
    states = {parameter for optimizer in route.optimizers for parameter in optimizer.state}
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    take_step(route, some_windows(objective, 1), progress=0.5)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    assert not any("exits.layer1." in names[parameter] for parameter in states)
    for name, parameter in objective.named_parameters():
        silent = any(f"exits.layer{layer}." in name for layer in (1, 2))
        assert torch.equal(parameter, before[name]) is silent, name


@pytest.mark.parametrize("head", ["shared", "shared_frozen", "tower"])
@pytest.mark.parametrize("way", ["pairwise", "multiway", "relay-1"])
def test_routes_of_other_heads(way, head, randomise):
    """Guards against a shared classifier that only the last loss moves, and a frozen one that moves."""
    route, _, depth = way.partition("-")
    layers = {"schedule": "constant", "head": head}
    aux = AuxConfig(layers=layers, main_weight=0.0, route=route, relay_layers=int(depth or 1))
    objective = objective_of(randomise, aux)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    take_step(route_of(objective, aux), some_windows(objective, 0))
    moved = {name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("exits.layer3" in name for name in moved) is (head == "shared")
    assert any("tower" in name for name in moved) is (head == "tower")
    assert any("blocks.1" in name for name in moved)
    assert not any("blocks.2" in name for name in moved), "no active loss lies above layer 2"


@pytest.mark.parametrize("ngrams", [(), (2,)])
@pytest.mark.parametrize("positions", ["per_layer", "input", "rotary"])
def test_trunk_and_heads_hold_every_parameter_once(positions, ngrams, randomise):
    """Guards against a parameter that no loss reaches, or that counts twice; layers that are cut in the wrong place."""
    objective = objective_of(randomise, AuxConfig(layers=LAYERS), position_encoding=positions, ngrams=ngrams)
    layers = [trunk_parameters(objective.transformer, layer, layer) for layer in (1, 2, 3)]
    heads = route_of(objective, AuxConfig()).heads
    owned = [*heads, *(parameter for layer in layers for parameter in layer)]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(objective.parameters())
    assert set(trunk_parameters(objective.transformer, -1, 2)) == {*layers[0], *layers[1]}
    assert set(trunk_parameters(objective.transformer, 2, 3)) == {*layers[1], *layers[2]}
    assert {parameter for name, parameter in objective.named_parameters() if is_head(name)} == set(heads)


def test_weights_by_hand(randomise):
    """Guards against weights that leave out a row or the schedule."""
    aux = AuxConfig(targets={"num_targets": 3, "weight": 0.25}, main_weight=2.0)
    terms = objective_of(randomise, aux).terms
    assert loss_weights(terms, 0.0) == {1: 1.5, 2: 1.5, 3: 3.0}
    assert loss_weights(terms, 0.2) == {2: 1.5, 3: 3.0}
    assert loss_weights(terms, 0.5) == {3: 3.0}


@pytest.mark.parametrize(
    ("aux", "train", "options", "message"),
    [
        ({"route": "relay"}, {"mixed_precision": "fp16"}, {}, "fp16"),
        ({"route": "multiway"}, {}, {"precision": "fp16"}, "fp16"),
        ({"route": "pairwise"}, {}, {"sharded": True}, "FSDP2"),
        ({"route": "pairwise"}, {"micro_batch_size": "auto"}, {}, "micro_batch_size=auto"),
        ({"route": "multiway", "hedge": HEDGE}, {}, {}, "aux.step_sizes=common"),
        ({"route": "joint", "hedge": HEDGE, "step_sizes": "weighted"}, {}, {}, "aux.step_sizes=common"),
        ({"route": "relay", "step_sizes": "weighted"}, {}, {}, "aux.step_sizes=common"),
    ],
)
def test_excluded_combinations_are_refused(aux, train, options, message):
    """Guards against a run that fails at its first step, or minimises another loss than configured."""
    with refused("aux.route", message):
        check_route(Config(aux=AuxConfig(**aux), train=TrainConfig(**train)), **options)


def test_other_combinations_are_accepted():
    """Guards against refusals that are wider than their reason."""
    for route in ("joint", "relay", "pairwise"):
        check_route(Config(aux=AuxConfig(route=route, hedge=HEDGE)), precision="bf16")
    check_route(Config(aux=AuxConfig(route="multiway", step_sizes="common", hedge=HEDGE)))
    for step_sizes in ("auxnet", "weighted"):
        train = TrainConfig(mixed_precision="fp16", micro_batch_size="auto")
        check_route(Config(aux=AuxConfig(step_sizes=step_sizes), train=train), sharded=True)
