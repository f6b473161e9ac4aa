"""YAML and flags say the same things in the same words; what was saved is what is read."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import (
    AuxConfig,
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    PositionsConfig,
    RunConfig,
    Stage,
    TargetsConfig,
    TaskConfig,
    TrainConfig,
    UserError,
)
from charlm.config_files import load_config, to_yaml

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in path.parts)


TWO_STAGES = (Stage(until=0.4, weights=(0.5,)), Stage(weights=(1.0,)))
TWO_TASKS = {"a": TaskConfig(weight=2.0, layer=0.5), "b": TaskConfig(weight=1.0)}


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def option(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.mixed_precision", "no", "no"),  # YAML 1.1 reads false
        ("train.learning_rate", "1e-3", 0.001),  # YAML 1.1 reads text
        ("train.learning_rate", "1", 1.0),
        ("train.steps", "1_000_000", 1_000_000),
        ("train.steps", "1e6", 1_000_000),
        ("train.seed", "010", 10),  # YAML 1.1 reads 8
        ("train.seed", str(2**62 + 1), 2**62 + 1),  # not by way of a float
        ("train.micro_batch_size", "null", None),
        ("train.micro_batch_size", "~", None),
        ("train.micro_batch_size", "4", 4),
        ("train.micro_batch_size", "auto", "auto"),
        ("train.adam_betas", "[0.9, 95e-2]", (0.9, 0.95)),
        ("aux.layers.at", "[1/3, 0.5, 4, 1.0]", ("1/3", 0.5, 4, 1.0)),
        ("aux.layers.weights", f"[{', '.join(['0.3'] * 11)}]", (0.3,) * 11),
        ("aux.layers.weights", "{4: 0.3, 3/4: 1}", {4: 0.3, "3/4": 1.0}),
        ("aux.layers.weights", "null", None),
        ("aux.layers.stages", "[{until: 4e-1, weights: 0.5}, {weights: [1]}]", TWO_STAGES),
        ("aux.targets.stages", "[]", ()),
        ("aux.tasks", "{order: 0.1}", {"order": TaskConfig(weight=0.1)}),
        ("aux.tasks", "{a: {weight: 2, layer: 0.5}, b: {layer: null, weight: 1}}", TWO_TASKS),
        ("aux.tasks", "{}", {}),
        ("aux.layers.at", "[3,6]", (3, 6)),
        ("aux.layers.at", "[]", ()),
        ("aux.layers.at", "null", None),
        ("aux.layers.at", "3", (3,)),
        ("run.tracker", "tensorboard", ("tensorboard",)),
        ("run.tracker", "[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("run.tracker", "[]", ()),
        ("aux.layers.enabled", "False", False),
        ("run.resume", "TRUE", True),
        ("data.path", "null", None),
        ("data.path", "some where/x=1", Path("some where/x=1")),
        ("data.path", "2024", Path("2024")),
        ("data.cache_dir", "~", Path("~")),
    ],
)
def test_file_flag_and_mapping_read_alike(name: str, text: str, value: Any, yaml_file) -> None:
    """Guards against YAML's own ideas of types, and against flags and files that differ."""
    section, _, field = name.rpartition(".")
    nested = f"{field}: {text}"
    for part in reversed(section.split(".")):
        nested = f"{part}: {{{nested}}}"
    for config in (
        load_config(yaml_file(nested)),
        load_config((), [f"--{name}={text}"]),
        load_config((), [f"--{name}", text]),
        load_config((), [f"--{name.replace('_', '-')}={text}"]),
        load_config((), {name: value}),
        load_config((), {name: list(value) if isinstance(value, tuple) else value}),
    ):
        assert option(config, name) == value
        assert type(option(config, name)) is type(value)


@pytest.mark.parametrize("text", ["tensorboard,wandb", "tensorboard, wandb", "[tensorboard,wandb]"])
def test_a_list_of_any_length_needs_no_brackets(text: str, yaml_file) -> None:
    """Guards against `tensorboard,wandb` being read as one name."""
    assert load_config((), [f"--run.tracker={text}"]).run.tracker == ("tensorboard", "wandb")
    assert load_config(yaml_file(f"run:\n  tracker: {text}\n")).run.tracker == ("tensorboard", "wandb")


def test_later_files_win_and_flags_win_over_all(yaml_file) -> None:
    """Guards against a wrong order of precedence, and a later file that resets what it does not name."""
    first = yaml_file("train: {steps: 1, batch_size: 1, seed: 1}\n", "first.yaml")
    second = yaml_file("train: {steps: 2, batch_size: 2}\naux:\n  layers:\n    at:\n    - 3\n    - 6\n", "second.yaml")
    config = load_config([first, str(second)], ["--train.steps", "3"])
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (3, 2, 1)
    assert config.aux.layers.at == (3, 6)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train: {}\n", "train: null\n", "---\n", "{}"])
def test_empty_file_or_section_changes_nothing(text: str, yaml_file) -> None:
    """Guards against a section whose lines are all commented out being read as a value."""
    assert load_config(yaml_file(text)) == Config()


def test_anchors_and_nested_and_dotted_overrides(yaml_file) -> None:
    """Guards against losing what YAML itself offers, and the two ways to write a mapping of overrides."""
    config = load_config(
        yaml_file("aux:\n  layers: &clock {start: 0.25, end: 0.5}\n  targets: *clock\n"),
        {"train": {"steps": 7}, "aux.targets.end": 0.75},
    )
    assert (config.aux.layers.start, config.aux.targets.start) == (0.25, 0.25)
    assert (config.aux.layers.end, config.aux.targets.end) == (0.5, 0.75)
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("model:\n  num_layer: 3\n", ["--model.num_layer=3", "--model.num_layers INT", "line 2"]),
        ("aux: {layer: {enabled: false}}", ["aux.layer.enabled", "--aux.layers.enabled", "line 1"]),
        ("train:\n  lr: 1\n", ["--train.lr=1", "Options of train: steps, batch_size", "line 2"]),
        ("modle: {num_layers: 3}", ["modle is no section", "data, model, aux, train, run", "line 1"]),
        ("config: other.yaml", ["config is no section", "data, model, aux, train, run"]),
        ("help: true", ["help is no section"]),
        ("train:\n\n  steps: many\n", ["--train.steps", "'many' is not a whole number", "line 3"]),
        ("train: {steps: 1.5}", ["--train.steps", "'1.5' is not a whole number"]),
        ("train: {steps: }", ["--train.steps", "'' is not a whole number"]),
        ("train: {steps: true}", ["--train.steps", "'true' is not a whole number"]),
        ("train: {steps: [1]}", ["--train.steps", "is not a whole number"]),
        ("train: {steps: {a: 1}}", ["--train.steps.a=1", "--train.steps INT"]),
        ("train: {learning_rate: fast}", ["--train.learning_rate", "'fast' is not a number"]),
        ("train: {adam_betas: [0.9]}", ["--train.adam_betas", "has 1 values where 2 are needed"]),
        ("train: {adam_betas: 0.9}", ["--train.adam_betas", "'0.9' is not a list such as [3, 6]"]),
        ("aux: {layers: {at: [3, x]}}", ["--aux.layers.at", "'x' is not a whole number"]),
        ("aux: {layers: {at: [[3]]}}", ["--aux.layers.at", "is not a list"]),
        ("aux: {layers: {at: {3: 6}}}", ["--aux.layers.at", "is not a list such as [3, 6]"]),
        ("aux: {layers: {weights: {4: 1, 4: 2}}}", ["--aux.layers.weights", "has '4' twice", "line 1"]),
        ("aux: {layers: {weights: {4: [1]}}}", ["--aux.layers.weights", "or a mapping such as {LAYER: FLOAT,...}"]),
        ("aux: {layers: {weights: {x: 1}}}", ["--aux.layers.weights", "'x' is not a whole number, nor a fraction"]),
        ("aux: {layers: {weights: {? [4] : 1}}}", ["--aux.layers.weights", "has a key that is no plain text"]),
        ("aux: {layers: {stages: {weights: 1}}}", ["--aux.layers.stages", "a list such as [{weights, until},...]"]),
        ("aux: {layers: {stages: [{until: 1}]}}", ["--aux.layers.stages", "lacks weights"]),
        ("aux: {layers: {stages: [{weights: 1, til: 1}]}}", ["--aux.layers.stages", "'til', which is none of weights"]),
        (
            "aux: {layers: {stages: [{weights: {a: 1}}]}}",
            ["--aux.layers.stages", "is not a list such as [{weights, until},...]"],
        ),
        ("aux: {tasks: order}", ["--aux.tasks", "'order' is not a mapping such as {NAME: {weight, layer,"]),
        ("aux:\n  tasks:\n    order: {wait: 1}\n", ["--aux.tasks", "'wait', which is none of weight, layer", "line 2"]),
        ("aux: {tasks: {order: {weight: x}}}", ["--aux.tasks", "'x' is not a number"]),
        ("aux: {tasks: {order: {weight: 1, schedule: up}}}", ["--aux.tasks", "'up' is none of constant, linear"]),
        ("aux:\n  tasks:\n    order: -1\n", ["aux.tasks: weight=-1.0: must be finite", "line 2"]),
        ("aux: {layers: {weighting: cubic}}", ["--aux.layers.weighting", "'cubic'", "quadratic"]),
        ("aux: {layers: {head: conv}}", ["--aux.layers.head", "'conv'", "shared_frozen"]),
        ("aux: {route: scenic}", ["--aux.route", "'scenic'", "multiway"]),
        ("run: {tracker: tensorbord}", ["--run.tracker", "'tensorbord' is none of aim", "tensorboard, trackio"]),
        ("run: {tracker: ''}", ["--run.tracker", "is not a list"]),
        ("run: {tracker: 'wandb,'}", ["--run.tracker", "'' is none of aim"]),
        ("run: {resume: yes}", ["--run.resume", "'yes' is neither true nor false"]),
        ("run: {dir: ''}", ["--run.dir", "empty"]),
        ("data: {corpus: enwik9}", ["--data.corpus", "'enwik9'", "enwik8", "python-stdlib", "line 1"]),
        (
            "model:\n  d_model: 9\n  num_heads: 2\n",
            ["model.d_model=9: must be", "d_model was set in", "line 2", "line 3"],
        ),
        ("train: {steps: 1, steps: 2}", ["train.steps is set twice", "line 1"]),
        ("train: [1]", ["train must hold `name: value` lines"]),
        ("- model\n", ["a configuration must hold `name: value` lines"]),
        ("just text", ["a configuration must hold `name: value` lines"]),
        ("? [a]\n: b\n", ["a key must be the name of a section or an option"]),
        ("a: [b", ["is not valid YAML", "line 1"]),
        ("a: b: c", ["is not valid YAML", "line 1"]),
        ("a: 1\n---\nb: 2\n", ["is not valid YAML"]),
        ("train: *nowhere", ["is not valid YAML"]),
        ("train: \x00", ["is not valid YAML"]),
        ("!!python/object/apply:os.system ['true']", ["tag:yaml.org,2002:python/object/apply:os.system", "no place"]),
        ("train: " + "[" * 5000, ["nested too deeply"]),
        ("train: " + "{a: " * 5000, ["nested too deeply"]),
        ("train: &a {b: *a}", ["endless, with its aliases written out"]),
        ("aux: {layers: {at: &a [*a]}}", ["endless, with its aliases written out"]),
    ],
)
def test_bad_file(text: str, fragments: list[str], yaml_file) -> None:
    """Guards against tracebacks from YAML, guesses in place of errors, and messages that do not say where."""
    file = yaml_file(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert all(fragment in str(caught.value) for fragment in [str(file), *fragments]), str(caught.value)
    assert "│" not in str(caught.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """Guards against an OSError or a UnicodeDecodeError reaching the user, and a file name left unexplained."""
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}")
    with pytest.raises(UserError, match=r"latin\.yaml cannot be read as UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r"latn\.yaml does not exist: did you mean .*latin\.yaml\?"):
        load_config(tmp_path / "latn.yaml")
    with pytest.raises(UserError, match=r"nothing/there\.yaml does not exist: give the path"):
        load_config(tmp_path / "nothing/there.yaml")


def test_a_flag_is_not_blamed_on_the_file(yaml_file) -> None:
    """Guards against naming the file's line for a value that a flag has overruled."""
    with pytest.raises(UserError) as caught:
        load_config(yaml_file("train: {steps: 5}"), ["--train.steps=0"])
    assert str(caught.value) == "train.steps=0: must be at least 1"


def test_help_is_no_option_of_the_api() -> None:
    """Guards against load_config printing help and ending the caller's process."""
    with pytest.raises(UserError, match="--help"):
        load_config((), ["--help"])


paths = st.text(st.characters(exclude_characters="\0"), min_size=1).map(Path)
unit = st.floats(0, 1, exclude_max=True)
finite = st.floats(0, allow_infinity=False)
positive = st.floats(0, allow_infinity=False, exclude_min=True)
clocks = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(lambda ends: {"start": ends[0], "end": ends[1]})
depths = st.integers(1, 12) | st.floats(0, 1, exclude_min=True) | st.sampled_from(["1/3", "3/4", "1/1"])
stages = st.lists(st.tuples(st.floats(0, 1, exclude_min=True, exclude_max=True), finite), unique_by=lambda s: s[0]).map(
    lambda pairs: (
        *(Stage(until=until, weights=(weight, 1.0)) for until, weight in sorted(pairs)),
        Stage(weights=(1.0, 0.5, 0.25)),
    )
)
configs = st.builds(
    Config,
    data=st.builds(DataConfig, corpus=st.just("text8"), path=st.none() | paths, cache_dir=paths),
    model=st.builds(
        ModelConfig, num_layers=st.integers(12, 99), residual_dropout=unit, norm=st.sampled_from(["pre", "post"])
    ),
    aux=st.builds(
        AuxConfig,
        positions=clocks.map(lambda clock: PositionsConfig(**clock)),
        layers=st.builds(
            LayersConfig,
            enabled=st.booleans(),
            at=st.none() | st.lists(depths, unique_by=str).map(tuple),
            weight=finite,
            total=st.none() | positive,
            stages=stages,
        ),
        targets=st.builds(TargetsConfig, num_targets=st.integers(3, 9), weight=finite, stages=stages),
        tasks=st.dictionaries(
            st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,9}", fullmatch=True),
            st.builds(
                lambda clock, **rest: TaskConfig(**clock, **rest), clocks, weight=finite, layer=st.none() | depths
            ),
            max_size=3,
        ),
    ),
    train=st.builds(
        TrainConfig,
        micro_batch_size=st.none() | st.integers(1, 9),
        learning_rate=positive,
        adam_betas=st.tuples(unit, unit),
        mixed_precision=st.sampled_from(["no", "bf16", "fp16", "auto"]),
        warmup=finite,
        seed=st.integers(0, 2**63 - 1),
    ),
    run=st.builds(
        RunConfig,
        dir=paths,
        resume=st.booleans(),
        resume_from=st.none() | st.integers(0, 10**9),
        tracker=st.sampled_from([(), ("wandb",), ("tensorboard", "wandb")]),
    ),
)


@settings(max_examples=50)
@given(config=configs)
def test_saved_config_reads_back_equal(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against a resumed run that differs in a rounded float, a null, or a path that YAML takes for a number."""
    saved = tmp_path_factory.getbasetemp() / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config


def test_saved_config_is_complete() -> None:
    """Guards against a run that changes when a default does: every option is written."""
    text = to_yaml(Config())
    names = [field.name for section in dataclasses.fields(Config) for field in dataclasses.fields(section.type)]
    assert len(names) > 40
    assert all(f"  {name}:" in text for name in names)


@pytest.mark.parametrize("corpus", ["text8", "enwik8"])
@pytest.mark.parametrize(("size", "num_layers", "dropout", "steps"), [("t12", 12, 0.2, 8e6), ("t64", 64, 0.55, 4e6)])
def test_the_papers_configs(corpus: str, size: str, num_layers: int, dropout: float, steps: float) -> None:
    """Guards against a default, or a line of the file, that drifts from Al-Rfou et al. 2018."""
    config = load_config(ROOT / "configs" / f"{corpus}_{size}.yaml")
    of_the_paper = {
        "data.corpus": corpus,
        "data.vocabulary": "bytes",
        "model.num_layers": num_layers,
        "model.num_heads": 2,
        "model.d_model": 512,
        "model.d_ff": 2048,
        "model.context_length": 512,
        "model.positions": "per_layer",
        "model.activation": "relu",
        "model.attention_dropout": dropout,
        "model.activation_dropout": dropout,
        "model.residual_dropout": 0.0,
        "aux.positions": PositionsConfig(enabled=True, schedule="constant"),
        "aux.layers": LayersConfig(enabled=True, every=1, weight=1.0, schedule="staggered", start=0.0, end=1.0),
        "aux.targets": TargetsConfig(enabled=True, num_targets=2, weight=0.5, schedule="constant"),
        "aux.reduction": "sum",
        "aux.main_weight": 1.0,
        "train.steps": steps,
        "train.batch_size": 16,
        "train.optimizer": "sgd",
        "train.momentum": 0.99,
        "train.learning_rate": 0.003,
        "train.lr_schedule": "constant",
        "train.warmup": 0.0,
        "train.weight_decay": 0.0,
        "train.clip_norm": 0.0,
        "train.valid_every": 10_000,
    }
    assert {name: option(config, name) for name in of_the_paper} == of_the_paper


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config(path: Path) -> None:
    """Guards against a shipped file that does not parse, assumes its own sizes, or repeats a default of its own."""
    load_config(path)
    small = load_config(path, ["--model.num_layers=2", "--train.steps=60", "--train.batch_size=4"])
    assert (small.model.num_layers, small.train.steps, small.train.batch_size) == (2, 60, 4)
