"""Every value that cannot work is refused before anything runs, with a message that names it and the way out."""

from pathlib import Path

import pytest

from charlm.config import Config, ConfigError, DataConfig, steps_of
from charlm.config.load import load_config

MIXTURE = """data.corpus=mixture data.mixture={"a":{"corpus":"enwik8"}}"""
OUT_OF_RANGE = {
    "data.valid_fraction": "0 | nan",
    "data.test_fraction model.attention_dropout aux.layers.tower_dropout aux.hedge.beta train.momentum": "1",
    "data.corpus": "file",
    "data.mixture": """{a: {}} | {a: {corpus: mixture}} | {a: {corpus: file}} | {a: {corpus: enwik8, weight: 0}}
        | {a: {corpus: enwik8, weight: inf}} | {a: {corpus: enwik8, order: epochs}} | {a: {corpus: text8}}""",
    "model.num_layers model.d_ff model.context_length aux.layers.every aux.layers.rotation aux.relay_layers": "0",
    "aux.layers.total train.steps train.batch_size": "0",
    "aux.targets.num_targets": "0 | 101",
    "aux.layers.tower_width": "0 | 3/2 | 1.5 | wide",
    "train.micro_batch_size train.log_every train.valid_symbols train.keep_checkpoints train.max_skipped": "0",
    "model.d_model": "0 | 513",
    "model.ngrams": "[1] | [2, 2] | [0, 3]",
    "model.residual_dropout train.spike_threshold": "nan",
    "model.num_heads aux.layers.weight aux.layers.gamma train.warmup train.valid_every": "-1",
    "train.checkpoint_every train.diagnose_every run.resume_from": "-1",
    "model.activation_dropout train.weight_decay": "-0.1",
    "aux.positions.start": "-0.5",
    "aux.positions.end": "1.5",
    "aux.layers.at": "[3, 13] | [0] | [1/3, 0.5, 1.5] | [4/3] | [0/3] | [1/0] | [0.0] | [nan]",
    "aux.layers.weights": "[1, 2] | [] | {4: -1} | {4: inf} | {13: 1} | {2/1: 1} | {4: 1, 1/3: 1} | {12: 1}",
    "aux.layers.schedule aux.targets.schedule": "stages",
    "aux.layers.stages": """[{until: 0.5, weights: [1]}] | [{until: 0, weights: [1]}, {weights: [1]}]
        | [{until: 0.5, weights: [1]}, {until: 0.5, weights: [1]}, {weights: [1]}] | [{weights: []}]
        | [{weights: [-1]}]""",
    "aux.layers.hinge train.clip_norm": "nan",
    "aux.targets.stages": "[{weights: [1, 1, 1]}]",
    "aux.targets.weight": "inf",
    "aux.hedge.smoothing": "1",
    "aux.tasks": """{order: -1} | {order: {weight: 1, layer: 13}} | {order: {weight: 1, layer: 3/2}}
        | {order: {weight: 1, start: 0.5, end: 0.2}}""",
    "train.learning_rate": "0 | nan | inf",
    "train.final_lr": "2",
    "train.adam_betas": "[0.9, 1]",
    "train.seed": f"-1 | {2**63}",
    "run.max_time train.time": "soon",
    "run.branch_step": "0 | 5",
    "run.tracker": "[wandb, wandb]",
}
"""Options, and the values that each of them refuses."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value.strip())
        for names, values in OUT_OF_RANGE.items()
        for name in names.split()
        for value in values.split("|")
    ],
)
def test_value_out_of_range(name: str, value: str) -> None:
    """Guards against a check that is missing, names another option, or lets nan through."""
    with pytest.raises(ConfigError) as caught:
        load_config((), [f"--{name}={value}"])
    assert caught.value.option == name
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "option", "way_out"),
    [
        ("weights=[1, 2] --aux.layers.at=[3, 6] --aux.layers.weighting=linear", "weights", "weighting=linear"),
        ("weights={4: 1} --aux.layers.at=[3, 6]", "weights", "leave out aux.layers.at"),
        ("weights=[1, 2] --aux.layers.at=[3, 6, 9]", "weights", "has 2 weights, and 3 .* head: 3, 6, 9"),
        ("weights=[1, 2, 3] --aux.layers.at=[3, 6, 12]", "weights", "has 3 weights, and 2 .* head: 3, 6"),
        ("weights=[0, 0] --aux.layers.at=[3, 6] --aux.layers.total=1", "total", "all zero"),
        ("schedule=stages --aux.layers.stages=[{weights: [1, 2]}]", "stages", "2 weights, and 11 intermediate"),
    ],
)
def test_options_of_layers_that_cannot_be_combined(flags: str, option: str, way_out: str) -> None:
    """Guards against an option that is silently ignored, and weights given to other layers than was meant."""
    with pytest.raises(ConfigError, match=way_out) as caught:
        load_config((), f"--aux.layers.{flags}".split(" --"))
    assert caught.value.option == f"aux.layers.{option}"


def test_checks_leave_layers_alone_that_are_switched_off() -> None:
    """Guards against a base config whose unused weights forbid another depth."""
    flags = ["--aux.layers.weights=[1, 2]", "--aux.layers.enabled=false", "--model.num_layers=5"]
    assert load_config((), flags).aux.layers.intermediate(5) == ()


@pytest.mark.parametrize(
    ("corpus", "name", "value", "way_out"),
    [
        ("python-stdlib", "path", "x.txt", "--data.corpus=enwik8 or text8 or file"),
        ("python-stdlib", "hub_id", "a/b", "--data.corpus=lm1b or hub"),
        ("lm1b", "path", "x.txt", "--data.corpus=enwik8 or text8 or file"),
        ("enwik8", "hub_revision", "main", "--data.corpus=lm1b or hub"),
        ("enwik8", "valid_fraction", "0.1", "--data.corpus=lm1b or hub or file or python-stdlib"),
        ("text8", "test_split", "held", "--data.corpus=lm1b or hub"),
    ],
)
def test_an_option_that_the_corpus_ignores(corpus: str, name: str, value: str, way_out: str) -> None:
    """Guards against training on one text when another was named, and against refusing the options of a corpus."""
    with pytest.raises(ConfigError, match=f"data.{name}={value}: corpus={corpus} has no use for it; .*{way_out}"):
        load_config((), [f"--data.corpus={corpus}", f"--data.{name}={value}"])
    for other in way_out.partition("=")[2].split(" or "):
        needed = {"file": ["--data.path=x.txt"], "hub": ["--data.hub_id=a/b"]}.get(other, [])
        load_config((), [f"--data.corpus={other}", f"--data.{name}={value}", *needed])


@pytest.mark.parametrize(("value", "cache_dir"), [("", "~/.cache/charlm"), ("/somewhere", "/somewhere")])
def test_the_cache_of_the_environment(value: str, cache_dir: str, monkeypatch) -> None:
    """Guards against CHARLM_CACHE being ignored, and against corpora in the working folder where it is empty."""
    monkeypatch.setenv("CHARLM_CACHE", value)
    assert DataConfig().cache_dir == Path(cache_dir)
    monkeypatch.delenv("CHARLM_CACHE")
    assert DataConfig().cache_dir == Path("~/.cache/charlm")


def test_checks_see_the_whole_config() -> None:
    """Guards against checking a file before its flags: each half alone is refused, together they work."""
    config = load_config(
        (), ["--model.num_heads=3", "--model.d_model=96", "--aux.layers.at=[24]", "--model.num_layers=24"]
    )
    assert (config.model.num_heads, config.model.d_model, config.aux.layers.at) == (3, 96, (24,))


@pytest.mark.parametrize(
    ("flags", "option", "other"),
    [
        ("data.corpus=mixture", "data.mixture", "corpus=mixture"),
        (f"{MIXTURE} data.order=epochs", "data.order", "uniform"),
        (f"{MIXTURE} data.path=x", "data.path", "corpus=mixture"),
        ("data.corpus=lm1b data.test_fraction=0.95", "data.valid_fraction", "test_fraction=0.95"),
        ("model.num_heads=3", "model.d_model", "model.num_heads=3"),
        ("aux.layers.schedule=rotational aux.main_weight=0", "aux.main_weight", "schedule=rotational"),
    ],
)
def test_two_options_that_do_not_fit(flags: str, option: str, other: str) -> None:
    """Guards against a message that names one of the two alone, and steps on which nothing is learned."""
    with pytest.raises(ConfigError, match=other) as caught:
        load_config((), flags.split())
    assert caught.value.option == option


def test_defaults_are_valid() -> None:
    """Guards against a default that its own check refuses."""
    assert load_config() == Config()


@pytest.mark.parametrize(
    ("cadence", "total", "steps"),
    [(0.05, 1000, 50), (0.001, 60, 1), (0.5, 3, 2), (1, 60, 1), (10_000, 60, 10_000), (0, 60, 0)],
)
def test_steps_of(cadence: float, total: int, steps: int) -> None:
    """Guards against a cadence that rounds to never, and against taking 1 for the whole run."""
    assert steps_of(cadence, total) == steps
