"""The table of terms: by hand for small cases, and against a plain formula for any config."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import (
    AuxConfig,
    ConfigError,
    LayersConfig,
    PositionsConfig,
    Stage,
    TargetsConfig,
    TaskConfig,
)
from charlm.objective.terms import Term, active, build_terms

OFF = {"enabled": False}


def aux(positions=None, layers=None, targets=None, **options) -> AuxConfig:
    return AuxConfig(
        positions=PositionsConfig(**(positions or {})),
        layers=LayersConfig(**(layers or {})),
        targets=TargetsConfig(**(targets or {})),
        **options,
    )


def table(terms: tuple[Term, ...], progress: float) -> dict[tuple[int, int, str], float]:
    return {(term.layer, term.offset, term.positions): weight for term, weight in active(terms, progress)}


def rows(terms: tuple[Term, ...]) -> list[tuple[int, int, str]]:
    return [(term.layer, term.offset, term.positions) for term in terms]


def test_the_papers_table():
    """A default that departs from the paper: two layers, two targets at 0.5, all positions, layer 1 until 1/4."""
    terms = build_terms(AuxConfig(), 2)
    assert [term.name for term in terms] == [
        "layer1/offset1/all",
        "layer1/offset2/all",
        "layer2/offset1/all",
        "layer2/offset2/all",
    ]
    last = {(2, 1, "all"): 1.0, (2, 2, "all"): 0.5}
    assert table(terms, 0.0) == {(1, 1, "all"): 1.0, (1, 2, "all"): 0.5} | last
    assert table(terms, 0.2499) == {(1, 1, "all"): 1.0, (1, 2, "all"): 0.5} | last
    assert table(terms, 0.25) == table(terms, 0.999) == last
    assert [term.weight.stops_at for term in terms] == [0.25, 0.25, None, None]


@pytest.mark.parametrize(("positions", "layers", "targets"), list(product([True, False], repeat=3)))
def test_each_flag_removes_exactly_its_rows(positions, layers, targets):
    """A flag that takes another loss's rows with it, or leaves some of its own."""
    terms = build_terms(
        aux({"enabled": positions}, {"enabled": layers, "schedule": "constant"}, {"enabled": targets}), 3
    )
    expected = {
        (layer, offset, "all" if positions else "last"): 1.0 if offset == 1 else 0.5
        for layer in ((1, 2, 3) if layers else (3,))
        for offset in ((1, 2) if targets else (1,))
    }
    assert table(terms, 0.0) == table(terms, 0.9) == expected
    assert rows(terms) == sorted(expected)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]),
        ("cosine", [1.0, 1.0, (2 + math.sqrt(2)) / 4, 0.5, 0.0, 0.0]),
        ("cutoff", [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_positions_decay_into_the_last_one(schedule, shares):
    """A last position that is counted twice, or not at all, while the others fade."""
    config = aux({"schedule": schedule, "start": 0.25, "end": 0.75}, {"schedule": "constant", "weight": 0.25})
    terms = build_terms(config, 2)
    assert rows(terms) == list(product((1, 2), (1, 2), ("all", "last")))
    for progress, share in zip([0.0, 0.25, 0.375, 0.5, 0.75, 0.9], shares, strict=True):
        tasks = {(1, 1): 0.25, (1, 2): 0.125, (2, 1): 1.0, (2, 2): 0.5}
        expected = {(*task, "all"): weight * share for task, weight in tasks.items()}
        expected |= {(*task, "last"): weight * (1 - share) for task, weight in tasks.items()}
        assert table(terms, progress) == pytest.approx({row: weight for row, weight in expected.items() if weight})


def test_mean_divides_by_the_layers_that_are_active():
    """An average over layers that fell silent, or over rows in place of layers."""
    terms = build_terms(aux(reduction="mean"), 4)  # layers 1, 2, 3 stop at 1/8, 2/8, 3/8
    for progress, layers in [(0.0, (1, 2, 3, 4)), (0.125, (2, 3, 4)), (0.3, (3, 4)), (0.375, (4,)), (0.9, (4,))]:
        expected = {(layer, 1, "all"): 1 / len(layers) for layer in layers}
        expected |= {(layer, 2, "all"): 0.5 / len(layers) for layer in layers}
        assert table(terms, progress) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ({}, 4, [1, 2, 3, 4]),
        ({}, 1, [1]),
        ({"every": 2}, 6, [2, 4, 6]),
        ({"every": 5}, 12, [5, 10, 12]),
        ({"every": 9}, 4, [4]),
        ({"at": (3, 1)}, 4, [1, 3, 4]),
        ({"at": (2, 4)}, 4, [2, 4]),
        ({"at": ()}, 4, [4]),
        ({"at": (1,), "every": 2}, 4, [1, 4]),
    ],
)
def test_which_layers_predict(layers, num_layers, expected):
    """A head on the wrong layer, none on the last, or two there."""
    terms = build_terms(aux(layers=layers, targets=OFF), num_layers)
    assert rows(terms) == [(layer, 1, "all") for layer in expected]


@pytest.mark.parametrize(
    ("schedule", "weights_of_layer_1"),
    [
        ("constant", [0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.375, 0.25, 0.0]),
        ("cosine", [0.5, (2 + math.sqrt(2)) / 8, 0.25, 0.0]),
        ("cutoff", [0.5, 0.5, 0.5, 0.0]),
        ("staggered", [0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_schedules_of_intermediate_layers(schedule, weights_of_layer_1):
    """A schedule name that stands for another schedule, or one that reaches the last layer."""
    terms = build_terms(aux(layers={"schedule": schedule, "start": 0.25, "end": 0.75, "weight": 0.5}, targets=OFF), 2)
    for progress, weight in zip([0.25, 0.375, 0.5, 0.75], weights_of_layer_1, strict=True):
        expected = {(1, 1, "all"): weight, (2, 1, "all"): 1.0}
        assert table(terms, progress) == pytest.approx({row: w for row, w in expected.items() if w})


@pytest.mark.parametrize(("num_targets", "offsets"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4])])
def test_number_of_targets(num_targets, offsets):
    """One target too many or too few, or a weight that compounds from target to target."""
    terms = build_terms(aux(layers=OFF, targets={"num_targets": num_targets}), 3)
    assert table(terms, 0.5) == {(3, offset, "all"): 1.0 if offset == 1 else 0.5 for offset in offsets}


def test_extra_targets_decay_alone():
    """A schedule of the extra targets that also takes the next character with it."""
    terms = build_terms(aux(targets={"num_targets": 3, "schedule": "linear", "end": 0.5}, layers=OFF), 1)
    assert table(terms, 0.25) == {(1, 1, "all"): 1.0, (1, 2, "all"): 0.25, (1, 3, "all"): 0.25}
    assert table(terms, 0.5) == {(1, 1, "all"): 1.0}


def test_weight_of_the_last_layer():
    """A main weight that misses the last layer's extra target, or that touches the other layers."""
    terms = build_terms(aux(layers={"schedule": "constant"}, main_weight=0.25), 2)
    assert table(terms, 0.0) == {(1, 1, "all"): 1.0, (1, 2, "all"): 0.5, (2, 1, "all"): 0.25, (2, 2, "all"): 0.125}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (aux(layers={"weight": 0.0}), [(3, 1, "all"), (3, 2, "all")]),
        (aux(targets={"weight": 0.0}, layers=OFF), [(3, 1, "all")]),
        (aux(layers={"schedule": "linear", "end": 0.0}, targets=OFF), [(3, 1, "all")]),
        (aux(layers={"end": 0.0}, targets=OFF), [(3, 1, "all")]),
        (aux(positions={"schedule": "cutoff", "end": 0.0}, layers=OFF, targets=OFF), [(3, 1, "last")]),
        (aux(positions={"schedule": "cutoff", "end": 1.0}, layers=OFF, targets=OFF), [(3, 1, "all")]),
        (aux(main_weight=0.0, layers={"schedule": "constant", "at": (2,)}, targets=OFF), [(2, 1, "all")]),
    ],
)
def test_rows_that_never_weigh_anything_are_not_listed(config, expected):
    """A head with parameters and a line in the table that no step ever trains."""
    assert rows(build_terms(config, 3)) == expected


@pytest.mark.parametrize(
    ("config", "since"),
    [
        (aux(main_weight=0.0, layers=OFF), "0"),
        (aux(main_weight=0.0, layers={"weight": 0.0}), "0"),
        (aux(main_weight=0.0), "0.25"),
        (aux(main_weight=0.0, layers={"schedule": "linear", "end": 0.9}, reduction="mean"), "0.9"),
    ],
)
def test_a_time_without_any_loss_is_refused(config, since):
    """A run that trains for hours on nothing, or crashes when the last loss has faded."""
    with pytest.raises(
        ConfigError, match=rf"aux\.main_weight=0\.0: all losses .* zero from progress {since} on; raise"
    ):
        build_terms(config, 2)


def layer_weights(num_layers, progress=0.0, steps=None, **layers) -> dict[int, float]:
    terms = build_terms(aux(layers={"schedule": "constant"} | layers, targets=OFF), num_layers, steps)
    return {term.layer: weight for term, weight in active(terms, progress)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weighting": "linear"}, [1 / 4, 2 / 4, 3 / 4]),
        ({"weighting": "quadratic"}, [1 / 10, 3 / 10, 6 / 10]),  # 1, 1 + 2, 1 + 2 + 3 of 1 + 2 + 3 + 4
        ({"weighting": "power"}, [1 / 16, 4 / 16, 9 / 16]),
        ({"weighting": "power", "gamma": 0.5}, [0.5, math.sqrt(0.5), math.sqrt(0.75)]),
        ({"weighting": "power", "gamma": 8.0}, [0.01, 0.01, 0.75**8]),  # 1/65536 and 1/256 are below 0.01
        ({"weighting": "linear", "weight": 0.2}, [0.05, 0.1, 0.15]),
        ({"weighting": "linear", "total": 0.6}, [0.1, 0.2, 0.3]),
        ({"weighting": "linear", "total": 0.6, "weight": 7.0}, [0.1, 0.2, 0.3]),
        ({"total": 2.0}, [2 / 3, 2 / 3, 2 / 3]),
        ({"weights": (0.3, 0.0, 0.1)}, [0.3, None, 0.1]),
        ({"weights": (0.3, 0.0, 0.1), "weight": 0.5}, [0.15, None, 0.05]),
        ({"weights": (3.0, 0.0, 1.0), "total": 1.0}, [0.75, None, 0.25]),
        ({"weights": {3: 0.3, 1: 0.2}}, [0.2, None, 0.3]),
        ({"weights": {"1/4": 0.2, 0.5: 0.3}}, [0.2, 0.3, None]),
        ({"weights": {1: 3.0, 2: 1.0}, "total": 2.0}, [1.5, 0.5, None]),
        ({"weights": (0.3, 0.2), "at": ("3/4", 1)}, [0.3, None, 0.2]),  # in rising order of layers
        ({"weighting": "linear", "every": 2}, [None, 0.5, None]),
    ],
)
def test_weights_of_intermediate_layers(options, expected):
    """A weighting that counts layers from 0, or by heads; a list that runs the wrong way; a total that takes the last
    layer along, or is scaled by `weight` on top."""
    weights = {layer: weight for layer, weight in enumerate(expected, start=1) if weight is not None}
    assert layer_weights(4, **options) == pytest.approx(weights | {4: 1.0})


@pytest.mark.parametrize(
    ("at", "num_layers", "expected"),
    [
        (("1/3", "2/3"), 6, [2, 4, 6]),
        (("1/3", "2/3"), 12, [4, 8, 12]),
        (("1/3", "2/3"), 64, [21, 43, 64]),  # 21.33 and 42.67
        ((0.25,), 6, [2, 6]),  # 1.5 is rounded up
        ((0.75,), 6, [5, 6]),  # and 4.5
        ((0.7,), 5, [4, 5]),  # 3.5 in decimals; the float 0.7 * 5 + 0.5 is below 4
        (("15/56", "25/56", "35/56", "45/56"), 56, [15, 25, 35, 45, 56]),
        (("15/56", "25/56", "35/56", "45/56"), 6, [2, 3, 4, 5, 6]),  # 1.6, 2.7, 3.75, 4.8
        (("15/56", "25/56", "35/56", "45/56"), 2, [1, 2]),  # they meet
        ((0.01,), 6, [1, 6]),
        ((1.0,), 6, [6]),
        (("1/1", 1), 6, [1, 6]),
        ((2, "1/3"), 6, [2, 6]),
    ],
)
def test_layers_by_fraction_of_depth(at, num_layers, expected):
    """A fraction that is rounded down, or by the float's own error; a fraction of 1 read as layer 1; two heads on one
    layer of a shallow model."""
    assert list(layer_weights(num_layers, at=at)) == expected


def test_dropping_companions_and_letting_them_fade():
    """DSN's drop after a fraction and its alpha (1 - t/N), which must be within reach of the options."""
    assert layer_weights(3, 0.49, schedule="cutoff", end=0.5, weight=0.1) == {1: 0.1, 2: 0.1, 3: 1.0}
    assert layer_weights(3, 0.5, schedule="cutoff", end=0.5, weight=0.1) == {3: 1.0}
    assert layer_weights(4, 0.75, schedule="linear", at=("1/4",), weight=0.3) == pytest.approx({1: 0.075, 4: 1.0})


def test_gradual_layers():
    """Layers that come from the bottom, all at once, or only after half of training."""
    for progress, layers in [
        (0.0, [4]),
        (0.125, [3, 4]),
        (0.25, [2, 3, 4]),
        (0.375, [1, 2, 3, 4]),
        (0.9, [1, 2, 3, 4]),
    ]:
        assert list(layer_weights(4, progress, schedule="gradual")) == layers


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [[1, 6], [2, 6], [3, 6], [4, 6], [5, 6], [1, 6], [2, 6]]),
        ({"rotation": 2}, [[1, 3, 5, 6], [2, 4, 6], [1, 3, 5, 6]]),
        ({"rotation": 3}, [[1, 4, 6], [2, 5, 6], [3, 6], [1, 4, 6]]),
        ({"every": 2, "rotation": 2}, [[2, 6], [4, 6], [2, 6]]),  # by heads: by layers both would be on at once
        ({"rotation": 1}, [[1, 2, 3, 4, 5, 6]] * 3),
        ({"at": ()}, [[6], [6]]),
    ],
)
def test_rotating_layers(options, layers):
    """A head that is never on, more of them at a step than one of R, or a last layer that rotates along."""
    for step, expected in enumerate(layers):
        assert list(layer_weights(6, step / 97, steps=97, schedule="rotational", **options)) == expected


def test_a_rotation_needs_the_steps():
    """Rows that are all on, or all off, because nobody said how long training is."""
    with pytest.raises(ValueError, match="needs the steps of the run"):
        build_terms(aux(layers={"schedule": "rotational"}), 3)


def test_weighted_mean():
    """An average by the number of layers in place of their weights, or over layers that are off."""
    config = aux(layers={"schedule": "rotational", "weighting": "linear"}, targets=OFF, reduction="weighted_mean")
    terms = build_terms(config, 3, steps=10)
    assert table(terms, 0.0) == pytest.approx({(1, 1, "all"): 1 / 4, (3, 1, "all"): 3 / 4})  # 1/3 to 1
    assert table(terms, 0.1) == pytest.approx({(2, 1, "all"): 2 / 5, (3, 1, "all"): 3 / 5})  # 2/3 to 1
    assert terms[1].weight.at_next_turn(0.0) == pytest.approx(2 / 5)


STAGES = (Stage(until=0.4, weights=(1.0, 0.5, 0.25)), Stage(until=0.8, weights=(1.0, 0.5)), Stage(weights=(1.0,)))


@pytest.mark.parametrize(
    ("passage", "progress", "weights"),
    [
        ("step", 0.0, [1, 0.5, 0.25]),
        ("step", 0.399, [1, 0.5, 0.25]),
        ("step", 0.4, [1, 0.5]),
        ("step", 0.8, [1]),
        ("linear", 0.0, [1, 0.5, 0.25]),
        ("linear", 0.2, [1, 0.5, 0.125]),
        ("linear", 0.4, [1, 0.5]),
        ("linear", 0.6, [1, 0.25]),
        ("linear", 0.8, [1]),
        ("linear", 0.9, [1]),
    ],
)
def test_stages_of_targets(passage, progress, weights):
    """A stage that begins early, a passage to the wrong stage, or weights halved by `aux.targets.weight`."""
    targets = {"schedule": "stages", "stages": STAGES, "passage": passage, "num_targets": 3}
    terms = build_terms(aux(layers=OFF, targets=targets), 1)
    expected = {(1, offset, "all"): weight for offset, weight in enumerate(weights, start=1)}
    assert table(terms, progress) == pytest.approx(expected)
    assert [term.weight.stops_at for term in terms] == [None, 0.8, 0.4]


def test_stages_of_layers():
    """Weights of a stage given to the wrong layer, one number that is not for all, or the last layer counted in."""
    stages = (Stage(until=0.5, weights=(0.1, 0.2)), Stage(weights=(0.4,)))
    options = {"schedule": "stages", "stages": stages, "weight": 0.5}
    assert layer_weights(3, 0.2, **options) == pytest.approx({1: 0.05, 2: 0.1, 3: 1.0})
    assert layer_weights(3, 0.7, **options) == pytest.approx({1: 0.2, 2: 0.2, 3: 1.0})
    assert layer_weights(3, 0.25, **options, passage="linear") == pytest.approx({1: 0.125, 2: 0.15, 3: 1.0})
    assert layer_weights(1, 0.2, **options | {"stages": (Stage(weights=(0.4,)),)}) == {1: 1.0}


@pytest.mark.parametrize(
    ("schedule", "numbers"), [("growing", [1, 1, 2, 2, 3, 3, 4, 4]), ("shrinking", [4, 4, 3, 3, 2, 2, 1, 1])]
)
def test_number_of_targets_over_training(schedule, numbers):
    """A number of targets that begins or ends one off, or that takes the next character along."""
    terms = build_terms(aux(layers=OFF, targets={"schedule": schedule, "num_targets": 4, "weight": 1.0}), 1)
    for eighth, number in enumerate(numbers):
        assert [offset for _, offset, _ in table(terms, eighth / 8)] == list(range(1, number + 1))


def test_extra_targets_on_the_last_layer_alone():
    """Intermediate layers that predict the extra targets all the same, or lose the next character."""
    terms = build_terms(aux(layers={"schedule": "constant"}, targets={"layers": "last"}), 3)
    assert rows(terms) == [(1, 1, "all"), (2, 1, "all"), (3, 1, "all"), (3, 2, "all")]


def test_hinge_of_companions():
    """A threshold on the main loss, or on a task of the user's own."""
    config = aux(layers={"hinge": 1.5, "schedule": "constant"}, tasks={"order": TaskConfig(weight=0.1, layer=1)})
    hinges = {term.name: term.hinge for term in build_terms(config, 2)}
    assert hinges == {
        "layer1/offset1/all": 1.5,
        "layer1/offset2/all": 1.5,
        "layer2/offset1/all": 0.0,
        "layer2/offset2/all": 0.0,
        "layer1/task/order": 0.0,
    }


def test_rows_of_own_tasks():
    """A task on the wrong layer, averaged with the layers, or one that outlives its schedule."""
    tasks = {
        "parity": TaskConfig(weight=0.5),
        "order": TaskConfig(weight=0.2, layer="1/2", schedule="linear", end=0.5),
        "early": TaskConfig(weight=0.3, layer=1, schedule="cutoff", end=0.25),
        "never": TaskConfig(weight=0.0),
    }
    terms = build_terms(aux(layers=OFF, targets=OFF, tasks=tasks, reduction="mean"), 4)
    assert [(term.name, term.layer, term.offset, term.positions, term.task) for term in terms] == [
        ("layer4/offset1/all", 4, 1, "all", None),
        ("layer1/task/early", 1, 0, "all", "early"),
        ("layer2/task/order", 2, 0, "all", "order"),
        ("layer4/task/parity", 4, 0, "all", "parity"),
    ]
    assert Term.parse(terms[1].name) == (1, None, None, "early")
    assert [term.weight(0.25) for term in terms] == pytest.approx([1.0, 0.0, 0.1, 0.5])
    assert [term.weight.stops_at for term in terms] == [None, 0.25, 0.5, None]


def test_stages_that_leave_no_loss_are_refused():
    """A table of stages that trains nothing for a while, blamed on another option."""
    stages = (Stage(until=0.3, weights=(1.0,)), Stage(until=0.6, weights=(0.0,)), Stage(weights=(1.0,)))
    with pytest.raises(ConfigError, match=r"aux\.targets\.schedule=stages: all losses .* zero from progress 0\.3 on"):
        build_terms(aux(targets={"schedule": "stages", "stages": stages}), 2)


SPAN = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(
    lambda span: dict(zip(("start", "end"), (t / 20 for t in sorted(span)), strict=True))
)
DECAY = st.sampled_from(["constant", "linear", "cosine", "cutoff"])
WEIGHT = st.sampled_from([0.0, 0.3, 1.0, 2.0])


def options(**fields) -> st.SearchStrategy[dict]:
    return st.builds(lambda span, rest: span | rest, SPAN, st.fixed_dictionaries({"enabled": st.booleans()} | fields))


CONFIGS = st.builds(
    aux,
    positions=options(schedule=DECAY),
    layers=options(schedule=DECAY | st.just("staggered"), weight=WEIGHT, every=st.integers(1, 3)),
    targets=options(schedule=DECAY, weight=WEIGHT, num_targets=st.integers(1, 3)),
    reduction=st.sampled_from(["sum", "mean"]),
    main_weight=st.sampled_from([0.3, 1.0]),
)


def decayed(schedule: str, start: float, end: float, progress: float, clock: float = 1.0) -> float:
    """A schedule as the docstrings word it."""
    u = 1.0 if progress >= end else 0.0 if progress <= start else (progress - start) / (end - start)
    return {
        "constant": 1.0,
        "linear": 1 - u,
        "cosine": (1 + math.cos(math.pi * u)) / 2,
        "cutoff": float(progress < end),
        "staggered": float(progress < start + (end - start) * clock),
    }[schedule]


@given(CONFIGS, st.integers(1, 6), st.integers(0, 100).map(lambda k: (2 * k + 1) / 203))  # never at a switch
def test_any_table_follows_the_formula(config, num_layers, progress):
    """Losses whose combination breaks what each does alone; a name given twice; a row of weight zero that runs."""
    P, L, K = config.positions, config.layers, config.targets
    share = decayed(P.schedule, P.start, P.end, progress) if P.enabled else 0.0
    layer_weights = {num_layers: config.main_weight}
    for layer in range(1, num_layers):
        if L.enabled and layer % L.every == 0:
            clock = layer / (2 * num_layers)
            layer_weights[layer] = L.weight * decayed(L.schedule, L.start, L.end, progress, clock)
    divisor = sum(weight > 0 for weight in layer_weights.values()) if config.reduction == "mean" else 1
    offset_weights = {1: 1.0}
    for offset in range(2, K.num_targets + 1) if K.enabled else ():
        offset_weights[offset] = K.weight * decayed(K.schedule, K.start, K.end, progress)
    expected = {
        (layer, offset, kind): layer_weight / divisor * offset_weight * position_weight
        for layer, layer_weight in layer_weights.items()
        for offset, offset_weight in offset_weights.items()
        for kind, position_weight in (("all", share), ("last", 1 - share))
    }
    terms = build_terms(config, num_layers)
    assert len({term.name for term in terms}) == len(terms)
    assert [Term.parse(term.name) for term in terms] == [(*row, None) for row in rows(terms)]
    assert table(terms, progress) == pytest.approx({row: weight for row, weight in expected.items() if weight})
