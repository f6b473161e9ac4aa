"""The table of terms: by hand for small cases, and against a plain formula for any config."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import AuxConfig
from charlm.config.objective import Stage, TaskConfig
from charlm.objective.terms import Term, active, build_terms
from tiny import refused

OFF = {"enabled": False}


def aux(positions=None, layers=None, targets=None, **options) -> AuxConfig:
    return AuxConfig(positions=positions or {}, layers=layers or {}, targets=targets or {}, **options)


def table(terms: tuple[Term, ...], progress: float) -> dict[tuple[int, int, str], float]:
    return {(term.layer, term.offset, term.positions): weight for term, weight in active(terms, progress)}


def rows(terms: tuple[Term, ...]) -> list[tuple[int, int, str]]:
    return [(term.layer, term.offset, term.positions) for term in terms]


def exits(*weights: float) -> dict[tuple[int, int, str], float]:
    """The table in which layers 1, 2, ... have these weights for the next character; a row of zero is left out."""
    return {(layer, 1, "all"): weight for layer, weight in enumerate(weights, start=1) if weight}


def offsets(*weights: float) -> dict[tuple[int, int, str], float]:
    """The table in which a single layer predicts the characters at offsets 1, 2, ..."""
    return {(1, offset, "all"): weight for offset, weight in enumerate(weights, start=1)}


PAPER = {(1, 1, "all"): 1.0, (1, 2, "all"): 0.5, (2, 1, "all"): 1.0, (2, 2, "all"): 0.5}
STAGES = (Stage(until=0.4, weights=(1.0, 0.5, 0.25)), Stage(until=0.8, weights=(1.0, 0.5)), Stage(weights=(1.0,)))
TARGETS_IN_STAGES = {"schedule": "stages", "stages": STAGES, "num_targets": 3}
LAYERS_IN_STAGES = (Stage(until=0.5, weights=(0.1, 0.2)), Stage(weights=(0.4,)))
TABLES = {
    # A default that departs from the paper: two layers, the second target at half weight, layer 1 until 1/4.
    "paper": (aux(), 2, {0.2499: PAPER, 0.25: {row: PAPER[row] for row in PAPER if row[0] == 2}}),
    # An average by the number of layers in place of their weights, or over layers that are off.
    "weighted mean": (
        aux(None, {"schedule": "rotational", "weighting": "linear"}, OFF, reduction="weighted_mean"),
        3,
        {0.0: exits(1 / 4, 0, 3 / 4), 0.1: exits(0, 2 / 5, 3 / 5)},  # 1/3 to 1, then 2/3 to 1
    ),
    "gradual layers": (
        aux(None, {"schedule": "gradual"}, OFF),
        4,
        {0.0: exits(0, 0, 0, 1), 0.125: exits(0, 0, 1, 1), 0.25: exits(0, 1, 1, 1), 0.375: exits(1, 1, 1, 1)},
    ),
    # Weights of a stage given to the wrong layer, one number that is not for all, or the last layer counted in.
    "stages of layers": (
        aux(None, {"schedule": "stages", "stages": LAYERS_IN_STAGES, "weight": 0.5}, OFF),
        3,
        {0.2: exits(0.05, 0.1, 1), 0.7: exits(0.2, 0.2, 1)},
    ),
    "passage of layers": (
        aux(None, {"schedule": "stages", "stages": LAYERS_IN_STAGES, "passage": "linear"}, OFF),
        3,
        {0.25: exits(0.25, 0.3, 1)},
    ),
    # Weights of layers that are switched off, which a preset's table of stages still has.
    "stages of no layers": (
        aux(None, {"schedule": "stages", "stages": LAYERS_IN_STAGES} | OFF, OFF),
        3,
        {0.2: exits(0, 0, 1)},
    ),
    "growing targets": (
        aux(None, OFF, {"schedule": "growing", "num_targets": 4, "weight": 1.0}),
        1,
        {eighth / 8: offsets(*[1] * (eighth // 2 + 1)) for eighth in range(8)},
    ),
    "shrinking targets": (
        aux(None, OFF, {"schedule": "shrinking", "num_targets": 4, "weight": 1.0}),
        1,
        {eighth / 8: offsets(*[1] * (4 - eighth // 2)) for eighth in range(8)},
    ),
    # A stage that begins early, a passage to the wrong stage, or weights halved by `aux.targets.weight`.
    "stages of targets": (
        aux(None, OFF, TARGETS_IN_STAGES),
        1,
        {0.0: offsets(1, 0.5, 0.25), 0.399: offsets(1, 0.5, 0.25), 0.4: offsets(1, 0.5), 0.8: offsets(1)},
    ),
    "passage of targets": (
        aux(None, OFF, TARGETS_IN_STAGES | {"passage": "linear"}),
        1,
        {0.2: offsets(1, 0.5, 0.125), 0.4: offsets(1, 0.5), 0.6: offsets(1, 0.25), 0.8: offsets(1), 0.9: offsets(1)},
    ),
    # Intermediate layers that predict the extra targets all the same, or lose the next character.
    "targets of the last layer": (
        aux(None, {"schedule": "constant"}, {"layers": "last"}),
        3,
        {0.0: exits(1, 1, 1) | {(3, 2, "all"): 0.5}},
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_by_hand(case):
    """Fault: see the comment above each case."""
    config, num_layers, tables = TABLES[case]
    terms = build_terms(config, num_layers, steps=10)
    for progress, expected in tables.items():
        assert table(terms, progress) == pytest.approx(expected)


def test_names_and_ends_of_rows():
    """Rows out of order, a name that changes from run to run, or a row whose end is another row's."""
    terms = build_terms(AuxConfig(), 2)
    names = ["layer1/offset1/all", "layer1/offset2/all", "layer2/offset1/all", "layer2/offset2/all"]
    assert [term.name for term in terms] == names
    assert [Term.parse(name) for name in names] == [(*row, None) for row in rows(terms)]
    assert (Term.parse("layer12"), Term.parse("layer3/offset4")) == ((12, None, None, None), (3, 4, None, None))
    assert Term.parse("layer3/of") is None
    assert [term.weight.stops_at for term in terms] == [0.25, 0.25, None, None]
    staged = build_terms(aux(None, OFF, TARGETS_IN_STAGES), 1)
    assert [term.weight.stops_at for term in staged] == [None, 0.8, 0.4]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (aux(targets={"weight": 0.0}, layers=OFF), [(3, 1, "all")]),
        (aux(layers={"schedule": "linear", "end": 0.0}, targets=OFF), [(3, 1, "all")]),
        (aux(layers={"end": 0.0}, targets=OFF), [(3, 1, "all")]),
        (aux(positions={"schedule": "cutoff", "end": 0.0}, layers=OFF, targets=OFF), [(3, 1, "last")]),
        (aux(main_weight=0.0, layers={"schedule": "constant", "at": (2,)}, targets=OFF), [(2, 1, "all")]),
    ],
)
def test_rows_that_never_weigh_anything_are_not_listed(config, expected):
    """A head with parameters and a line in the table that no step ever trains."""
    assert rows(build_terms(config, 3)) == expected


GAP = (Stage(until=0.3, weights=(1.0,)), Stage(until=0.6, weights=(0.0,)), Stage(weights=(1.0,)))


@pytest.mark.parametrize(
    ("config", "option", "since"),
    [
        (aux(main_weight=0.0, layers={"weight": 0.0}), "aux.main_weight", "0"),
        (aux(main_weight=0.0), "aux.main_weight", "0.25"),
        (aux(main_weight=0.0, layers={"schedule": "linear", "end": 0.9}), "aux.main_weight", "0.9"),
        (aux(targets={"schedule": "stages", "stages": GAP}), "aux.targets.schedule", "0.3"),
    ],
)
def test_a_time_without_any_loss_is_refused(config, option, since):
    """A run that trains for hours on nothing, or crashes when the last loss has faded."""
    with refused(option, f"zero from progress {since} on"):
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
        ({"weighting": "linear", "total": 0.6, "weight": 7.0}, [0.1, 0.2, 0.3]),
        ({"total": 2.0}, [2 / 3, 2 / 3, 2 / 3]),
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
        ((3, 1), 4, [1, 3, 4]),
        (("1/3", "2/3"), 64, [21, 43, 64]),  # 21.33 and 42.67
        ((0.25,), 6, [2, 6]),  # 1.5 is rounded up
        ((0.75,), 6, [5, 6]),  # and 4.5
        ((0.7,), 5, [4, 5]),  # 3.5 in decimals; the float 0.7 * 5 + 0.5 is below 4
        (("15/56", "25/56", "35/56", "45/56"), 6, [2, 3, 4, 5, 6]),  # 1.6, 2.7, 3.75, 4.8
        (("15/56", "25/56", "35/56", "45/56"), 2, [1, 2]),  # they meet
        ((0.01,), 6, [1, 6]),
        (("1/1", 1), 6, [1, 6]),
        ((2, "1/3"), 6, [2, 6]),
    ],
)
def test_which_layers_predict(at, num_layers, expected):
    """A head on the wrong layer, none on the last, or two there; a fraction that is rounded down, or by the float's own
    error; a fraction of 1 read as layer 1; two heads on one layer of a shallow model; `every` that counts, too."""
    assert list(layer_weights(num_layers, at=at, every=2)) == expected


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [[1, 6], [2, 6], [3, 6], [4, 6], [5, 6], [1, 6], [2, 6]]),
        ({"rotation": 2}, [[1, 3, 5, 6], [2, 4, 6], [1, 3, 5, 6]]),
        ({"every": 2, "rotation": 2}, [[2, 6], [4, 6], [2, 6]]),  # by heads: by layers both would be on at once
        ({"rotation": 1}, [[1, 2, 3, 4, 5, 6]] * 3),
        ({"at": ()}, [[6], [6]]),
    ],
)
def test_rotating_layers(options, layers):
    """A head that is never on, more of them at a step than one of R, or a last layer that rotates along."""
    for step, expected in enumerate(layers):
        assert list(layer_weights(6, step / 97, steps=97, schedule="rotational", **options)) == expected


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
    layers=options(
        schedule=DECAY | st.sampled_from(["staggered", "staggered_linear"]), weight=WEIGHT, every=st.integers(1, 3)
    ),
    targets=options(schedule=DECAY, weight=WEIGHT, num_targets=st.integers(1, 3)),
    reduction=st.sampled_from(["sum", "mean"]),
    main_weight=st.sampled_from([0.3, 1.0]),
)


def decayed(schedule: str, start: float, end: float, progress: float, clock: float = 1.0) -> float:
    """A schedule as the docstrings word it."""
    u = 1.0 if progress >= end else 0.0 if progress <= start else (progress - start) / (end - start)
    reached = progress >= start + (end - start) * clock
    return {
        "constant": 1.0,
        "linear": 1 - u,
        "cosine": (1 + math.cos(math.pi * u)) / 2,
        "cutoff": float(progress < end),
        "staggered": float(not reached),
        "staggered_linear": 0.0 if reached else 1 - u / clock,
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
    assert table(terms, progress) == pytest.approx({row: weight for row, weight in expected.items() if weight})
