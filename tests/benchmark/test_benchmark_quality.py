"""Peers are scored by charlm's protocol, and the table and the picture show each at its best."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import quality
from benchmarks.peers import build_peer
from benchmarks.quality import Curve, best_of
from benchmarks.setups import TUNED, Setup, Trial
from benchmarks.shapes import Shape

from charlm.config import UserError
from charlm.config.load import load_config
from charlm.data.windows import default_stride, evaluation_windows
from tiny import table_cells

SHAPE = Shape(name="toy", num_layers=2, d_model=16, num_heads=2, d_ff=32, context_length=16, batch_size=2)
SETUP = Setup(library="torch TransformerEncoder", label=TUNED, precision="fp32", tuned=True)
CURVES = [
    Curve("charlm", None, 1_000, [(1.0, 3.0), (2.0, 2.0)]),
    Curve("a", 1e-3, 1_000, [(1.0, 4.0), (2.0, 3.0)]),
    Curve("a", 3e-3, 1_000, [(1.0, 4.0), (2.0, 2.5)]),
    Curve("b", 1e-3, 1_000, [(1.0, 4.0), (2.0, 2.2)]),
]
FOUND = {"minutes": 4, "shape": vars(SHAPE), "symbols": 50, "machine": "a machine", "curves": list(map(vars, CURVES))}


@pytest.mark.parametrize("length", [10, 17, 33, 60, 64])
def test_a_peers_score_is_that_of_its_single_predictions(length):
    """Guards against predictions that are scored twice, left out, or in another window."""
    torch.manual_seed(0)
    model, loss_of = build_peer(SETUP, SHAPE)
    model.eval()
    ids = np.random.default_rng(0).integers(0, 256, length).astype(np.uint8)
    trial = Trial(task="quality", setup=SETUP, shape=SHAPE, text=Path(), device="cpu", warmup=0, steps=1)
    windows = evaluation_windows(length, 16, default_stride(16))
    nats = math.log(256)
    for start, first in zip(windows.starts, windows.first_scored, strict=True):
        window = torch.from_numpy(ids[start : start + windows.length + 1].astype(np.int64))
        with torch.no_grad():
            costs = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
        nats += costs[first:].sum().item()
    found = quality.bits_per_byte(model, loss_of, ids, trial)
    assert found == pytest.approx(nats / length / math.log(2), rel=1e-5)


def test_each_peer_counts_at_its_best_rate():
    """Guards against a peer that is shown at a worse learning rate than it has."""
    assert [(curve.name, curve.learning_rate) for curve in best_of(CURVES)] == [
        ("charlm", None),
        ("b", 1e-3),
        ("a", 3e-3),
    ]
    rows = table_cells(quality.to_markdown(FOUND, ()))
    assert [row[3] for row in rows[2:]] == ["2.000", "2.200", "2.500"]
    assert [row[4] for row in rows[2:]] == ["2", "2", ""]


def test_the_table_has_the_seconds_to_each_mark():
    """Guards against a mark that is reached too soon, late, or by a contestant that never did."""
    rows = table_cells(quality.to_markdown(FOUND, (3.0, 2.0, 1.5)))
    assert [name.split()[-1] for name in rows[0][4:]] == ["3", "2.2", "2", "1.5"]  # 2.2: the best peer's end
    assert [row[4:] for row in rows[2:]] == [["1", "2", "2", ""], ["2", "2", "", ""], ["2", "", "", ""]]


def test_the_curves_are_drawn(tmp_path):
    """Guards against a picture that cannot be drawn of a single contestant or of several."""
    for number, curves in enumerate((FOUND["curves"], FOUND["curves"][:1])):
        path = quality.draw(FOUND | {"curves": curves}, tmp_path / f"{number}.png")
        assert path.stat().st_size > 1_000


def test_only_bytes_are_compared():
    """Guards against peers that read the ids of another vocabulary as bytes."""
    config = load_config((), {"data.corpus": "text8", "data.vocabulary": "characters", "train.time": "1m"})
    with pytest.raises(UserError, match="vocabulary"):
        quality.run(config, "cpu", "fp32", (), print)


@pytest.mark.slow
def test_charlm_and_a_peer_train_for_the_same_time(tmp_path):
    """Guards against a contestant that ends early, late, or without a curve."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"the cat sat on the mat. " * 2_000)
    model = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 32, "context_length": 16}
    data = {"corpus": "file", "path": text, "cache_dir": tmp_path / "cache"}
    train = {"time": "4s", "batch_size": 4, "valid_every": 0.5, "valid_symbols": 500}
    config = load_config((), {"data": data, "model": model, "train": train, "run": {"report": False}})
    said = []
    found = quality.run(config, "cpu", "fp32", ("torch TransformerEncoder",), said.append)
    curves = [Curve(**curve) for curve in found["curves"]]
    assert [curve.name for curve in curves] == ["charlm"] + 3 * ["torch TransformerEncoder"]
    assert all(curve.points and curve.final < 9 for curve in curves), said  # of few steps, if the machine is busy
    assert all(curve.points[-1][0] >= 4 for curve in curves[1:])
