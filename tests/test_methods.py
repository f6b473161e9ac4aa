"""The presets in configs/methods: the table that each makes of models of three depths, on whatever base config."""

from functools import cache
from pathlib import Path

import pytest

from charlm.config import Config, ConfigError, ModelConfig
from charlm.config.load import load_config
from charlm.objective.terms import build_terms

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "methods"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
AUXNET = {
    6: {2: 1 / 9, 3: 1 / 4, 4: 4 / 9, 5: 25 / 36},
    12: {3: 1 / 16, 5: 25 / 144, 8: 4 / 9, 10: 25 / 36},
    64: {17: 289 / 4096, 29: 841 / 4096, 40: 25 / 64, 51: 2601 / 4096},
}
WEIGHTS = {
    "googlenet": {6: {2: 0.3, 4: 0.3}, 12: {4: 0.3, 8: 0.3}, 64: {21: 0.3, 43: 0.3}},
    "pspnet": {6: {5: 0.4}, 12: {9: 0.4}, 64: {48: 0.4}},
    "keras": {6: {3: 0.2}, 12: {6: 0.2}, 64: {32: 0.2}},
    "dsn": {L: dict.fromkeys(range(1, L), 0.3) for L in (6, 12, 64)},
    "cnds": {6: {2: 0.3}, 12: {3: 0.3}, 64: {16: 0.3}},
    "auxnet_joint": AUXNET,
    "auxnet_pairwise": AUXNET,
    "auxnet_multiway": AUXNET,
    "branchynet": {6: {2: 1, 4: 1}, 12: {4: 1, 8: 1}, 64: {21: 1, 43: 1}},
    "hedge": {L: dict.fromkeys(range(1, L), 1) for L in (6, 12, 64)},
}
"""What the intermediate layers of models of 6, 12 and 64 layers weigh at the start, worked out by hand."""
ANOTHER_BASE = """
aux:
  layers: {enabled: false, schedule: stages, stages: [{weights: 0.7}], start: 0.2, end: 0.3, every: 2, weights: {1: 5},
    weight: 0.1, total: 9, gamma: 7, rotation: 2, head: tower, tower_width: 3, tower_dropout: 0.9, hinge: 3}
  targets: {enabled: true, schedule: growing, start: 0.1, end: 0.8, num_targets: 3, weight: 0.3, layers: last}
  hedge: {enabled: true, beta: 0.5, smoothing: 0.5}
  reduction: mean
  main_weight: 0.5
  route: relay
"""
"""A base config that says something else than any preset wherever it can."""


@cache
def alone(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", ["--train.steps=100"])


def preset(name: str, num_layers: int) -> Config:
    return alone(name).replace(model=ModelConfig(num_layers=num_layers))


def rows(config: Config, progress: float) -> dict[str, float]:
    terms = build_terms(config.aux, config.model.num_layers, config.train.steps)
    return {term.name: term.weight(progress) for term in terms if term.weight(progress)}


def at_all_positions(weights: dict[int, float]) -> dict[str, float]:
    return {f"layer{layer}/offset1/all": weight for layer, weight in weights.items()}


def test_every_preset_is_there() -> None:
    """Guards against a method that is named and not shipped, or shipped and tested nowhere."""
    assert sorted([*WEIGHTS, "al_rfou", "layerskip", "multi_token"]) == PRESETS


@pytest.mark.parametrize("num_layers", [6, 12, 64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_of_a_preset(name: str, num_layers: int) -> None:
    """Guards against a fraction of depth on the wrong layer, a weight that is not the source's, an extra target."""
    config = preset(name, num_layers)
    main = {num_layers: 0.3 if name == "branchynet" else 1.0}
    assert rows(config, 0.0) == pytest.approx(at_all_positions(WEIGHTS[name][num_layers] | main))
    later = {"cnds": 0.25, "dsn": 0.0}.get(name, 1.0)
    faded = {layer: weight * later for layer, weight in WEIGHTS[name][num_layers].items() if later}
    assert rows(config, 0.75) == pytest.approx(at_all_positions(faded | main))


def test_what_else_presets_say() -> None:
    """Guards against the right rows with the wrong heads, route, threshold or schedule."""
    aux = {name: preset(name, 12).aux for name in PRESETS}
    heads = {"googlenet": "tower", "pspnet": "tower", "layerskip": "shared"}
    assert {name: one.layers.head for name, one in aux.items() if one.layers.enabled} == {
        name: heads.get(name, "linear") for name in PRESETS if name != "multi_token"
    }
    assert {name: one.route for name, one in aux.items() if one.route != "joint"} == {
        "auxnet_pairwise": "pairwise",
        "auxnet_multiway": "multiway",
    }
    assert {name: one.layers.tower_width for name, one in aux.items() if one.layers.tower_width} == {"pspnet": "1/4"}
    auxnet = ["auxnet_joint", "auxnet_multiway", "auxnet_pairwise"]
    assert [name for name, one in aux.items() if one.step_sizes == "weighted"] == auxnet
    assert [name for name, one in aux.items() if one.layers.hinge > 0] == ["dsn"]
    assert [name for name, one in aux.items() if one.hedge.enabled] == ["hedge"]
    assert (aux["hedge"].hedge.beta, aux["hedge"].hedge.smoothing) == (0.99, 0.2)
    assert rows(preset("dsn", 6), 0.49) != rows(preset("dsn", 6), 0.5)


@pytest.mark.parametrize("num_layers", [6, 12, 64])
def test_al_rfou(num_layers: int) -> None:
    """Guards against a preset that departs from the paper, or from the defaults."""
    config = preset("al_rfou", num_layers)
    assert config.aux == Config().aux
    for progress in (0.0, 0.2, 0.49, 0.5):
        on = [layer for layer in range(1, num_layers) if progress < layer / (2 * num_layers)]
        assert rows(config, progress) == {
            f"layer{layer}/offset{offset}/all": weight
            for layer in [*on, num_layers]
            for offset, weight in ((1, 1.0), (2, 0.5))
        }


@pytest.mark.parametrize("num_layers", [6, 12, 64])
def test_layerskip(num_layers: int) -> None:
    """Guards against layers that are all on at once, and weights that do not sum to 1 at each step."""
    config, last = preset("layerskip", num_layers), num_layers * (num_layers + 1)
    for step in (0, 1, 2, num_layers - 2, num_layers - 1):
        layer = step % (num_layers - 1) + 1
        weight = layer * (layer + 1)
        expected = {layer: weight / (weight + last), num_layers: last / (weight + last)}
        assert rows(config, step / 100) == pytest.approx(at_all_positions(expected))


@pytest.mark.parametrize("num_layers", [6, 12, 64])
def test_multi_token(num_layers: int) -> None:
    """Guards against intermediate layers that are still on, or targets that count half."""
    expected = {f"layer{num_layers}/offset{offset}/all": 1.0 for offset in (1, 2, 3, 4)}
    assert rows(preset("multi_token", num_layers), 0.0) == rows(preset("multi_token", num_layers), 0.99) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_the_least_depth(name: str) -> None:
    """Guards against a method that silently trains without its losses, and a message that does not name the preset."""
    least = {"al_rfou": 1, "multi_token": 1, "pspnet": 3}.get(name, 2)
    load_config(FOLDER / f"{name}.yaml", {"model.num_layers": least})
    for num_layers in range(1, least):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml, line \d") as caught:
            load_config(FOLDER / f"{name}.yaml", {"model.num_layers": num_layers})
        assert caught.value.option.startswith("aux.")
    off = {"aux.layers.enabled": False, "aux.hedge.enabled": False}
    load_config(FOLDER / f"{name}.yaml", {"model.num_layers": 1} | off)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_overrules_any_base(name: str, tmp_path: Path) -> None:
    """Guards against a method that is another one on a base config that sets what the preset forgot."""
    base = tmp_path / "base.yaml"
    base.write_text(ANOTHER_BASE)
    expected, config = alone(name), load_config([base, FOLDER / f"{name}.yaml"], ["--train.steps=100"])
    for step in range(0, 100, 9):
        assert rows(config, step / 100) == rows(expected, step / 100)
    assert config.aux.route == expected.aux.route
    assert config.aux.hedge.enabled == expected.aux.hedge.enabled
    if expected.aux.hedge.enabled:
        assert config.aux.hedge == expected.aux.hedge
    options = ["head", "hinge"] if expected.aux.layers.enabled else []
    options += ["tower_width", "tower_dropout"] if expected.aux.layers.head == "tower" else []
    for option in options:
        assert getattr(config.aux.layers, option) == getattr(expected.aux.layers, option)
