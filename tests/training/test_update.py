"""Updates that must not happen: what skips them, that skipping leaves nothing behind, and what a run says of it."""

import copy
import statistics
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import charlm
from charlm.config import TrainConfig
from charlm.objective.routes import Update
from charlm.runs.folder import Run
from charlm.training.gradients import Losses
from charlm.training.optimizers import build_optimizers
from charlm.training.update import ENOUGH, Updates
from tiny import TINY, refused, train


class Net(nn.Module):
    """Matrices for muon, plain parameters for AdamW, one that never has a gradient, and if asked a sparse table."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.silent = nn.Linear(3, 2)
        self.embedding = nn.Embedding(5, 3, sparse=sparse)
        self.window_length = 3

    def loss(self, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(torch.tensor([0, 2, 2])))).square().sum() * scale


def state_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list:
    """Everything that an update may change."""
    states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
    return [{name: parameter.detach().clone() for name, parameter in model.named_parameters()}, states]


def assert_same(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def updates_of(optimizers: list, accepted: tuple = (), **options) -> Updates:
    parameters = {p: None for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    route = SimpleNamespace(parameters=list(parameters), optimizers=optimizers)
    return Updates(TrainConfig(**options), Accelerator(cpu=True), route, accepted)


def net_and_updates(accepted: tuple = (), **options) -> tuple[Net, list, Updates]:
    model = Net()
    optimizers = build_optimizers(TrainConfig(), model)
    return model, optimizers, updates_of(optimizers, accepted, **options)


def apply(updates: Updates, optimizers: list, step: int, *row: float, names: tuple = ("a",), last: bool = True) -> None:
    """One update by all optimizers, after losses of `row`: the total, and the terms `names`."""
    updates.apply(step, Losses(names, torch.tensor(row)), [Update(dict.fromkeys(optimizers, 1.0))], last)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradient", "table"])
def test_what_is_not_finite_moves_nothing(where, clip_norm):
    """Guards against one bad batch that ends a run of days: neither a loss, nor a gradient, nor a sparse one passes."""
    model = Net(sparse=True)
    optimizers = build_optimizers(TrainConfig(optimizer="muon"), model)
    updates = updates_of(optimizers, clip_norm=clip_norm)
    model.loss().backward()
    apply(updates, optimizers, 0, 1.0, 1.0)
    before = state_of(model, optimizers)
    model.loss().backward()
    if where == "table":
        model.embedding.weight.grad *= float("inf")
    if where == "gradient":
        model.head.weight.grad[0, 0] = float("inf")
    apply(updates, optimizers, 1, float("nan") if where == "loss" else 1.0, 1.0)
    assert_same(state_of(model, optimizers), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    made, skipped = updates.read()
    assert (made.step, made.skipped) == (1, None)
    assert (skipped.step, skipped.skipped) == (2, "the gradient is not finite")
    model.loss().backward()
    apply(updates, optimizers, 2, 1.0, 1.0)
    assert not model.head.weight.equal(before[0]["head.weight"])


def test_fp16_scales_back_once_for_all_optimizers():
    """Guards against gradients unscaled twice, a scale that each optimizer moves anew, and a half skipped update."""
    models = [Net(), Net()]
    optimizers = [build_optimizers(TrainConfig(optimizer="muon"), model) for model in models]
    plain = updates_of(optimizers[0], clip_norm=0.5)
    scaled = updates_of(optimizers[1], clip_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2)
    scaled.accelerator.scaler = scaler
    scales = []
    for step, broken in enumerate([False, False, True, False]):
        for model, own, updates in zip(models, optimizers, (plain, scaled), strict=True):
            loss = model.loss()
            (scaler.scale(loss) if updates is scaled else loss).backward()
            if broken:
                model.head.weight.grad[0, 0] = float("inf")
            apply(updates, own, step, 1.0, 1.0)
        scales.append(scaler.get_scale())
    assert scales == [4.0, 8.0, 4.0, 4.0]
    torch.testing.assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()))
    assert [report.step for report in scaled.read() if report.skipped] == [3]


def test_a_loss_that_leaps_is_skipped():
    """Guards against another threshold than the documented one, and one that skipped losses raise."""
    losses = [2.0 + 0.01 * ((7 * index) % 11) for index in range(40)]
    median = statistics.median_low(losses)
    deviation = 1.4826 * statistics.median_low(abs(loss - median) for loss in losses)
    model, optimizers, updates = net_and_updates(tuple(losses), spike_threshold=4.0)
    kept = []
    for step, loss in enumerate([median + 3.99 * deviation, 9.0, 9.0, 9.0, median]):
        model.loss().backward()
        apply(updates, optimizers, step, loss, loss)
        kept.append(len(updates.accepted_losses()))
    assert kept == [41, 41, 41, 41, 42]
    assert [report.step for report in updates.read() if report.skipped] == [2, 3, 4]


def test_few_losses_judge_nothing():
    """Guards against skipping the first noisy losses, when there are too few to compare with."""
    model, optimizers, updates = net_and_updates((1.0,) * (ENOUGH - 1), spike_threshold=1.0)
    for step, skipped in enumerate([False, True]):
        model.loss().backward()
        apply(updates, optimizers, step, 5.0, 5.0)
        assert bool(updates.unread[-1][2][0]) == skipped


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon", "sparse", "sparse as dense"])
@pytest.mark.parametrize(("passes", "broken_pass"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_a_step_of_one_or_several_passes_is_made_whole_or_not_at_all(passes, broken_pass, kind, on_host):
    """Guards against what a skipped update, or those before it in the step, leave in parameters, moments, counters, or
    state that the step itself created: the next must not know of it."""
    sparse, optimizer = kind.startswith("sparse"), kind if kind in ("sgd", "muon") else "adamw"
    train = TrainConfig(optimizer=optimizer, weight_decay=0.1, learning_rate=0.1)
    skipping, plain = Net(sparse), Net(sparse)
    for model in (skipping, plain):
        optimizers = build_optimizers(train, model)
        updates = updates_of(optimizers)
        updates.decides_on_host = on_host
        for step, broken in enumerate([True, False, True, False]):
            if broken and model is plain:
                continue
            for number in range(passes):
                model.loss(float("nan") if broken and number == broken_pass else 1.0 + number).backward()
                if kind == "sparse as dense":
                    model.embedding.weight.grad = model.embedding.weight.grad.to_dense()
                apply(updates, optimizers, step, 1.0, 1.0, names=(f"layer{number}",), last=number == passes - 1)
        assert [report.step for report in updates.read() if report.skipped] == ([1, 3] if model is skipping else [])
        assert updates.unread == []
        if model is skipping:
            left = state_of(model, optimizers)
    assert_same(left, state_of(plain, optimizers))


def test_the_losses_of_passes_make_one_report():
    """Guards against a report of one pass only."""
    model, optimizers, updates = net_and_updates()
    for number in range(3):
        model.loss().backward()
        apply(updates, optimizers, 4, 2.0**number, 10.0 + number, names=(f"layer{number}",), last=number == 2)
    (report,) = updates.read()
    assert (report.step, report.loss, report.skipped) == (5, 7.0, None)
    assert report.parts == {"layer0": 10.0, "layer1": 11.0, "layer2": 12.0}


def test_each_update_is_clipped_by_its_own_norm():
    """Guards against a small loss that is held down by the norm of another one's gradient."""
    model = nn.Linear(1, 1, bias=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2)]
    updates = updates_of(optimizers, clip_norm=1.0)
    before = model.weight.item()
    gradients = [torch.tensor([[0.5]]), torch.tensor([[100.0]])]
    two = [
        Update({optimizer: 1.0}, {model.weight: gradient})
        for gradient, optimizer in zip(gradients, optimizers, strict=True)
    ]
    updates.apply(0, Losses(("a",), torch.tensor([1.0, 1.0])), two)
    assert before - model.weight.item() == pytest.approx(1.5)


def test_the_weights_adapt_to_updates_that_were_made():
    """Guards against layer weights that learn from a skipped update, or from sums in place of means."""
    told = []
    model, optimizers, updates = net_and_updates()
    updates.adapt = lambda *heard: told.append(heard)
    for step, total in enumerate([3.0, float("nan")]):
        model.loss().backward()
        apply(updates, optimizers, step, total, 1.0, 2.0, names=("a", "b"))
    assert [parts for parts, _ in told] == [{"a": 1.0, "b": 2.0}] * 2
    assert [bool(skipped) for _, skipped in told] == [False, True]


FLAGS = [*TINY, "--train.log_every=3", "--train.valid_every=7", "--train.steps=21"]


def test_a_run_goes_on_after_a_bad_step(tmp_path, text_corpus_flags, break_losses, capfd):
    """Guards against a bad step that stays unsaid, that ends the run, or that leaves NaN in metrics.jsonl."""
    break_losses(range(4, 6), term=0)
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    rows = list(Run.open(train(*flags)).metrics())
    skipped = [row for row in rows if "skipped" in row]
    reason = "the loss of layer1/offset1/all is nan"
    assert [(row["step"], row["reason"]) for row in skipped] == [(5, reason), (6, reason)]
    assert [row["step"] for row in rows if "loss" in row] == [3, 4, 9, 12, 15, 18, 21]
    assert all(row["loss"] == row["loss"] for row in rows if "loss" in row)
    assert f"step 5: update skipped, {reason}" in capfd.readouterr().err


def test_a_run_that_skips_without_end_stops_with_a_checkpoint_from_before(tmp_path, text_corpus_flags, break_losses):
    """Guards against days of steps that learn nothing, and against losing what was learned before them."""
    whole = ["--train.valid_every=9", "--train.keep_checkpoints=9", f"--run.dir={tmp_path / 'whole'}"]
    train(*FLAGS, *text_corpus_flags, *whole)
    break_losses(range(9, 1000), term=0)
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.max_skipped=5"]
    with refused("train.max_skipped", "the last 6 updates"):
        train(*flags, "--train.valid_every=21")
    stopped, expected = (charlm.load(tmp_path / name, step) for name, step in (("run", "last"), ("whole", 9)))
    assert stopped.step == 9
    assert_same(stopped.transformer.state_dict(), expected.transformer.state_dict())
