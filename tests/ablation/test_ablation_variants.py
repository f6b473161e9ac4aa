"""Variants and their runs: what each changes, in which order they run, and which input is refused."""

from pathlib import Path

import pytest

from charlm import load_config
from charlm.ablation.variants import Variant, VariantRun, paper_variants, parse_row, parse_sweeps, plan, read_methods
from charlm.config import Config, TrainConfig, UserError, differences

FLAGS = {"run.dir": "out", "train.seed": "5", "model.num_layers": "4"}


def planned(*variants: Variant, seeds: int = 1) -> list[VariantRun]:
    return plan(variants, [], FLAGS, seeds)


def test_the_papers_rows() -> None:
    """Guards against a row that changes something other than its name says, or has another row's figure."""
    base = load_config(overrides=FLAGS)
    rows = paper_variants(base)
    changes = {run.variant.name: differences(base.replace(run=run.config.run), run.config) for run in planned(*rows)}
    assert {row: {name: new for name, (_, new) in found.items()} for row, found in changes.items()} == {
        "full": {},
        "without positions": {"aux.positions.enabled": False},
        "without intermediate layers": {"aux.layers.enabled": False},
        "without extra targets": {"aux.targets.enabled": False},
        "without per-layer positions": {"model.position_encoding": "input"},
        "SGD in place of momentum": {"train.optimizer": "sgd", "train.momentum": 0.0, "train.learning_rate": 0.3},
    }
    assert [row.paper for row in rows] == [1.062, 2.482, 1.158, 1.068, 1.069, 1.065]
    with_momentum = Config(train=TrainConfig(optimizer="sgd", momentum=0.9, learning_rate=0.02))
    assert paper_variants(with_momentum)[-1].options["train.learning_rate"] == "0.2"  # steps as long as the base's


def test_the_runs_of_a_plan() -> None:
    """Guards against seeds in the wrong place, an early stop that leaves rows without any run, and lost folders."""
    runs = planned(Variant("full"), Variant("no head: at all!", {"aux.layers.enabled": "false"}), seeds=2)
    names = ["full, seed 5", "no head: at all!, seed 5", "full, seed 6", "no head: at all!, seed 6"]
    assert [f"{run.variant.name}, seed {run.config.train.seed}" for run in runs] == list(map(str, runs)) == names
    assert runs[3].folder == Path("out/no_head_at_all/seed-6")
    assert runs[3].beside(".log") == Path("out/no_head_at_all/seed-6.log")
    assert all(run.config.run.auto_resume for run in runs)


def test_what_wins(tmp_path: Path) -> None:
    """Guards against a preset that overrides the command line, and flags that override a row."""
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("model: {num_layers: 3, d_model: 16}\ntrain: {steps: 7, warmup: 0.1}\n")
    preset.write_text("model: {num_layers: 5, d_model: 32}\ntrain: {steps: 8}\n")
    variant = Variant("x", {"train.steps": "9", "data.corpus": "lm1b", "data.separator": r"\n"}, files=(preset,))
    config = plan([variant], [base], {"model.d_model": "64", "train.steps": "10", "run.dir": "out"}, seeds=1)[0].config
    assert (config.model.num_layers, config.model.d_model) == (5, 64)
    assert (config.train.steps, config.train.warmup, config.data.separator) == (9, 0.1, "\n")


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("two heads: --aux.layers.at='[1, 3]' --data.separator=': '", "two heads",
         {"aux.layers.at": "[1, 3]", "data.separator": ": "}),
        ("--model.norm=post --a.b=3", "model.norm=post a.b=3", {"model.norm": "post", "a.b": "3"}),
        ("main_only: ", "main_only", {}),
    ],
)  # fmt: skip
def test_rows(text: str, name: str, options: dict[str, str]) -> None:
    """Guards against names taken for flags, and values with spaces, colons or commas that are cut."""
    assert parse_row(text) == Variant(name, options)


@pytest.mark.parametrize(
    ("sweeps", "names"),
    [
        (["aux.layers.weight=0, 0.1,1"], ["aux.layers.weight=0", "aux.layers.weight=0.1", "aux.layers.weight=1"]),
        (["aux.layers.weights={1: 2, 3: 4},null"], ["aux.layers.weights={1: 2, 3: 4}", "aux.layers.weights=null"]),
        (["a.b=1,2", "c.d=3,4"], ["a.b=1 c.d=3", "a.b=1 c.d=4", "a.b=2 c.d=3", "a.b=2 c.d=4"]),
        ([], []),
    ],
)
def test_sweeps(sweeps: list[str], names: list[str]) -> None:
    """Guards against commas inside brackets that split a value, and several sweeps of which one is lost."""
    variants = parse_sweeps(sweeps)
    assert [variant.name for variant in variants] == names
    assert [" ".join(f"{name}={value}" for name, value in variant.options.items()) for variant in variants] == names


def test_methods(tmp_path: Path) -> None:
    """Guards against presets that are lost, an order that differs between machines, and the paper's rows for none."""
    with pytest.raises(UserError, match="holds no YAML file"):
        read_methods([tmp_path])
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert [variant.name for variant in read_methods([tmp_path])] == ["a", "b", "c"]
    assert read_methods([tmp_path / "c.yaml"]) == [Variant("c", files=(tmp_path / "c.yaml",))]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: parse_sweeps(["aux.layers.weight"]), ["sweep=aux.layers.weight", "section.field=value,value"]),
        (lambda: parse_sweeps(["train.steps=1", "train.steps=2"]), ["sweep=", "swept twice"]),
        (lambda: planned(*parse_sweeps(["train.steps=1,1"])), ["row 'train.steps=1'", "another name"]),
        (lambda: parse_row("x: model.norm=post"), ["'name: --section.field=value ...'"]),
        (lambda: parse_row(": --model.norm=post"), ["'name: --section.field=value ...'"]),
        (lambda: parse_row("x: '--model.norm=post"), ["No closing quotation"]),
        (lambda: planned(Variant("x", {"aux.layers.weigth": "1"})), ["row 'x'"]),
        (lambda: planned(Variant("x", {"train.seed": "1"})), ["row 'x'", "train.seed"]),
        (lambda: planned(Variant("x", {"run.dir": "y"})), ["row 'x'", "run.dir"]),
        (lambda: planned(Variant("..")), ["row '..'"]),
        (lambda: planned(*read_methods([Path("nowhere.yaml")])), ["row 'nowhere'", "nowhere.yaml"]),
    ],
)
def test_bad_input(make, parts: list[str]) -> None:
    """Guards against hours of runs before a mistake is found, and messages that do not name the row."""
    with pytest.raises(UserError) as error:
        make()
    assert all(part in str(error.value) for part in parts)
