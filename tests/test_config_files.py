"""YAML and flags say the same things in the same words; what was saved is what is read."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import cli
from charlm.config import Config, ConfigError, Mark, UserError, differences, has_mark
from charlm.config.load import OPTIONS, load_config, to_yaml
from charlm.config.objective import Stage, TaskConfig

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in path.parts)
TWO_STAGES = (Stage(until=0.4, weights=(0.5,)), Stage(weights=(1.0,)))
TASK = {f"aux.tasks.order.{name}": value for name, value in TaskConfig(weight=0.1) if value is not None}
FILES = {
    "first": "train: {steps: 1, batch_size: 1}\naux: {layers: {weights: {2: 0.5}}}\n",
    "second": "train: {steps: 2}\naux: {layers: {weights: {4: 0.3}}}\n",
    "micro": "train: {micro_batch_size: 4}\n",
    "half": "data: {corpus: file}\n",
    "stages": "aux.layers:\n  schedule: stages\n  stages:\n  - {until: 0.4, weights: [0.5]}\n  - {weights: [1]}\n",
    "task": "aux: {tasks: {order: 0.1}}\n",
    "nulls": "train: {micro_batch_size: null}\naux: {layers: {at: null}}\n",
    "million": "train: {steps: 1e6}\n",
    "hour": "train: {time: 1h}\n",
    "rate": "train:\n  learning_rate: 6e-3\n",
    "no": "train: {mixed_precision: no}\n",
    "dotted": "aux.layers.enabled: false\n",
    "dashes": "train: {batch-size: 3}\n",
    "octal": "train: {seed: 010}\ndata: {path: 2024}\n",
    "revision": "data: {corpus: lm1b, hub_revision: 1e5}\n",
    "empty": "",
    "empty_sections": "train:\nmodel: {}\nrun: null\n",
    "reset": "aux.layers: {reset: true, every: 3}\n",
    "former": "model: {positions: rotary}\n",
    "lists": "model: {ngrams: '2,3'}\nrun: {tracker: wandb}\n",
    "separators": "data: {corpus: lm1b, separator: null, text_column: '\\n'}\nrun: {project: 'null'}\n",
    "anchors": "aux:\n  layers: &clock {start: 0.25, end: 0.5}\n  targets: *clock\n",
}
LM1B = "--data.corpus=lm1b"
GOOD = {
    "flag=value": ("--train.steps=60", {"train.steps": 60}),
    "flag value": ("--train.steps 60", {"train.steps": 60}),
    "dashes": ("--train.batch-size=3", {"train.batch_size": 3}),
    "dashes in a file": ("--config=dashes.yaml", {"train.batch_size": 3}),
    "list": ("--aux.layers.at=[3,6]", {"aux.layers.at": (3, 6)}),
    "list of fractions": ("--aux.layers.at=[1/3,0.5,1.0]", {"aux.layers.at": ("1/3", 0.5, 1.0)}),
    "list without brackets": ("--model.ngrams=2,3,4", {"model.ngrams": (2, 3, 4)}),
    "list of one without brackets": ("--model.ngrams=2", {"model.ngrams": (2,)}),
    "list that ends in a comma": ("--model.ngrams=2,", {"model.ngrams": (2,)}),
    "list of a fixed length": (["--train.adam_betas=0.9, 0.95"], {"train.adam_betas": (0.9, 0.95)}),
    "empty list": ("--model.ngrams=[]", {}),
    "empty list without brackets": ("--config lists.yaml --model.ngrams= --run.tracker=", {}),
    "list of words": ("--run.tracker=tensorboard,wandb", {"run.tracker": ("tensorboard", "wandb")}),
    "mapping": (["--aux.layers.weights={4: 0.3}"], {"aux.layers.weights.4": 0.3}),
    "mapping by fraction": (
        ["--aux.layers.weights={1/3: 0.3}"],
        {"aux.layers.weights.1/3": 0.3},
    ),
    "stages in a file": (
        "--config stages.yaml",
        {"aux.layers.schedule": "stages", "aux.layers.stages": tuple(map(dict, TWO_STAGES))},
    ),
    "stages in a flag": (
        ["--aux.layers.stages=[{until: 4e-1, weights: 0.5}, {weights: [1]}]"],
        {"aux.layers.stages": tuple(map(dict, TWO_STAGES))},
    ),
    "task in a file": ("--config task.yaml", TASK),
    "task in a flag": (
        ["--aux.tasks={order: {weight: 0.1, layer: 1/3}}"],
        TASK | {"aux.tasks.order.layer": "1/3"},
    ),
    "null over a file": ("--config micro.yaml --train.micro_batch_size=null", {}),
    "null in a file": ("--config micro.yaml --config nulls.yaml", {}),
    "word among numbers": ("--train.micro_batch_size=auto", {"train.micro_batch_size": "auto"}),
    "number among words": ("--train.micro_batch_size=4", {"train.micro_batch_size": 4}),
    "true": ("--run.resume=true", {"run.resume": True}),
    "false": ("--aux.layers.enabled=false", {"aux.layers.enabled": False}),
    "1e6 in a flag": ("--train.steps=1e6", {"train.steps": 1_000_000}),
    "1e6 in a file": ("--config million.yaml", {"train.steps": 1_000_000}),
    "underscores": ("--train.steps=1_000", {"train.steps": 1000}),
    "6e-3 in a file, text to YAML 1.1": ("--config rate.yaml", {"train.learning_rate": 0.006}),
    "no in a file, false to YAML 1.1": ("--config no.yaml", {"train.mixed_precision": "fp32"}),
    "no in a flag": ("--train.mixed_precision=no", {"train.mixed_precision": "fp32"}),
    "fp32": ("--train.mixed_precision=fp32", {"train.mixed_precision": "fp32"}),
    "010 and 2024, a number and a path": ("--config octal.yaml", {"data.path": Path("2024"), "train.seed": 10}),
    "1e5, a text": ("--config revision.yaml", {"data.corpus": "lm1b", "data.hub_revision": "1e5"}),
    "not by way of a float": (f"--train.seed={2**62 + 1}", {"train.seed": 2**62 + 1}),
    "two files and a flag": (
        "--config first.yaml --config second.yaml --train.batch_size=3",
        {"train.steps": 2, "train.batch_size": 3, "aux.layers.weights.4": 0.3},
    ),
    "a time over a file's steps": (
        "--config million.yaml --train.time=1h",
        {"train.time": "1h"},
    ),
    "steps over a file's time": ("--config hour.yaml --train.steps=7", {"train.steps": 7}),
    "no time, over a file's steps": ("--config million.yaml --train.time=null", {"train.steps": 1_000_000}),
    "dotted key": ("--config dotted.yaml", {"aux.layers.enabled": False}),
    "name of a shipped file": (
        "--config methods/keras",
        {"aux.layers.at": ("1/2",), "aux.layers.weight": 0.2, "aux.targets.enabled": False}
        | {"aux.layers.schedule": "constant"},
    ),
    "empty file": ("--config empty.yaml", {}),
    "empty sections": ("--config empty_sections.yaml", {}),
    "a flag mends a file": (
        "--config half.yaml --data.path=x.txt",
        {"data.corpus": "file", "data.path": Path("x.txt")},
    ),
    "path that begins with a dash": ("--data.path=-x.txt", {"data.path": Path("-x.txt")}),
    "path with spaces": (["--data.path=some where/x=1"], {"data.path": Path("some where/x=1")}),
    "text with a comment's sign": (
        ["--data.corpus=lm1b", "--data.separator= # "],
        {"data.corpus": "lm1b", "data.separator": " # "},
    ),
    "escapes in a flag": (
        [LM1B, r"--data.separator=\n\t\x2d\u00e9é\\n\d"],
        {"data.corpus": "lm1b", "data.separator": "\n\t-éé\\n\\d"},
    ),
    "no escapes in a path": ([r"--data.path=\n"], {"data.path": Path(r"\n")}),
    "null for a text": ([LM1B, "--data.separator=null"], {"data.corpus": "lm1b", "data.separator": ""}),
    "null for a text in a file": (
        ["--config=separators.yaml"],
        {"data.corpus": "lm1b", "data.separator": "", "run.project": "null", "data.text_column": r"\n"},
    ),
    "text like a list or null": (["--run.project=[a"], {"run.project": "[a"}),
    "reset": ("--config second.yaml --config reset.yaml", {"train.steps": 2, "aux.layers.every": 3}),
    "former name in a file": ("--config former.yaml", {"model.position_encoding": "rotary"}),
    "former name in a flag": ("--model.positions=rotary", {"model.position_encoding": "rotary"}),
    "anchors": (
        "--config anchors.yaml --aux.targets.end=0.75",
        {"aux.layers.start": 0.25, "aux.layers.end": 0.5, "aux.targets.start": 0.25, "aux.targets.end": 0.75},
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with FILES."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(words: str | list[str]) -> Config:
    return cli.parse(cli.WithConfig, words.split() if isinstance(words, str) else words).config


@pytest.mark.parametrize("case", GOOD)
def test_what_is_understood(case: str, folder: Path) -> None:
    """Guards against YAML's own ideas of types, flags and files that differ, and a wrong order of precedence."""
    words, expected = GOOD[case]
    assert {name: after for name, (_, after) in differences(Config(), read(words)).items()} == expected


def test_a_file_comes_before_a_shipped_one_of_its_name(folder: Path) -> None:
    """Guards against a file of the user's that is not read, and a folder that stands in the way of a shipped file."""
    Path("demo").mkdir()
    assert read("--config demo").train.steps == load_config(ROOT / "configs" / "demo.yaml").train.steps == 2300
    Path("demo").rmdir()
    Path("demo").write_text("train: {steps: 7}\n")
    assert read("--config demo").train.steps == 7


BAD = {
    "flag without a value": ("--run.resume", "", "run.resume", ["expected one argument"]),
    "unknown flag": ("--train.stepz=3", "", None, ["--train.stepz", "--train.steps"]),
    "file without its flag": ("configs/demo.yaml", "", None, ["--config configs/demo.yaml"]),
    "unknown key": ("", "model:\n  num_layer: 3", "model.num_layer", ["model.num_layers", "x.yaml, line 2"]),
    "unknown section": ("", "modle: {num_layers: 3}", "modle", ["model", "line 1"]),
    "option of a script": ("", "json: true", "json", ["line 1"]),
    "wrong type in a flag": ("--train.steps=many", "", "train.steps", ["train.steps=many: should be a valid integer"]),
    "wrong type in a file": ("", "train:\n\n  steps: many", "train.steps", ["train.steps=many", "x.yaml, line 3"]),
    "fraction": ("", "train: {steps: 1.5}", "train.steps", ["train.steps=1.5: should be a valid integer"]),
    "truth for a number": ("", "train: {steps: true}", "train.steps", ["train.steps=true: should be a valid integer"]),
    "list for a number": ("", "train: {steps: [1]}", "train.steps", ["train.steps=[1]: should be a valid integer"]),
    "number for truth": ("--run.resume=perhaps", "", "run.resume", ["should be true or false"]),
    "below the limit": ("--train.steps=0", "", "train.steps", ["train.steps=0", "greater than or equal to 1"]),
    "negative": ("--train.seed -1", "", "train.seed", ["train.seed=-1", "greater than or equal to 0"]),
    "not a number": ("--train.learning_rate=nan", "", "train.learning_rate", ["train.learning_rate=nan"]),
    "5,000 digits": (f"--train.steps={'9' * 5000}", "", "train.steps", ["(5,000 characters)"]),
    "1e999": ("--train.steps=1e999", "", "train.steps", ["train.steps=1e999"]),
    "two options in a flag": ("--model.d_model=9", "", "model.d_model", ["model.d_model=9", "model.num_heads=2"]),
    "two options in a file": (
        "",
        "model:\n  d_model: 9\n  num_heads: 2",
        "model.d_model",
        ["model.d_model is set in x.yaml, line 2", "model.num_heads is set in x.yaml, line 3"],
    ),
    "two sections": (["--aux.layers.weights=[1, 2]"], "", "aux.layers.weights", ["has 2 weights", "11 intermediate"]),
    "missing file": ("--config=nowhere.yaml", "", None, ["nowhere.yaml", "does not exist"]),
    "misspelt file": ("--config=secnd.yaml", "", None, ["did you mean second.yaml"]),
    "folder": ("--config=.", "", None, ["cannot be read"]),
    "broken YAML": ("", "model: {d_model: 16", None, ["x.yaml", "is not valid YAML", "line 1"]),
    "YAML of several documents": ("", "train: {}\n---\ntrain: {}", None, ["x.yaml", "line 2"]),
    "key twice": ("", "train: {steps: 1, steps: 2}", None, ["x.yaml", "line 1", "steps is set twice"]),
    "key twice in a mapping": ("", "aux: {layers: {weights: {4: 1, 4: 2}}}", None, ["4 is set twice"]),
    "key that is a list": ("", "? [a]\n: b", None, ["x.yaml", "line 1"]),
    "list in place of options": ("", "- model", None, ["x.yaml", "`name: value` lines"]),
    "list in place of a section": ("", "train: [1]", "train", ["train=[1]", "`name: value` lines", "line 1"]),
    "mapping that holds itself": ("", "train: &a {b: *a}", None, ["x.yaml", "line 1"]),
    "nested too deeply": ("", "train: " + "[" * 5000, None, ["x.yaml"]),
    "bytes": ("", b"run: {dir: caf\xe9}", None, ["x.yaml", "cannot be read"]),
    "no value in a file": ("", "train: {steps: }", "train.steps", ["train.steps=", "line 1"]),
    "too many digits": (
        "--model.d_model=1e300",
        "",
        "model.d_model",
        ["model.d_model=1e300", "19 digits"],
    ),
    "a billion values": (
        "",
        "train: {a: &a [1, 1], b: &b [*a, *a], c: &c [*b, *b], d: &d [*c, *c], e: &e [*d, *d], f: [*e, *e, *e]}",
        None,
        ["x.yaml", "line 1", "aliases"],
    ),
    "a file without end": ("--config=/dev/zero", "", None, ["/dev/zero", "65,536"]),
    "no value in a flag": ("--train.steps=", "", "train.steps", ["train.steps="]),
    "no path": ("--run.dir=", "", "run.dir", ["run.dir=", "should be a path"]),
    "NUL in a path": (["--run.dir=a\0b"], "", "run.dir", ["should be a path"]),
    "unknown word": ("--data.corpus=enwik9", "", "data.corpus", ["data.corpus=enwik9", "'enwik8'"]),
    "unknown word in a list": ("--run.tracker=tensorbord", "", "run.tracker", ["tensorbord", "'tensorboard'"]),
    "neither word nor number": ("--train.micro_batch_size=few", "", "train.micro_batch_size", ["integer", "'auto'"]),
    "fraction beyond the depth": ("--aux.layers.at=[1/3,1.5]", "", "aux.layers.at", ["aux.layers.at.1=1.5", "1/3"]),
    "word in a list": (["--aux.layers.weights=[1, x]"], "", "aux.layers.weights", ["aux.layers.weights.1=x"]),
    "word in a mapping": (["--aux.layers.weights={x: 1}"], "", "aux.layers.weights", ["aux.layers.weights.x", "1/3"]),
    "null for a path": ("--run.dir=null", "", "run.dir", ["run.dir=null: should be a path"]),
    "null for a word": ("", "run:\n  project: null", "run.project", ["run.project=null", "line 2"]),
    "list of the wrong length": ("--train.adam_betas=0.9", "", "train.adam_betas", ["train.adam_betas.1", "missing"]),
    "broken list": ("--model.ngrams=[2", "", "model.ngrams", ["model.ngrams=[2", "not valid YAML"]),
    "stage without weights": ("", "aux.layers.stages: [{until: 1}]", "aux.layers.stages", ["0.weights", "is missing"]),
    "unknown option of a stage": ("", "aux.layers.stages: [{weights: 1, til: 1}]", "aux.layers.stages", ["0.til"]),
    "unknown option of a task": ("", "aux: {tasks: {a: {wait: 1}}}", "aux.tasks", ["a.wait", "unknown option"]),
    "word for a task": ("", "aux: {tasks: order}", "aux.tasks", ["aux.tasks=order", "should be a mapping"]),
    "two mistakes": (
        "--train.steps=0 --model.d_ff=0",
        "",
        "model.d_ff",
        ["train.steps=0: should be", "model.d_ff=0: should be"],
    ),
    "reset to neither": ("", "aux.layers: {reset: maybe}", None, ["aux.layers.reset"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, folder: Path) -> None:
    """Guards against tracebacks, guesses in place of errors, and messages that do not say what and where."""
    words, text, option, fragments = BAD[case]
    (folder / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = words.split() if isinstance(words, str) else words
    with pytest.raises(UserError) as caught:
        read([*(["--config=x.yaml"] if text else []), *words])
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert option is None or caught.value.option == option
    assert len(str(caught.value)) < 1000


def test_a_flag_is_not_blamed_on_the_file(folder: Path) -> None:
    """Guards against naming the file's line for a value that a flag has overruled."""
    with pytest.raises(UserError) as caught:
        read("--config first.yaml --train.steps=0")
    assert "first.yaml" not in str(caught.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch hurt']", "!!python/name:os.system 8", "!x 8"])
def test_a_tag_does_nothing(tag: str, folder: Path) -> None:
    """Guards against a file that runs code."""
    (folder / "x.yaml").write_text(f"model: {{d_model: {tag}}}")
    try:
        load_config("x.yaml")
    except UserError as error:
        assert error.option == "model.d_model"
    assert not Path("hurt").exists()


def test_files_flags_and_mappings_are_one(folder: Path) -> None:
    """Guards against load_config that reads otherwise than the scripts do."""
    expected = read("--config second.yaml --train.steps=7 --aux.targets.end=0.75")
    for overrides in (
        ["--train.steps=7", "--aux.targets.end=0.75"],
        {"train": {"steps": 7}, "aux.targets.end": 0.75},
        {"train.steps": "7", "aux": {"targets": {"end": 0.75}}},
    ):
        assert load_config("second.yaml", overrides) == load_config([Path("second.yaml")], overrides) == expected


def test_a_former_name_is_answered_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a name that is dropped in silence, and a run of an older version that complains."""
    read("--config former.yaml --model.positions=input")
    assert capsys.readouterr().err == "model.positions is now called model.position_encoding\n"
    load_config("former.yaml")
    assert capsys.readouterr().err == ""


def test_what_a_resumed_run_may_change() -> None:
    """Guards against an option that is resumed into a run that was trained with another."""
    may_change = partial(has_mark, mark=Mark.MAY_CHANGE)
    assert {name for name in OPTIONS if may_change(name) and not name.startswith("run.")} == {
        *(
            "data.path",
            "data.as_is",
            "data.cache_dir",
            "data.hub_id",
            "train.steps",
            "train.micro_batch_size",
            "train.compile",
        ),
        *("train.mixed_precision", "train.matmul_precision", "train.attention", "train.cross_entropy"),
        *("train.activation_checkpointing", "train.sharding", "train.deterministic", "train.log_every"),
        *("train.valid_every", "train.valid_symbols", "train.checkpoint_every", "train.keep_checkpoints"),
        *("train.diagnose_every", "train.max_skipped", "train.decay_steps", "train.decay_type", "train.final_lr"),
    }
    assert all(may_change(name) for name in OPTIONS if name.startswith("run."))
    assert not may_change("aux.tasks.order.weight") and not may_change("aux.layers.weights.4")


paths = st.text(st.characters(exclude_characters="\0"), min_size=1).map(Path)
unit = st.floats(0, 1, exclude_max=True)
finite = st.floats(0, allow_infinity=False)
positive = st.floats(0, allow_infinity=False, exclude_min=True)
clocks = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(lambda ends: {"start": ends[0], "end": ends[1]})
depths = st.integers(1, 12) | st.floats(0, 1, exclude_min=True) | st.sampled_from(["1/3", "3/4", "1/1"])
ends = st.floats(0, 1, exclude_min=True, exclude_max=True)
stages = st.dictionaries(ends, finite).map(
    lambda weights: (
        *(Stage(until=until, weights=(weights[until], 1.0)) for until in sorted(weights)),
        Stage(weights=(1.0, 0.5, 0.25)),
    )
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,9}", fullmatch=True)
tasks = st.builds(lambda clock, **more: clock | more, clocks, weight=finite, layer=st.none() | depths)
values = {
    "data.path": st.none() | paths,
    "data.cache_dir": paths,
    "model.num_layers": st.integers(12, 99),
    "model.residual_dropout": unit,
    "model.norm": st.sampled_from(["pre", "post"]),
    "aux.positions": clocks,
    "aux.layers.enabled": st.booleans(),
    "aux.layers.at": st.none() | st.lists(depths, unique_by=str),
    "aux.layers.weight": finite,
    "aux.layers.total": st.none() | positive,
    "aux.layers.stages": stages,
    "aux.targets.num_targets": st.integers(3, 9),
    "aux.targets.stages": stages,
    "aux.tasks": st.dictionaries(names, tasks, max_size=3),
    "train.micro_batch_size": st.none() | st.integers(1, 9),
    "train.learning_rate": positive,
    "train.adam_betas": st.tuples(unit, unit),
    "train.mixed_precision": st.sampled_from(["fp32", "bf16", "fp16", "auto"]),
    "train.seed": st.integers(0, 2**63 - 1),
    "run.resume_from": st.none() | st.integers(0, 10**9),
    "run.tracker": st.sampled_from([(), ("wandb",), ("tensorboard", "wandb")]),
}
configs = st.fixed_dictionaries({"data.corpus": st.just("text8")} | values).map(partial(load_config, ()))


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
    assert all(f"  {name.rpartition('.')[2]}:" in text for name in OPTIONS)


PAPER = """
data.vocabulary=bytes model.num_heads=2 model.d_model=512 model.d_ff=2048 model.context_length=512
model.position_encoding=per_layer model.ngrams=[] model.activation=relu model.residual_dropout=0
aux.positions.enabled=true aux.positions.schedule=constant aux.layers.enabled=true aux.layers.every=1
aux.layers.weight=1 aux.layers.schedule=staggered aux.layers.start=0 aux.layers.end=1 aux.layers.at=null
aux.layers.weights=null aux.targets.enabled=true aux.targets.num_targets=2 aux.targets.weight=0.5
aux.targets.schedule=constant aux.hedge.enabled=false aux.reduction=sum aux.main_weight=1 aux.route=joint
train.batch_size=16 train.optimizer=sgd train.momentum=0.99 train.learning_rate=0.003 train.lr_schedule=constant
train.warmup=0 train.weight_decay=0 train.clip_norm=0 train.valid_every=10_000
"""


@pytest.mark.parametrize("corpus", ["text8", "enwik8"])
@pytest.mark.parametrize(("size", "num_layers", "dropout", "steps"), [("t12", 12, 0.2, 8e6), ("t64", 64, 0.55, 4e6)])
def test_the_papers_configs(corpus: str, size: str, num_layers: int, dropout: float, steps: float) -> None:
    """Guards against a default, or a line of the file, that drifts from Al-Rfou et al. 2018."""
    of_the_run = f"data.corpus={corpus} model.num_layers={num_layers} train.steps={steps}"
    of_the_run += f" model.attention_dropout={dropout} model.activation_dropout={dropout}"
    config = load_config(ROOT / "configs" / f"{corpus}_{size}.yaml")
    of_the_paper = load_config(ROOT / "configs" / f"{corpus}_{size}.yaml", f"{PAPER} {of_the_run}".split())
    assert differences(config, of_the_paper) == {}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config(path: Path) -> None:
    """Guards against a shipped file that does not parse, assumes its own sizes, or repeats a default of its own."""
    load_config(path)
    small = load_config(path, ["--model.num_layers=3", "--train.steps=60", "--train.batch_size=4"])
    assert (small.model.num_layers, small.train.steps, small.train.batch_size) == (3, 60, 4)


def test_no_more_is_said_than_can_be_read():
    """Guards against a message of megabytes, and minutes of looking for names like thousands of unknown ones."""
    with pytest.raises(ConfigError) as caught:
        load_config((), {f"model.key{i}": 1 for i in range(5000)})
    assert str(caught.value).count("unknown option") == 20
