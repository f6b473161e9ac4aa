"""Rows and the runs they make: what each changes, in which order, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest

from charlm import load_config
from charlm.ablation.rows import Row, config_flags, given_row, method_rows, paper_rows, plan, sweep_rows
from charlm.config import Config, TrainConfig, UserError, flatten

FLAGS = ["--run.dir=out", "--train.seed=5", "--model.num_layers=4"]


def changes(config: Config, base: Config) -> dict[str, object]:
    """What a run's config has otherwise than the base, apart from where it lives."""
    before, now = flatten(asdict(base), "."), flatten(asdict(config), ".")
    return {name: value for name, value in now.items() if before[name] != value and not name.startswith("run.")}


def test_the_papers_rows() -> None:
    """Guards against a row that changes something else than its name says, or stands beside another's figure."""
    base = load_config(overrides=FLAGS)
    jobs = plan(paper_rows(base), [], FLAGS, seeds=1)
    assert {job.row: changes(job.config, base) for job in jobs} == {
        "full": {},
        "without positions": {"aux.positions.enabled": False},
        "without intermediate layers": {"aux.layers.enabled": False},
        "without extra targets": {"aux.targets.enabled": False},
        "without per-layer positions": {"model.positions": "input"},
        "SGD in place of momentum": {"train.optimizer": "sgd", "train.momentum": 0.0, "train.learning_rate": 0.3},
    }
    assert [row.paper for row in paper_rows(base)] == [1.062, 2.482, 1.158, 1.068, 1.069, 1.065]


def test_sgd_takes_steps_as_long_as_the_bases_momentum() -> None:
    """Guards against a row of SGD that is a hundred times slower than what it stands in for."""
    base = Config(train=TrainConfig(optimizer="sgd", momentum=0.9, learning_rate=0.02))
    assert "--train.learning_rate=0.2" in paper_rows(base)[-1].flags


def test_the_runs_of_a_plan() -> None:
    """Guards against seeds in the wrong place, an early stop that leaves rows without any run, and lost folders."""
    jobs = plan([Row("full"), Row("no head: at all!", flags=("--aux.layers.enabled=false",))], [], FLAGS, seeds=2)
    assert [(job.row, job.seed) for job in jobs] == [
        ("full", 5), ("no head: at all!", 5), ("full", 6), ("no head: at all!", 6),
    ]  # fmt: skip
    assert [job.config.train.seed for job in jobs] == [5, 5, 6, 6]
    assert jobs[3].folder == Path("out/no_head_at_all/seed-6")
    assert jobs[3].beside(".log") == Path("out/no_head_at_all/seed-6.log")
    assert all(job.config.run.auto_resume for job in jobs)


def test_what_wins(tmp_path: Path) -> None:
    """Guards against a preset that overrides the command line, and flags that override a row."""
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("model: {num_layers: 3, d_model: 16}\ntrain: {steps: 7, warmup: 0.1}\n")
    preset.write_text("model: {num_layers: 5, d_model: 32}\ntrain: {steps: 8}\n")
    row = Row("x", files=(preset,), flags=("--train.steps=9",))
    config = plan([row], [base], ["--model.d_model=64", "--train.steps=10", "--run.dir=out"], seeds=1)[0].config
    assert (config.model.num_layers, config.model.d_model) == (5, 64)
    assert (config.train.steps, config.train.warmup) == (9, 0.1)


def test_given_rows() -> None:
    """Guards against names taken for flags, and values with spaces, colons or commas that are cut."""
    row = given_row("two heads: --aux.layers.at='[1, 3]' --data.separator=': '")
    assert row == Row("two heads", flags=("--aux.layers.at=[1, 3]", "--data.separator=: "))
    assert given_row("--model.norm=post --train.steps=3").name == "model.norm=post train.steps=3"
    assert given_row("main_only: ").flags == ()


def test_sweeps() -> None:
    """Guards against commas inside of lists that split them, and several sweeps of which one is lost."""
    weights = sweep_rows(["aux.layers.weight=0, 0.1,1"])
    assert [row.flags for row in weights] == [(f"--aux.layers.weight={value}",) for value in ("0", "0.1", "1")]
    assert [row.name for row in sweep_rows(["aux.layers.at=[1,2],[3]"])] == ["aux.layers.at=[1,2]", "aux.layers.at=[3]"]
    grid = sweep_rows(["model.norm=pre,post", "train.steps=2,3"])
    assert [row.flags for row in grid] == [
        ("--model.norm=pre", "--train.steps=2"),
        ("--model.norm=pre", "--train.steps=3"),
        ("--model.norm=post", "--train.steps=2"),
        ("--model.norm=post", "--train.steps=3"),
    ]
    assert sweep_rows([]) == []


def test_methods(tmp_path: Path) -> None:
    """Guards against presets that are lost, or in an order that changes from machine to machine."""
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert [row.name for row in method_rows([tmp_path])] == ["a", "b", "c"]
    assert method_rows([tmp_path / "c.yaml"]) == [Row("c", files=(tmp_path / "c.yaml",))]


def test_flags_of_the_configuration() -> None:
    """Guards against the script's own options among those of the rows, and values left behind."""
    typed = [
        "--seeds=2",
        "--train.steps",
        "5",
        "--sweep",
        "train.seed=1",
        "--row",
        "a: --model.norm=post",
        "--run.dir=x",
    ]
    assert config_flags(typed) == ["--train.steps=5", "--run.dir=x"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweep_rows(["aux.layers.weight"]), "sweep=aux.layers.weight: give it as section.field=value,value"),
        (lambda: sweep_rows(["aux.layers.weight=1,,2"]), "give it as section.field=value,value"),
        (lambda: sweep_rows(["train.steps=1,1"]), "a value is given twice"),
        (lambda: sweep_rows(["train.steps=1", "train.steps=2"]), "an option is swept twice"),
        (lambda: given_row("without anything"), "give it as 'name: --section.field=value ...'"),
        (lambda: given_row("x: model.norm=post"), "give it as 'name: --section.field=value ...'"),
        (lambda: given_row(": --model.norm=post"), "give it as 'name: --section.field=value ...'"),
        (lambda: given_row("x: '--model.norm=post"), "No closing quotation"),
        (lambda: plan(sweep_rows(["aux.layers.weigth=1"]), [], FLAGS, 1), "row 'aux.layers.weigth=1': Unrecognized"),
        (lambda: plan(sweep_rows(["train.steps=0"]), [], FLAGS, 1), "row 'train.steps=0': train.steps=0: must be"),
        (lambda: plan(sweep_rows(["train.seed=1,2"]), [], FLAGS, 1), "train.seed is not for a row to set"),
        (lambda: plan([Row("x", flags=("--run.dir=y",))], [], FLAGS, 1), "run.dir is not for a row to set"),
        (lambda: plan([Row("a b"), Row("a_b")], [], FLAGS, 1), "folder 'a_b'; so has row 'a b'; name it otherwise"),
        (lambda: plan([Row("..")], [], FLAGS, 1), "row '..'"),
        (lambda: plan(method_rows([Path("nowhere.yaml")]), [], FLAGS, 1), "nowhere.yaml does not exist"),
        (lambda: plan([Row("full")], [], FLAGS, 0), "seeds=0: must be at least 1"),
        (lambda: plan([Row("full")], [], FLAGS, 1001), "1,001 runs, more than 1,000"),
    ],
)
def test_bad_input(make, message: str) -> None:
    """Guards against hours of runs before a mistake is found, and messages that do not name the row."""
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_an_empty_folder_of_methods(tmp_path: Path) -> None:
    """Guards against the paper's rows in place of presets that are not there."""
    with pytest.raises(UserError, match="holds no YAML file"):
        method_rows([tmp_path])


def test_seeds_follow_the_bases() -> None:
    """Guards against a base's seed that is forgotten."""
    base = load_config(overrides=FLAGS)
    assert [job.seed for job in plan([Row("full")], [], FLAGS, 3)] == [base.train.seed + k for k in range(3)]
