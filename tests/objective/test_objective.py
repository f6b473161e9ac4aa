"""The loss against hand arithmetic, and that what weighs nothing is neither computed nor moved.

Shapes: B batch, T positions, D d_model, V vocabulary, W characters of a window.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import AuxConfig, Config, LayersConfig, ModelConfig, PositionsConfig, TargetsConfig
from charlm.model.heads import Heads
from charlm.objective.build import build_objective
from charlm.objective.hedge import Hedge
from charlm.objective.objective import Objective, head_pairs
from charlm.objective.schedules import constant, cutoff
from charlm.objective.terms import Term, active, build_terms
from tiny import small_model

V = 4
WINDOWS_BW = torch.tensor([[0, 1, 2, 3, 1, 0], [3, 3, 2, 1, 0, 2]])
# -log2 of the probability that a head gives each character at each position: rows of 1/2, 1/4, 1/8 and 1/8.
BITS_TV = {
    (1, 1): [[1, 2, 3, 3], [2, 3, 1, 3], [3, 3, 1, 2], [3, 3, 2, 1]],
    (1, 2): [[1, 2, 3, 3], [3, 3, 2, 1], [2, 1, 3, 3], [2, 1, 3, 3]],
    (2, 1): [[3, 1, 2, 3], [3, 3, 1, 2], [3, 3, 2, 1], [1, 3, 3, 2]],
    (2, 2): [[1, 3, 3, 2], [2, 1, 3, 3], [1, 2, 3, 3], [1, 2, 3, 3]],
}
# What they cost on the two windows, position by position. Targets at offset 1 are 1 2 3 1 and 3 2 1 0, at offset 2
# 2 3 1 0 and 2 1 0 2.
MEAN_BITS = {
    "layer1/offset1/all": (2 + 1 + 2 + 3 + 3 + 1 + 3 + 3) / 8,
    "layer1/offset1/last": (3 + 3) / 2,
    "layer1/offset2/all": (3 + 1 + 1 + 2 + 3 + 3 + 2 + 3) / 8,
    "layer1/offset2/last": (2 + 3) / 2,
    "layer2/offset1/all": (1 + 1 + 1 + 3 + 3 + 1 + 3 + 1) / 8,
    "layer2/offset1/last": (3 + 1) / 2,
    "layer2/offset2/all": (3 + 3 + 2 + 1 + 3 + 1 + 1 + 3) / 8,
    "layer2/offset2/last": (1 + 3) / 2,
}


class PositionsAsStates(nn.Module):
    """In place of the transformer: the states of every layer say which position they are at, and nothing else."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def forward(self, ids_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
        assert torch.equal(ids_BT, WINDOWS_BW[:, :4])
        return {layer: torch.eye(4).expand(2, 4, 4) for layer in layers}


def known_objective(aux: AuxConfig) -> Objective:
    """Two layers, four positions, two targets: an Objective whose every prediction is known from BITS_TV."""
    config = ModelConfig(num_layers=2, num_heads=1, d_model=4, d_ff=4, context_length=4, norm="post")
    heads = Heads(config, V, BITS_TV)
    for (layer, offset), bits_TV in BITS_TV.items():
        classifier = heads.exits[f"layer{layer}"][f"offset{offset}"]
        nn.init.constant_(classifier.bias, 5.0)  # log-softmax takes no notice
        classifier.weight.data = -math.log(2) * torch.tensor(bits_TV, dtype=torch.float32).T
    return Objective(PositionsAsStates(config), heads, build_terms(aux, 2))


LASTING = LayersConfig(schedule="constant")
HINGED = LayersConfig(schedule="constant", hinge=math.log(4))
FADING = PositionsConfig(schedule="linear")
ALL = {1: 2.25 + 2.25 / 2, 2: 1.75 + 2.125 / 2}  # bits of a layer's losses at all positions, the second at half weight
LAST = {1: 3.0 + 2.5 / 2, 2: 2.0 + 2.0 / 2}


@pytest.mark.parametrize("layers", [None, [1], [2], [2, 1], {2, 7}])
@pytest.mark.parametrize(
    ("aux", "progress", "bits"),
    [
        (AuxConfig(), 0.0, ALL),  # the paper's: layer 1 until 1/4
        (AuxConfig(), 0.25, {2: ALL[2]}),
        (AuxConfig(reduction="mean"), 0.0, {1: ALL[1] / 2, 2: ALL[2] / 2}),
        (AuxConfig(layers=LayersConfig(enabled=False)), 0.0, {2: ALL[2]}),
        (AuxConfig(positions=PositionsConfig(enabled=False)), 0.0, LAST),
        # Layer 1 loses 2 1 2 3 3 1 3 3 bits, of which those beyond 2 count: 1 + 1 + 1 + 1 of 8.
        (AuxConfig(layers=HINGED, targets=TargetsConfig(enabled=False)), 0.5, {1: 4 / 8, 2: 1.75}),
        # While positions decay: at 1/4 of the run, 3/4 of a loss at all positions and 1/4 at the last.
        (AuxConfig(positions=FADING, layers=LASTING), 0.25, {i: 3 / 4 * ALL[i] + 1 / 4 * LAST[i] for i in (1, 2)}),
        (
            AuxConfig(positions=FADING, layers=LASTING, reduction="mean"),
            0.5,
            {layer: (1 / 2 * ALL[layer] + 1 / 2 * LAST[layer]) / 2 for layer in (1, 2)},
        ),
    ],
)
def test_loss_by_hand(aux, progress, bits, layers):
    """Targets shifted by one, a mean over the wrong positions, weights applied twice or to the wrong row; a layer's
    share of the total that holds another's rows, and rows of layers that were not asked for; a hinge on a layer's mean,
    on the last layer too, or in the losses that are logged."""
    objective = known_objective(aux)
    wanted = {layer: own for layer, own in bits.items() if layers is None or layer in layers}
    if not wanted:
        with pytest.raises(ValueError, match="weight zero"):
            objective(WINDOWS_BW, progress, layers)
        return
    total, parts, by_layer = objective(WINDOWS_BW, progress, layers)
    assert total.item() / math.log(2) == pytest.approx(sum(wanted.values()), rel=1e-6)
    assert list(by_layer) == list(wanted)
    for layer, share in by_layer.items():
        assert share.item() / math.log(2) == pytest.approx(wanted[layer], rel=1e-6)
        assert share.requires_grad
    assert list(parts) == [term.name for term, _ in active(objective.terms, progress) if term.layer in wanted]
    for name, part in parts.items():  # as they are, whatever the row weighs
        assert part.item() / math.log(2) == pytest.approx(MEAN_BITS[name], rel=1e-6)
        assert not part.requires_grad


def real_objective(randomise, aux: AuxConfig) -> Objective:
    return randomise(build_objective(Config(model=small_model(num_layers=4, context_length=6), aux=aux), V))


def some_windows(objective: Objective) -> Tensor:
    return torch.randint(V, (3, objective.window_length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("aux", "progress", "blocks", "head_calls"),
    [
        (AuxConfig(), 0.0, 4, [(1, [1, 2], 6), (2, [1, 2], 6), (3, [1, 2], 6), (4, [1, 2], 6)]),
        (AuxConfig(), 0.125, 4, [(2, [1, 2], 6), (3, [1, 2], 6), (4, [1, 2], 6)]),
        (AuxConfig(targets=TargetsConfig(schedule="cutoff", end=0.4)), 0.4, 4, [(4, [1], 6)]),
        (AuxConfig(positions=PositionsConfig(schedule="cutoff", end=0.5)), 0.5, 4, [(4, [1, 2], 1)]),
        (AuxConfig(positions=FADING, layers=LayersConfig(enabled=False)), 0.5, 4, [(4, [1, 2], 6)]),
        (AuxConfig(main_weight=0.0, layers=LASTING), 0.5, 3, [(1, [1, 2], 6), (2, [1, 2], 6), (3, [1, 2], 6)]),
    ],
)
def test_rows_of_weight_zero_are_not_computed(randomise, monkeypatch, aux, progress, blocks, head_calls):
    """Heads, positions or layers that run for a loss nobody adds up."""
    objective = real_objective(randomise, aux)
    ran, calls = [], []
    for number, block in enumerate(objective.transformer.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    classifiers = objective.heads.classifiers

    def noted(hidden_BTD: Tensor, layer: int, offsets: list[int]):
        calls.append((layer, list(offsets), hidden_BTD.shape[1]))
        return classifiers(hidden_BTD, layer, offsets)

    monkeypatch.setattr(objective.heads, "classifiers", noted)
    objective(some_windows(objective), progress)
    assert ran == list(range(1, blocks + 1))
    assert calls == head_calls


def test_shorter_windows_are_read_whole(randomise):
    """A shorter window whose last input is left out, or whose last target is taken for one."""
    objective = real_objective(randomise, AuxConfig(layers=LayersConfig(enabled=False)))
    windows_BW = some_windows(objective)[:, :5]
    logits_BTKV = objective.heads(objective.transformer(windows_BW[:, :3])[4], 4, (1, 2))
    parts = objective(windows_BW, 0.0).parts
    for k in (0, 1):
        expected = F.cross_entropy(logits_BTKV[:, :, k].flatten(0, 1), windows_BW[:, 1 + k : 4 + k].flatten())
        torch.testing.assert_close(parts[f"layer4/offset{k + 1}/all"], expected.detach())


def test_what_has_no_loss_is_refused(randomise):
    """Windows longer than the context, or without any input, read as if they were right; a loss of zero without a
    gradient, taken for success."""
    objective = real_objective(randomise, AuxConfig(targets=TargetsConfig(num_targets=3)))
    assert objective.window_length == 6 + 3
    for length in (3, 10):
        with pytest.raises(ValueError, match=f"windows have {length} characters, not 9"):
            objective(torch.zeros(2, length, dtype=torch.long), 0.0)
    ended = Objective(objective.transformer, objective.heads, [Term(4, 1, "all", cutoff(0.0, 0.5))])
    assert ended(some_windows(ended), 0.49).total > 0
    with pytest.raises(ValueError, match="weight zero"):
        ended(some_windows(ended), 0.5)


class ReadsStates(nn.Module):
    """Losses that say what they were computed from: the sum of a position's states, and 10 times the first id."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden_BTD: Tensor, windows_BW: Tensor) -> Tensor:
        return self.scale * hidden_BTD.sum(dim=-1) + 10.0 * windows_BW[:, :1]


def test_tasks_of_ones_own_by_hand():
    """A task that reads another layer's states, is weighed twice or not at all, or summed in place of averaged."""
    known = known_objective(AuxConfig(layers=LASTING))
    fading = cutoff(0.0, 0.5)
    rows = (
        *known.terms,
        Term(1, 0, "all", constant(0.25), task="first"),
        Term(2, 0, "all", constant(0.5) * fading, task="second"),
    )
    hedge = Hedge([1, 2], 0.9, 0.1)
    tasks = nn.ModuleDict({"first": ReadsStates(), "second": ReadsStates()})
    objective = Objective(known.transformer, known.heads, rows, hedge=hedge, tasks=tasks)
    report, without = objective(WINDOWS_BW, 0.0), known(WINDOWS_BW, 0.0)
    loss = 2.0 * 1.0 + 10.0 * (0 + 3) / 2  # every state has one 1
    assert report.parts["layer1/task/first"].item() == pytest.approx(loss)
    assert report.by_layer[1].item() == pytest.approx(without.by_layer[1].item() / 2 + 0.25 * loss, rel=1e-6)
    assert report.by_layer[2].item() == pytest.approx(without.by_layer[2].item() / 2 + 0.5 * loss, rel=1e-6)
    report.total.backward()
    assert tasks["first"].scale.grad.item() == pytest.approx(0.25)
    assert tasks["second"].scale.grad.item() == pytest.approx(0.5)
    later = objective(WINDOWS_BW, 0.5, [2])
    assert later.parts.keys() == {"layer2/offset1/all", "layer2/offset2/all"}


def test_a_layer_may_have_a_task_and_no_head(randomise):
    """A head made for a task's row, or a layer that is computed only if a head reads it."""
    plain = real_objective(randomise, AuxConfig(layers=LayersConfig(enabled=False)))
    rows = (Term(2, 0, "all", constant(1.0), task="own"), *plain.terms)
    assert head_pairs(rows, 4) == {(4, 1), (4, 2)} and head_pairs(rows[:1], 4) == {(4, 1)}
    hedge, tasks = Hedge([4], 0.9, 0.1), nn.ModuleDict({"own": ReadsStates()})
    objective = Objective(plain.transformer, plain.heads, rows, hedge=hedge, tasks=tasks)
    windows_BW = some_windows(objective)
    hidden_BTD = objective.transformer(windows_BW[:, :6], [2])[2]
    expected = (2.0 * hidden_BTD.sum(dim=-1) + 10.0 * windows_BW[:, :1]).mean()
    torch.testing.assert_close(objective(windows_BW, 0.0).by_layer[2], expected)
    torch.testing.assert_close(objective(windows_BW, 0.0, [2]).total, expected)


@pytest.mark.parametrize(
    ("aux", "silent"),
    [
        (AuxConfig(), True),  # layers drop out one by one
        (AuxConfig(layers=LayersConfig(enabled=False), targets=TargetsConfig(enabled=False)), False),
        (AuxConfig(layers=LayersConfig(schedule="constant"), targets=TargetsConfig(schedule="constant")), False),
        (AuxConfig(main_weight=0.0, layers=LayersConfig(schedule="constant")), True),  # the last layer's head
    ],
)
def test_heads_that_fall_silent_are_known_before(aux, silent):
    """Guards against several GPUs that would wait for the gradient of a head which learns nothing."""
    assert build_objective(Config(model=small_model(), aux=aux), 8).can_fall_silent() is silent
