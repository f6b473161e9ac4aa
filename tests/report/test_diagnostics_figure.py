"""The picture of a run's diagnostics: what it shows, taken from the figure's own data."""

import math

import pytest

from charlm.config import Config, ModelConfig, RunConfig, TrainConfig, UserError
from charlm.report.diagnostics import diagnostics_figure, draw_diagnostics, read_diagnostics
from charlm.runs.folder import Run


def config_of(path, num_layers: int) -> Config:
    return Config(
        model=ModelConfig(num_layers=num_layers, d_model=8, context_length=16),
        train=TrainConfig(steps=100),
        run=RunConfig(dir=path),
    )


def record(num_layers: int, shift: float = 0.0, **others) -> dict:
    """Diagnostics of heads on all layers for two offsets, as a training with one output would have them."""
    layers = [f"layer{layer}" for layer in range(1, num_layers + 1)]
    return {
        "symbols": 500,
        "bits_per_character": {
            f"{layer}/offset{offset}": 9 - place + offset + shift
            for place, layer in enumerate(layers)
            for offset in (1, 2)
        },
        "windows": 16,
        "supervision_ratio": {layer: (place + 1) / num_layers for place, layer in enumerate(layers)},
        "gradient_norm": dict.fromkeys(layers, 2.0 + shift),
    } | others


def panels_of(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The points of each line that is drawn, by the panel's title and the line's label."""
    return {
        axes.get_title(loc="left"): {
            line.get_label(): [(x, y) for x, y in zip(*line.get_data(), strict=True) if not math.isnan(y)]
            for line in axes.get_lines()
        }
        for axes in figure.axes
        if axes.get_title(loc="left")
    }


def test_every_figure_is_a_point(tmp_path):
    """Fault: layers or offsets mixed up, points lost where a layer has nothing at some steps, panels of nothing."""
    records = [(50, record(2, gradient_cosine={"layer1": -0.5})), (100, record(2, shift=-1.0))]
    panels = panels_of(diagnostics_figure("little", config_of(tmp_path, 2), records))
    assert panels == {
        "bits per character, next character": {"layer 1": [(50, 10), (100, 9)], "layer 2": [(50, 9), (100, 8)]},
        "bits per character after 100 steps": {"next character": [(1, 9), (2, 8)], "2 ahead": [(1, 10), (2, 9)]},
        "supervision ratio, all outputs": {"layer 1": [(50, 0.5), (100, 0.5)], "layer 2": [(50, 1), (100, 1)]},
        "cosine, auxiliary and main gradient": {"layer 1": [(50, -0.5)], "layer 2": []},
        "gradient norm": {"layer 1": [(50, 2), (100, 1)], "layer 2": [(50, 2), (100, 1)]},
    }


@pytest.mark.parametrize("num_layers", [1, 64])
def test_draws_any_depth(num_layers, tmp_path):
    """Fault: a single layer, or a single diagnosis, that has no range to draw over; no file where it is said to be."""
    run = Run.create(config_of(tmp_path / "run", num_layers), {})
    run.append_metrics({"step": 50, "progress": 0.5, "diagnostics": record(num_layers)})
    assert draw_diagnostics(run.path) == run.path / "diagnostics.png"
    assert (run.path / "diagnostics.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_reads_what_shards_leave(tmp_path):
    """Fault: a run in shards, whose diagnostics are bits per character alone, cannot be drawn."""
    run = Run.create(config_of(tmp_path / "run", 2), {})
    run.append_metrics({"step": 10, "progress": 0.1, "loss": 1.0})
    run.append_metrics({"step": 10, "progress": 0.1, "diagnostics": {"bits_per_character": {"layer2/offset1": 3.0}}})
    assert read_diagnostics(run) == [(10, {"bits_per_character": {"layer2/offset1": 3.0}})]
    assert list(panels_of(diagnostics_figure("run", run.config(), read_diagnostics(run)))) == [
        "bits per character, next character",
        "bits per character after 10 steps",
    ]


def test_a_run_without_diagnostics_is_the_users_to_mend(tmp_path):
    """Fault: a traceback, or an empty picture."""
    run = Run.create(config_of(tmp_path / "run", 2), {})
    run.append_metrics({"step": 10, "progress": 0.1, "loss": 1.0})
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no diagnostics.*diagnose_every"):
        draw_diagnostics(run.path)
    assert not (run.path / "diagnostics.png").exists()
