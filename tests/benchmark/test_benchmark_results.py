"""Figures of a benchmark, by hand arithmetic on made-up seconds."""

import json

import pytest
from benchmarks.race import TrialResult
from benchmarks.report import document, point_dict, scaling_table, to_markdown
from benchmarks.results import RaceResult
from benchmarks.setups import AS_IT_COMES, TUNED, Setup, charlm
from benchmarks.shapes import named_shape
from benchmarks.suites import BenchmarkResult, Point, Settings

from tiny import table_cells

SHAPE = named_shape("S", gpu=False)
SETTINGS = Settings(benchmark="train", shape=SHAPE, device="cpu", precision="bf16", rounds=3, steps=2)


def entry(setup: Setup, seconds: list[float], *, flop: float = 100.0, memory: int = 2**20) -> TrialResult:
    facts = {"characters_per_step": 30, "flop_per_step": flop, "parameters": 1_000_000, "threads": 2}
    return TrialResult(setup, facts, steps=2, seconds=seconds, peak_memory=memory)


def peer(library: str, setup: str, seconds: list[float]) -> TrialResult:
    precision = "fp32" if setup == AS_IT_COMES else "bf16"
    return entry(Setup(library=library, label=setup, precision=precision), seconds)


def product(precision: str, matmul: str, seconds: list[float]) -> TrialResult:
    setup = Setup(library="matrix product", label=matmul, precision=precision, matmul_precision=matmul)
    return TrialResult(setup, {"flop_per_step": 1000.0}, steps=1, seconds=seconds)


@pytest.fixture
def result() -> RaceResult:
    return RaceResult(
        "Training",
        [
            entry(charlm("bf16"), [1.0, 2.0, 4.0]),
            entry(charlm("bf16", "main loss alone"), [0.9, 1.8, 3.6]),
            peer("slow", AS_IT_COMES, [4.0, 8.0, 16.0]),
            peer("slow", TUNED, [3.0, 4.0, 10.0]),
            peer("quick", AS_IT_COMES, [3.0, 6.0, 12.0]),
            peer("quick", TUNED, [2.0, 3.0, 8.0]),
        ],
        [
            product("fp32", "highest", [10.0, 20.0, 40.0]),
            product("fp32", "medium", [5.0, 10.0, 40.0]),
            product("bf16", "highest", [2.5, 5.0, 10.0]),
        ],
    )


def test_ratios_are_taken_within_a_round(result: RaceResult) -> None:
    """Guards against a ratio of medians, which a machine that slows down by four in between would bend."""
    assert result.own.rates() == [60.0, 30.0, 15.0]  # of 2 steps of 30 characters
    headline = result.headline()
    # Rounds: 2 / 1, 3 / 2, 8 / 4; the ratio of the medians would be 1.5.
    assert headline["ratio_to_fastest_tuned_peer"] == pytest.approx(2.0)
    assert headline["fastest_tuned_peer"] == "quick, tuned"
    assert headline["ratio_to_fastest_peer_as_it_comes"] == pytest.approx(3.0)
    assert headline["fastest_peer_as_it_comes"] == "quick, as it comes"


def test_utilisation_by_hand(result: RaceResult) -> None:
    """Guards against the matrix rate of another round or precision, and of the slower fp32 path on a CPU."""
    # 2 steps of 100 FLOP in 1, 2, 4 s; the product makes 1000 in 2.5, 5, 10 s: 200 / 400 in every round.
    assert result.headline()["model_flops_utilisation"] == pytest.approx(0.5)
    # In fp32 the faster product of each round is the limit: 50 of 200, 25 of 100 and 12.5 of 25.
    slow = result.utilisation(result.trials[2])
    assert [slow["lower_quartile"], slow["median"], slow["upper_quartile"]] == pytest.approx([0.25, 0.25, 0.375])
    # On a GPU the faster one is TF32, which a peer as it comes does not switch on.
    on_gpu = RaceResult("Training", result.trials, result.products, "cuda")
    assert on_gpu.product_rates(result.trials[2]) == [100.0, 50.0, 25.0]


def test_document_of_a_race(result: RaceResult) -> None:
    """Guards against a lost key of the published document, and values that JSON cannot hold."""
    found = json.loads(json.dumps(document(SETTINGS, BenchmarkResult(races=[result], missing=["x is not installed"]))))
    assert found.items() >= result.headline().items()
    assert found["protocol"]["shape"]["d_model"] == 256
    assert found["protocol"]["left_out"] == ["x is not installed"]
    race = found["races"][0]
    assert race["contestants"][0]["characters_per_second"]["median"] == 30.0
    assert race["pairwise_ratios"]["slow, as it comes"]["quick, as it comes"]["median"] == pytest.approx(0.75)
    assert race["matrix_product_flop_per_second"]["bf16, highest"]["median"] == 200.0


def test_table_of_a_race(result: RaceResult) -> None:
    """Guards against a ratio in the wrong row, and charlm's own lines lost among the peers."""
    rows = table_cells(to_markdown(SETTINGS, BenchmarkResult(races=[result])))[2:]
    assert [row[0] for row in rows] == ["charlm", "charlm", "quick", "slow", "quick", "slow"]
    assert rows[0][4:7] == ["30", "22 to 45", "50%"]
    assert [row[-1] for row in rows] == ["", "0.90", "2.00", "2.50", "3.00", "4.00"]


def test_other_lineups(result: RaceResult) -> None:
    """Guards against measuring compiled peers against charlm's slower line, and a crash where no peer is installed."""
    compiled = entry(charlm("bf16", "all losses, compiled"), [0.5, 1.0, 2.0])
    both = RaceResult("Training", [*result.trials, compiled], result.products)
    assert both.headline()["ratio_to_fastest_tuned_peer"] == pytest.approx(4.0)
    alone = RaceResult("Training", result.trials[:2], result.products)
    assert alone.headline()["ratio_to_fastest_tuned_peer"] is None
    assert "charlm" in alone.to_markdown()


def test_points_by_hand() -> None:
    """Guards against ratios upside down: with auxiliary losses on, a step takes longer and more memory."""
    on = entry(charlm("bf16"), [1.1, 2.4, 4.4], flop=106.8, memory=105)
    off = entry(charlm("bf16", "main loss alone"), [1.0, 2.0, 4.0], memory=100)
    checkpointed = entry(charlm("bf16", "all losses, checkpointed"), [3.0, 3.6, 4.0], memory=50)
    setups = {found.setup.label: found for found in (on, off, checkpointed)}
    utilisations = {"all losses": 0.6, "main loss alone": 0.5, "all losses, checkpointed": 0.3}
    found = point_dict(Point("depth", 12, SHAPE, setups, utilisations))
    assert found["auxiliary_step_time_ratio"]["median"] == pytest.approx(1.1)
    assert found["auxiliary_arithmetic_ratio"] == pytest.approx(1.068)
    assert found["auxiliary_peak_memory_ratio"] == pytest.approx(1.05)
    assert found["checkpointed_step_time_ratio"] == pytest.approx(2.0)
    assert found["checkpointed_peak_memory_bytes"] == 50
    assert found["seconds_per_character"] == pytest.approx(2.4 / 60)
    assert found["model_flops_utilisation"] == 0.6


def test_growth_by_hand() -> None:
    """Guards against a machine that is slower at the second place being taken for growth: there twice the FLOP take six
    times as long, but the share of the matrix rate falls from 0.6 to 0.4 only."""
    places = []
    for depth, seconds, flop, utilisation in ((6, [1.0, 1.0], 100, 0.6), (12, [6.0, 6.0], 200, 0.4)):
        lineup = [charlm("bf16"), charlm("bf16", "main loss alone"), charlm("bf16", "all losses, checkpointed")]
        setups = {setup.label: entry(setup, seconds, flop=flop) for setup in lineup}
        places.append(Point("depth", depth, SHAPE, setups, dict.fromkeys(setups, utilisation)))
    rows = table_cells(scaling_table(places))
    column = rows[0].index("beyond arithmetic")
    assert [row[column] for row in rows[2:]] == ["1.00", "1.50"]
