"""What `explain` says of a config, against sums worked out here."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from torch import nn

from charlm.config import (
    AuxConfig,
    Config,
    HedgeConfig,
    LayersConfig,
    ModelConfig,
    PositionsConfig,
    TargetsConfig,
    TrainConfig,
)
from charlm.config.load import load_config
from charlm.config.objective import TaskConfig
from charlm.objective.schedules import cutoff
from charlm.objective.tasks import auxiliary_task
from charlm.report.explain import explain, stops_at_step
from tiny import refused, run_script

TINY = {"num_heads": 2, "d_model": 4, "d_ff": 8, "context_length": 4}
NEXT_ONLY = {"targets": TargetsConfig(enabled=False)}
HEADS = {
    "layers": LayersConfig(schedule="rotational", head="shared_frozen", hinge=1.23),
    "reduction": "weighted_mean",
}
ROOT = Path(__file__).parents[2]


def tiny(num_layers: int, steps: int = 1000, **aux) -> Config:
    model = ModelConfig(num_layers=num_layers, **TINY)
    return Config(model=model, aux=AuxConfig(**aux), train=TrainConfig(steps=steps, batch_size=3))


def weights(config: Config) -> dict[tuple[int, int, str], list[float]]:
    """{(layer, offset, positions): weights at progress 0, 0.25, 0.5, 0.75 and 1 from the left}."""
    terms = explain(config).to_dict()["terms"]
    assert all([progress for progress, _ in term["weights"]] == [0, 0.25, 0.5, 0.75, 1] for term in terms)
    return {(t["layer"], t["offset"], t["positions"]): [weight for _, weight in t["weights"]] for t in terms}


def test_parameters_of_t12_and_t64():
    """Fault: a model that is not the paper's: tables shared between layers, heads tied or without bias, an extra
    head kept at inference."""
    D, F, V, T = 512, 2048, 256, 512
    attention = 4 * (D * D + D)  # queries, keys, values, output
    feed_forward = (D * F + F) + (F * D + D)
    norms, table = 2 * 2 * D, T * D
    layer = attention + feed_forward + norms + table
    assert layer == 3_414_528
    head, exit_norm = V * D + V, 2 * D

    def inference(L):
        return V * D + L * layer + 2 * D + head  # embedding, layers, final norm, one head

    def training(L):
        return inference(L) + (2 * L - 1) * head + (L - 1) * exit_norm  # the last layer's exit norm is the final one

    for L, paper in ((12, (44.3, 41.2)), (64, (235.5, 218.8))):
        parameters = explain(Config(model=ModelConfig(num_layers=L))).to_dict()["parameters"]
        assert parameters == {"training": training(L), "inference": inference(L)}
        assert parameters["training"] / 1e6 == pytest.approx(paper[0], abs=0.1)
        assert parameters["inference"] / 1e6 == pytest.approx(paper[1], abs=0.1)


def test_weights_in_json():
    """Fault: weights of another progress, or an end that is not the limit."""
    table = weights(tiny(2, layers=LayersConfig(schedule="linear"), **NEXT_ONLY))
    assert table == {(1, 1, "all"): [1, 0.75, 0.5, 0.25, 0], (2, 1, "all"): [1, 1, 1, 1, 1]}


def test_stops_at_the_step_after_the_last_active_one():
    """Fault: off by one, or a term said to stop that is active at every step of the run."""
    stops = {(t["layer"], t["offset"]): t["stops_at_step"] for t in explain(tiny(4, steps=10)).to_dict()["terms"]}
    # Progress runs 0, 0.1, ... 0.9; layers 1 to 3 stop at 0.125, 0.25 and 0.375.
    assert stops == {(1, 1): 2, (2, 1): 3, (3, 1): 4, (4, 1): None, (1, 2): 2, (2, 2): 3, (3, 2): 4, (4, 2): None}
    assert stops_at_step(cutoff(end=0.95), TrainConfig(steps=10)) is None
    for steps in (1, 3, 7, 10, 49, 100):
        for end in (0.1, 0.3, 1 / 3, 0.49, 0.7, 0.99):
            silent = [step for step in range(steps) if cutoff(end=end)(step / steps) == 0.0]
            assert stops_at_step(cutoff(end=end), TrainConfig(steps=steps)) == (silent[0] if silent else None)
    assert stops_at_step(cutoff(clock=Fraction(1, 128)), TrainConfig(steps=4_000_000)) == 31_250


def test_the_matrix_after_ngram_tables_counts_once():
    """Fault: the tables' rows counted as products, or their matrix left out or counted per layer."""
    plain = explain(tiny(2)).to_dict()
    config = tiny(2).replace(model=tiny(2).model.replace(ngrams=(2, 3), ngram_buckets=5, ngram_width=3))
    found = explain(config).to_dict()
    matrix, tables = 2 * 3 * 4, 2 * 5 * 3
    for name, factor in (("training_start", 6), ("training_end", 6), ("inference", 2)):
        assert found["flops_per_character"][name] - plain["flops_per_character"][name] == factor * matrix
    for name in ("training", "inference"):
        assert found["parameters"][name] - plain["parameters"][name] == matrix + tables


def test_flops_by_hand():
    """Fault: heads counted that do not run, attention forgotten, look-ups counted as products."""
    D, F, V, T = 4, 8, 256, 4
    layer, head = 4 * D * D + 2 * D * F, V * D  # parameters of matrices
    attention = 12 * D * T

    def flops(**aux):
        found = explain(tiny(2, **aux)).to_dict()["flops_per_character"]
        return found["training_start"], found["training_end"]

    both = 6 * 2 * layer + 2 * attention
    assert both == 1920
    assert flops() == (both + 6 * 4 * head, both + 6 * 2 * head)
    # The last of 4 positions alone: a quarter of each head.
    assert flops(positions=PositionsConfig(enabled=False)) == (both + 6 * 4 * head // 4, both + 6 * 2 * head // 4)
    # All positions until the middle of training, the last one from there on.
    assert flops(positions=PositionsConfig(schedule="cutoff", end=0.5)) == (
        both + 6 * 4 * head,
        both + 6 * 2 * head // 4,
    )
    # Falling to zero at the end of training, a row still runs at the last step.
    assert flops(layers=LayersConfig(schedule="linear")) == (both + 6 * 4 * head, both + 6 * 4 * head)
    # Nothing asks for the second layer.
    below = {"layers": LayersConfig(schedule="constant"), "targets": TargetsConfig(enabled=False)}
    assert flops(main_weight=0.0, **below) == (6 * layer + attention + 6 * head,) * 2

    inference = explain(tiny(2)).to_dict()["flops_per_character"]["inference"]
    assert inference == 2 * (2 * layer + head) + 4 * 2 * D * T


def test_parameters_and_flops_of_other_heads():
    """Fault: a shared head counted once per layer, or not at all when it runs; a tower's hidden layer left out, of
    another width, or counted per target."""
    D, F, V, T, W = 4, 8, 256, 4, 3
    layer, head = 4 * D * D + 2 * D * F, V * D
    trunk = 6 * 2 * layer + 2 * 12 * D * T

    def found(**layers):
        config = tiny(2, layers=LayersConfig(schedule="constant", **layers))
        explained = explain(config).to_dict()
        assert explained["head"] == layers["head"]
        flops = explained["flops_per_character"]
        assert flops["training_start"] == flops["training_end"]
        return explained["parameters"]["training"], flops["training_start"]

    without, _ = found(head="linear", at=())
    assert found(head="linear") == (without + 2 * (head + V) + 2 * D, trunk + 6 * 4 * head)  # and a norm
    assert found(head="shared") == (without, trunk + 6 * 4 * head)
    assert found(head="shared_frozen") == (without, trunk + 4 * 2 * head + 6 * 2 * head)
    hidden, classifier = D * W, V * W
    for width in (W, "3/4", 0.75):
        assert found(head="tower", tower_width=width) == (
            without + 2 * D + hidden + W + 2 * (classifier + V),
            trunk + 6 * (2 * head + hidden + 2 * classifier),
        )


def test_heads_that_take_turns_are_counted_by_their_share():
    """Fault: FLOPs of all heads at every step, or weights shown of a step at which a row is off."""
    D, F, V, T = 4, 8, 256, 4
    config = tiny(4, layers=LayersConfig(schedule="rotational", weighting="linear"), **NEXT_ONLY)
    found, head = explain(config), V * D
    trunk = 6 * 4 * (4 * D * D + 2 * D * F) + 4 * 12 * D * T
    assert found.flops_per_character["training_start"] == trunk + 6 * 2 * head  # 1 / 3 of three heads, and the last
    assert weights(config) == {(l, 1, "all"): [l / 4] * 5 for l in (1, 2, 3, 4)}  # noqa: E741
    assert [term["one_of_steps"] for term in found.to_dict()["terms"]] == [3, 3, 3, 1]
    assert "each intermediate head is on at one of 3 steps" in found.to_text()


def test_what_the_rows_do_not_tell():
    """Fault: a hinge, a kind of heads, adaptive weights or a route that shows nowhere, or where it is not on."""
    config = tiny(
        3,
        layers=LayersConfig(schedule="constant", hinge=0.5, head="tower", tower_dropout=0.25),
        hedge=HedgeConfig(enabled=True, beta=0.9),
        route="pairwise",
        **NEXT_ONLY,
    )
    found = explain(config)
    told = dict(line.split(maxsplit=1) for line in found.to_text().splitlines() if line and line[0] != "-")
    assert told["heads"] == "towers of width 4, dropout 0.25"
    assert told["hinge"] == "losses of intermediate layers count above 0.5 nats"
    assert told["hedge"] == "weights times alphas, learned with beta 0.9, smoothing 0.2"
    assert told["route"] == "pairwise, an update per exit layer"
    data = found.to_dict()
    assert [term["hinge"] for term in data["terms"]] == [0.5, 0.5, 0.0]
    assert data["hedge"] == {"enabled": True, "beta": 0.9, "smoothing": 0.2}
    assert (data["route"]["name"], data["route"]["total"]) == ("pairwise", found.route_cost.total)
    assert f"{found.route_cost.total:.2f} of the joint route's" in found.to_text()

    for route, step_sizes, optimizer, told in (
        ("multiway", "auxnet", "adamw", "- weights"),
        ("multiway", "common", "muon", "- weights"),
        ("multiway", "auxnet", "sgd", None),
        ("multiway", "weighted", "muon", None),
        ("joint", "weighted", "adamw", "- step sizes"),
        ("joint", "weighted", "sgd", None),
        ("pairwise", "weighted", "adamw", None),
    ):
        config = tiny(3, route=route, step_sizes=step_sizes)
        lines = explain(config.replace(train=TrainConfig(optimizer=optimizer))).to_text().splitlines()
        assert any(line.startswith("route ") and line.endswith(f", step sizes: {step_sizes}") for line in lines)
        notes = [line[:20].rstrip() for line in lines if line.startswith(("- weights", "- step sizes"))]
        assert notes == [told] * (told is not None), (route, step_sizes, optimizer)

    plain = explain(tiny(3))
    assert {"heads", "hinge", "hedge", "route", "rotation"}.isdisjoint(
        line.split()[0] for line in plain.to_text().splitlines() if line
    )
    assert plain.to_dict()["hedge"] is None
    assert plain.to_dict()["route"]["total"] == 1.0


def test_rows_of_own_tasks(monkeypatch):
    """Fault: a task without a row or without its parameters, or one taken for a prediction of a character."""
    monkeypatch.setattr("charlm.objective.tasks._builders", {})
    auxiliary_task("parity")(lambda config, vocabulary_size: nn.Linear(config.d_model, 1))
    config = tiny(2, tasks={"parity": TaskConfig(weight=0.1, layer=1)}, **NEXT_ONLY)
    without = explain(tiny(2, **NEXT_ONLY))
    found = explain(config)
    assert found.terms[-1].name == "layer1/task/parity" and found.to_dict()["terms"][-1]["task"] == "parity"
    assert found.parameters["training"] == without.parameters["training"] + 4 + 1
    assert found.flops_per_character == without.flops_per_character
    assert found.to_text().splitlines()[-1].split()[:3] == ["layer1/task/parity", "0.1", "never"]
    with refused("aux.tasks"):
        explain(tiny(2, tasks={"order": TaskConfig(weight=0.1)}))


def test_text_draws_each_term_over_training():
    """Fault: a strip scaled or shifted wrongly, or a small weight drawn as if it were zero."""
    header, *lines = explain(tiny(3, layers=LayersConfig(schedule="linear"))).to_text(width=77).splitlines()[-7:]
    start = header.index("0─")
    assert len(header) - start == 32
    drawn = {line.split()[0]: line[start:] for line in lines}
    assert list(drawn) == [f"layer{layer}/offset{offset}/all" for layer in (1, 2, 3) for offset in (1, 2)]
    # Cell i of 32 shows 1 - i/32, in eighths rounded up: four cells of each height.
    assert drawn["layer1/offset1/all"] == "".join(4 * block for block in "█▇▆▅▄▃▂▁")
    assert drawn["layer2/offset2/all"] == "".join(8 * block for block in "▄▃▂▁")
    assert drawn["layer3/offset1/all"] == 32 * "█"


@pytest.mark.parametrize(
    ("rows", "aux"),
    [
        (128, {"reduction": "mean"}),
        (256, {"positions": PositionsConfig(schedule="cosine")}),
        (256, {"positions": PositionsConfig(schedule="cosine"), "reduction": "mean"}),
        *((None, HEADS | {"route": route}) for route in ("relay", "pairwise", "multiway")),
    ],
)
def test_text_fits_80_columns(rows, aux):
    """Fault: long names, small weights, many steps or a route's costs push the drawing out of the terminal."""
    steps = TrainConfig(steps=4_000_000)
    lines = explain(Config(model=ModelConfig(num_layers=64), aux=AuxConfig(**aux), train=steps)).to_text().splitlines()
    assert max(map(len, lines)) <= 80
    if rows:
        assert sum(line.startswith("layer") for line in lines) == rows
        assert "235.5M in training, 218.8M at inference" in lines[1]


def test_the_rows_in_the_document():
    """Fault: a document that shows a method's table as it was before the preset, or what explain prints, changed."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"<!-- rows: (\w+) -->\n```\n(.*?)\n```", text, flags=re.DOTALL))
    presets = {path.stem: path for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert sorted(shown) == sorted(presets)
    for name, path in presets.items():
        assert shown[name] == explain(load_config([ROOT / "configs" / "demo.yaml", path])).to_text(), name


def test_script_prints_one_document_and_draws(tmp_path, capsys):
    """Fault: something else on stdout beside the JSON, a flag that does not reach the table, a picture not written."""
    picture = tmp_path / "weights.png"
    flags = ["--model.num_layers=3", "--model.d_model=8", "--aux.targets.enabled=false", f"--picture={picture}"]
    assert run_script("explain", *flags, "--train.batch_size=3", "--train.steps=77", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(term["layer"], term["offset"]) for term in found["terms"]] == [(1, 1), (2, 1), (3, 1)]
    assert (found["steps"], found["characters_per_step"], found["context_length"]) == (77, 3 * 512, 512)
    assert picture.read_bytes().startswith(b"\x89PNG")
