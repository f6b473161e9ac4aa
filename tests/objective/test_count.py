"""The cost of routes, against sums written out and against optimizers that ran."""

from functools import partial

import pytest
import torch
from torch import Tensor

from charlm.config import AuxConfig, Config, LayersConfig, TargetsConfig, TrainConfig
from charlm.model.transformer import CharTransformer
from charlm.objective.build import build_objective
from charlm.objective.count import num_parameters, route_cost, transformer_parameters
from charlm.objective.routes import ROUTES
from charlm.training.optimizers import build_optimizers
from tiny import small_model

V = 5


def test_costs_by_hand():
    """Guards against costs that leave out a pass: 12 layers, losses at 3, 6 and 12, k = 2, no activation kept."""
    D, T, F, N = 8, 6, 16, 12
    model = small_model(num_layers=N, context_length=T, position_encoding="input", norm="pre")
    costs = {}
    for route in ("joint", "relay", "pairwise", "multiway"):
        layers = LayersConfig(schedule="constant", at=(3, 6))
        aux = AuxConfig(layers=layers, targets=TargetsConfig(enabled=False), route=route, relay_layers=2)
        for recomputing in (False, True):
            config = Config(model=model, aux=aux, train=TrainConfig(activation_checkpointing=recomputing))
            with torch.device("meta"):
                costs[route, recomputing] = route_cost(config, build_objective(config, V))
    layer, head = 2 * (4 * D * D + 2 * D * F) + 4 * D * T, 2 * D * V
    passes = {"joint": (12, 12), "relay": (12, 12 + 2 + 2), "pairwise": (21, 21), "multiway": (12, 21)}
    for (route, recomputing), cost in costs.items():
        forward, backward = passes[route]
        r = 3 if recomputing else 2
        assert cost.forward == pytest.approx((forward * layer + 3 * head) / (12 * layer + 3 * head))
        assert cost.backward == pytest.approx((r * backward * layer + 6 * head) / (r * 12 * layer + 6 * head))
        whole = (forward + r * backward) * layer + 9 * head
        assert cost.total == pytest.approx(whole / ((1 + r) * 12 * layer + 9 * head))
    block = 4 * (D * D + D) + 2 * D * F + F + D + 2 * 2 * D
    bottom, classifier, norm = V * D + T * D, V * D + V, 2 * D
    sets = {depth: bottom + depth * block + norm + classifier for depth in (3, 6, 12)}
    everything = bottom + 12 * block + 3 * (norm + classifier)
    repeated = sum(sets.values()) - everything
    touched = sets[6] + norm + classifier
    for (route, _), cost in costs.items():
        assert cost.gradients == (repeated if route == "multiway" else 0)
        assert cost.optimizer_state == (2 * repeated if route == "multiway" else 0)
        assert cost.copies == (3 * touched if route == "pairwise" else 0)


@pytest.mark.parametrize(
    ("kind", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0), ("muon", 0.9)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("head", ["linear", "shared", "shared_frozen", "tower"])
def test_costs_are_those_of_a_step(head, kind, momentum):
    """Guards against counts of gradients and optimizer state that are not what a step and its optimizers keep."""
    model = small_model(num_layers=3, context_length=6, ngrams=(2,), ngram_buckets=10)
    train = TrainConfig(optimizer=kind, momentum=momentum)
    gradients, state = {}, {}
    for name in ("joint", "multiway"):
        config = Config(model=model, aux=AuxConfig(route=name, layers=LayersConfig(head=head)), train=train)
        objective = build_objective(config, V)
        route = ROUTES[name](objective, config.aux, partial(build_optimizers, train, objective))
        windows_BW = torch.randint(V, (2, objective.window_length), generator=torch.Generator().manual_seed(0))
        route.backward(objective(windows_BW, 0.0), 1.0, lambda loss, **options: loss.backward(**options))
        updates = route.updates(0.0)
        gradients[name] = 0
        for update in updates:
            with update.in_place():
                gradients[name] += sum(p.grad.numel() for p in objective.parameters() if p.grad is not None)
                for optimizer in update.step_sizes:
                    optimizer.step()
        kept = [values for optimizer in route.optimizers for values in optimizer.state.values()]
        tensors = [value for values in kept for value in values.values() if isinstance(value, Tensor)]
        state[name] = sum(tensor.numel() for tensor in tensors if tensor.ndim)
    cost = route_cost(config, objective)
    assert cost.optimizer_state == state["multiway"] - state["joint"]
    assert cost.gradients == gradients["multiway"] - gradients["joint"]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["per_layer", "input", "rotary"])
@pytest.mark.parametrize("ngrams", [(), (2, 4)], ids=["", "ngrams"])
def test_parameters_are_counted_without_a_model(norm, positions, ngrams):
    """Fault: a formula that the transformer has outgrown, so that a model too large for the machine is begun."""
    tables = {"ngrams": ngrams, "ngram_buckets": 10, "ngram_width": 5}
    config = small_model(num_layers=3, d_ff=20, norm=norm, position_encoding=positions, **tables)
    assert transformer_parameters(config, V) == num_parameters(CharTransformer(config, V))
