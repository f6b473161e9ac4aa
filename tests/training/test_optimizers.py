"""Optimizers against hand arithmetic, and the parameters that each of them owns."""

import math
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from charlm.config import AuxConfig, ModelConfig, TrainConfig
from charlm.model.heads import Heads
from charlm.model.rowwise import RowwiseRMS
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.terms import build_terms
from charlm.training.optimizers import (
    Muon,
    build_optimizers,
    fused_sgd,
    learning_rate_factor,
    set_learning_rates,
)
from charlm.training.update import step_unless
from tiny import refused, typed

WSD = {"steps": 20, "lr_schedule": "wsd", "warmup": 2, "decay_steps": 0.2}
"""Decays over the last 4 of 20 steps."""


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"steps": 10}, {0: 1.0, 5: 1.0, 9: 1.0}),
        ({"steps": 10, "final_lr": 0.1}, {0: 1.0, 9: 1.0}),
        ({"steps": 10, "warmup": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0}),
        ({"steps": 8, "warmup": 0.25}, {0: 0.5, 1: 1.0, 2: 1.0}),
        ({"steps": 10, "warmup": 0.01}, {0: 1.0, 1: 1.0}),
        ({"steps": 10, "warmup": 20}, {0: 0.05, 9: 0.5}),
        ({"steps": 10, "warmup": 1}, {0: 1.0, 1: 1.0}),
        ({"steps": 8, "lr_schedule": "linear"}, {0: 1.0, 2: 0.75, 4: 0.5, 7: 0.125}),
        (
            {"steps": 10, "lr_schedule": "linear", "warmup": 2, "final_lr": 0.2},
            {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.6, 9: 0.3},
        ),
        ({"steps": 8, "lr_schedule": "cosine"}, {0: 1.0, 2: (2 + math.sqrt(2)) / 4, 4: 0.5, 6: (2 - math.sqrt(2)) / 4}),
        ({"steps": 12, "lr_schedule": "cosine", "warmup": 4, "final_lr": 0.5}, {3: 1.0, 4: 1.0, 8: 0.75}),
        (WSD | {"decay_type": "linear"}, {0: 0.5, 1: 1.0, 2: 1.0, 15: 1.0, 16: 1.0, 17: 0.75, 18: 0.5, 19: 0.25}),
        (WSD, {15: 1.0, 16: 1.0, 17: 0.5, 18: 1 - math.sqrt(0.5), 19: 1 - math.sqrt(0.75)}),
        (WSD | {"final_lr": 0.2}, {16: 1.0, 17: 0.6}),
        (WSD | {"decay_steps": 16, "warmup": 4, "decay_type": "linear"}, {3: 1.0, 4: 1.0, 12: 0.5}),  # no hold
        (WSD | {"decay_steps": 0}, {2: 1.0, 19: 1.0}),
    ],
)
def test_learning_rate_by_hand(options, factors):
    """Guards against a first step at rate zero, a decay from the wrong step on, or a warm-up fraction read as steps."""
    train = TrainConfig(**options)
    assert {step: learning_rate_factor(train, step) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize(("warmup", "decay"), [(0.5, 0.6), (17, 0.2), (0, 21)])
def test_a_decay_that_does_not_fit_is_refused(warmup, decay):
    """Guards against a warm-up that ends in the middle of the decay, at the full rate for a step or never."""
    with refused("decay_steps", r"warmup|warm-up"):
        TrainConfig.read(WSD | {"warmup": warmup, "decay_steps": decay})
    TrainConfig.read(WSD | {"warmup": warmup, "decay_steps": decay, "lr_schedule": "cosine"})


def test_a_branch_decays_from_the_rate_of_the_run_that_held():
    """Guards against a decay that depends on the length of the run before it: one long run ends at any step."""
    held = TrainConfig(**WSD | {"steps": 1000, "warmup": 10, "decay_steps": 0})
    for step in (100, 357, 960):
        branch = TrainConfig(**WSD | {"steps": step + 40, "warmup": 10, "decay_steps": 40})
        before, after = range(step + 1), range(step, step + 40)
        assert [learning_rate_factor(branch, n) for n in before] == [learning_rate_factor(held, n) for n in before]
        assert [learning_rate_factor(branch, n) for n in after] == [1 - math.sqrt(n / 40) for n in range(40)]


def line() -> nn.Linear:
    """y = 2x - 1: a weight, which decays, and a bias, which does not."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, -1.0)
    return model


def apply(optimizers: list[Optimizer], model: nn.Linear, gradient: float) -> tuple[float, float]:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    for optimizer in optimizers:
        optimizer.step()
    return model.weight.item(), model.bias.item()


def test_adamw_by_hand():
    """Guards against betas or decay that the optimizer lacks, a bias that decays, or a rate that is not scaled."""
    model = line()
    train = TrainConfig(learning_rate=0.1, weight_decay=0.5, adam_betas=(0.9, 0.99))
    optimizers = build_optimizers(train, model)
    weight, bias, first, second = 2.0, -1.0, 0.0, 0.0
    for step, (gradient, factor) in enumerate([(3.0, 1.0), (-1.0, 0.5), (0.5, 0.25)], start=1):
        set_learning_rates(dict.fromkeys(optimizers, 1.0), factor)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        update = (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.99**step)) + 1e-8)
        weight = weight * (1 - 0.1 * factor * 0.5) - 0.1 * factor * update
        bias = bias - 0.1 * factor * update
        assert apply(optimizers, model, gradient) == pytest.approx((weight, bias), rel=1e-5)


def test_momentum_sgd_by_hand():
    """Guards against momentum that is damped, Nesterov's, or of another value than configured (the paper's is 0.99)."""
    model = line()
    train = TrainConfig(optimizer="sgd", learning_rate=0.1, momentum=0.75, weight_decay=0.5)
    optimizers = build_optimizers(train, model)
    weight, bias, weight_velocity, bias_velocity = 2.0, -1.0, 0.0, 0.0
    for gradient, factor in [(3.0, 1.0), (-1.0, 0.5), (0.5, 0.25)]:
        set_learning_rates(dict.fromkeys(optimizers, 1.0), factor)
        weight_velocity = 0.75 * weight_velocity + gradient + 0.5 * weight
        bias_velocity = 0.75 * bias_velocity + gradient
        weight -= 0.1 * factor * weight_velocity
        bias -= 0.1 * factor * bias_velocity
        assert apply(optimizers, model, gradient) == pytest.approx((weight, bias), rel=1e-5)


def build_objective(norm: str = "pre", ngrams: tuple[int, ...] = ()) -> Objective:
    config = ModelConfig(num_layers=2, num_heads=2, d_model=8, d_ff=16, context_length=6, norm=norm, ngrams=ngrams)
    terms = build_terms(AuxConfig(), 2)
    return Objective(CharTransformer(config, 5), Heads(config, 5, head_pairs(terms, 2)), terms)


PARTS = typed("attention.query attention.key attention.value attention.out feed_forward.up feed_forward.down")
HIDDEN = {f"transformer.blocks.{layer}.{part}.weight" for layer in (0, 1) for part in PARTS}
CLASSIFIERS = {f"heads.exits.layer{layer}.offset{offset}.weight" for layer in (1, 2) for offset in (1, 2)}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_every_parameter_is_owned_once_and_only_matrices_decay(optimizer, norm):
    """Guards against a parameter that no optimizer or two of them own, and decay of anything but matrices."""
    objective = build_objective(norm, ngrams=(2, 3))
    names = {parameter: name for name, parameter in objective.named_parameters()}
    groups = [
        group
        for each in build_optimizers(TrainConfig(optimizer=optimizer, weight_decay=0.1), objective)
        for group in each.param_groups
    ]
    owned = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(names.values())
    decays = {names[parameter]: group.get("weight_decay", 0.0) for group in groups for parameter in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0.1} == HIDDEN | CLASSIFIERS
    assert {decay for name, decay in decays.items() if name not in HIDDEN | CLASSIFIERS} == {0.0}


def test_muon_takes_the_hidden_matrices_and_only_them():
    """Guards against embeddings or classifiers orthogonalised, hidden matrices not, or stepped at AdamW's rate."""
    objective = build_objective()
    names = {parameter: name for name, parameter in objective.named_parameters()}
    train = TrainConfig(optimizer="muon", learning_rate=0.001, muon_learning_rate=0.02, muon_momentum=0.9)
    muon, adamw = build_optimizers(train, objective)
    assert {names[parameter] for group in muon.param_groups for parameter in group["params"]} == HIDDEN
    set_learning_rates({muon: 0.25, adamw: 1.0}, 0.5)
    assert {group["lr"] for group in muon.param_groups} == {0.0025}
    set_learning_rates({muon: 1.0, adamw: 1.0}, 0.5)
    assert {group["lr"] for group in muon.param_groups} == {0.01}
    assert {group["lr"] for group in adamw.param_groups} == {0.0005}
    assert {group["momentum"] for group in muon.param_groups} == {0.9}

    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in objective.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    muon.step()
    for name, parameter in objective.named_parameters():
        if name not in HIDDEN:
            assert torch.equal(parameter, before[name]), name
            continue
        scale = 0.01 * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
        singular_values = torch.linalg.svdvals(parameter.detach() - before[name]) / scale
        assert 0.5 < singular_values.min() <= singular_values.max() < 1.3, name


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (16, 8), (8, 16), (8, 8), (16, 8))]


def test_muon_moves_matrices_as_torch_does():
    """Guards against matrices of a batch that reach one another, and runs of before that go on with other bits."""
    own, expected = matrices(), matrices()
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        Muon([{"params": own} | options], 0.95),
        torch.optim.Muon([{"params": expected} | options], momentum=0.95),
    )
    for step in range(4):
        for number, pair in enumerate(zip(own, expected, strict=True)):
            gradient = None if step < 2 and number == 3 else torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_a_fused_update_that_is_skipped_moves_nothing(kind):
    """Guards against momentum of a skipped first step, a parameter that is silent at first, and NaN that stays."""
    results = []
    for skipped in ((0, 2), ()):
        parameters = matrices()
        optimizer = Muon([{"params": parameters, "lr": 0.1, "weight_decay": 0.1}], 0.9)
        if kind == "sgd":
            optimizer = fused_sgd([{"params": parameters, "lr": 0.1, "weight_decay": 0.1}], 0.9)
        for step in range(5):
            for number, parameter in enumerate(parameters):
                silent = step < 3 and number == 4
                parameter.grad = None if silent else torch.full_like(parameter, math.nan if step in (0, 2) else step)
            if step not in (0, 2) or step in skipped:
                step_unless(torch.tensor(step in skipped), optimizer)
        results.append([*parameters, *(optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(("rows", "micro_batches", "most"), [(50, 1, 40), (50, 3, 200), (7, 1, 40)])
def test_rowwise_rms_moves_rows_as_a_loop_over_them_does(rows, micro_batches, most, dense):
    """Guards against rows that move unread or are left out, a mean square that decays while its row rests or begins
    at zero, one that is summed over columns, and gradients of micro-batches that are squared apart."""
    torch.manual_seed(0)
    table = nn.Embedding(rows, 8, sparse=True)
    expected, squares = table.weight.detach().double().numpy(), {}
    optimizer = RowwiseRMS([{"params": [table.weight], "lr": 0.04}], most_rows=most)
    for step in range(60):
        rate = optimizer.param_groups[0]["lr"] = 0.04 / (1 + step)
        gradients = defaultdict(float)
        for _ in range(micro_batches):
            ids, factors = torch.randint(rows, (40,)), torch.randn(40, 8) * 10.0 ** -(step % 5)
            (table(ids) * factors).sum().backward()
            for row, gradient in zip(ids.tolist(), factors.double().numpy(), strict=True):
                gradients[row] += gradient
        for row, gradient in gradients.items():
            square = (gradient**2).mean()
            squares[row] = 0.9 * squares[row] + 0.1 * square if row in squares else square
            expected[row] -= rate * gradient / (math.sqrt(squares[row]) + 1e-8)
        if dense:
            table.weight.grad = table.weight.grad.to_dense()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(table.weight.detach().double().numpy(), expected, rtol=1e-5, atol=1e-6)
    found = optimizer.state[table.weight]["mean_square"]
    assert found.shape == (rows, 1)
    torch.testing.assert_close(found[list(squares), 0].tolist(), list(squares.values()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_a_skipped_step_of_rowwise_rms_moves_nothing(dense):
    """Guards against gradients that are not finite in rows or their state, whether or not they are the first."""
    table = nn.Embedding(9, 4, sparse=not dense)
    optimizer = RowwiseRMS([{"params": [table.weight], "lr": 0.1}], most_rows=9)
    for factor, rows in ((math.nan, [1, 2]), (3.0, [2, 5]), (math.inf, [2, 5, 7])):
        before, square = table.weight.detach().clone(), optimizer.state[table.weight].get("mean_square")
        square = torch.zeros(9, 1) if square is None else square.clone()
        (table(torch.tensor(rows)) * factor).sum().backward()
        step_unless(torch.tensor(factor != 3.0), optimizer)
        optimizer.zero_grad()
        moved = torch.zeros(9, dtype=torch.bool)
        moved[[2, 5]] = factor == 3.0
        assert torch.equal((table.weight != before).any(dim=1), moved)
        assert torch.equal((optimizer.state[table.weight]["mean_square"] != square).any(dim=1), moved)


def test_only_the_ngram_rows_that_were_read_move():
    """Guards against tables trained densely, which costs time for every row, or at another rate than their own."""
    objective = build_objective(ngrams=(2,))
    (table,) = objective.transformer.ngram_embedding.tables
    sparse = build_optimizers(TrainConfig(learning_rate=0.5, ngram_learning_rate=0.125), objective)[-1]
    before = table.weight.detach().clone()
    objective.heads.exits["layer2"]["offset1"].weight.data.normal_()
    objective(torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]]), 0.0).total.backward()
    sparse.step()
    moved = (table.weight != before).any(dim=1)
    assert moved.sum() == 3  # "01", "10", and "0" at the start of the window
    # The first step of a row is its rate, whatever the gradient.
    steps = (table.weight - before)[moved].square().mean(dim=1).sqrt()
    torch.testing.assert_close(steps, torch.full((3,), 0.125), rtol=1e-3, atol=0)
