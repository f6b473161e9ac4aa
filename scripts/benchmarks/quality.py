"""Time to quality: charlm's recipe and the peers train for the same minutes, one after the other.

Every model is scored on the same validation text by the same protocol: windows of T symbols move by T / 2, and each
scores its last T / 2 predictions. charlm's time includes its validations and checkpoints; a peer's clock stands still
while it is scored.

Shapes: B windows of a batch, W = T + 1 characters of a window.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import Loss, autocast, build_peer
from benchmarks.race import Worker, WorkerError
from benchmarks.report import machine
from benchmarks.setups import TUNED, Setup, Trial, installed_peers
from benchmarks.shapes import DIMENSIONS, VOCABULARY, Shape
from benchmarks.timing import Timer
from charlm.config import Config, UserError
from charlm.config.load import load_config, to_yaml
from charlm.config.types import seconds_of
from charlm.data.corpus import load_corpus
from charlm.data.windows import default_stride, evaluation_windows, training_windows
from charlm.process import keep_freed_memory
from charlm.report.style import GREY, STYLE, TRAIN, VALID, WIDTH, save
from charlm.text import markdown_table

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of the peers' AdamW; the best at the end counts."""
VALIDATIONS = 10
WARMUP = 0.05
"""Share of the time over which a peer's learning rate rises; then it falls to zero in a line."""
BATCHED = 16
"""Windows that are scored at once."""


@dataclass(frozen=True)
class Curve:
    """A contestant's validation scores over its seconds of training."""

    name: str
    learning_rate: float | None
    characters: int
    """Read in all steps, those that are read twice counted twice."""
    points: list[tuple[float, float]]
    """Seconds, and bits per byte."""

    @property
    def final(self) -> float:
        """Bits per byte at the end."""
        return self.points[-1][1]

    def seconds_to(self, bits: float) -> float | None:
        """The first validation at which the score was reached."""
        return next((seconds for seconds, own in self.points if own <= bits), None)


def run(config: Config, device: str, precision: str, only: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Train all contestants, one after the other; the result for JSON.

    Raises:
        UserError: the config has another vocabulary than bytes, or charlm failed.
    """
    if config.data.vocabulary != "bytes":
        raise UserError(f"data.vocabulary={config.data.vocabulary}: peers read bytes; take a config of bytes")
    peers, missing = installed_peers(only)
    shape = Shape(
        name="quality",
        batch_size=config.train.batch_size,
        **{name: getattr(config.model, name) for name in DIMENSIONS},
    )
    load_corpus(config.data)
    tuned = {"label": TUNED, "precision": precision, "matmul_precision": "medium", "tuned": True}
    setups = [(Setup(library="charlm", label="its recipe", precision=precision), None)]
    setups += [(Setup(library=peer, **tuned), rate) for peer in peers for rate in RATES]
    minutes = seconds_of(config.train.time) / 60
    say(f"{len(setups)} contestants of {minutes:g} minutes, about {len(setups) * minutes * 1.15:.0f} minutes in all")
    curves = []
    with tempfile.TemporaryDirectory(prefix="charlm-benchmark-") as folder:
        text = Path(folder) / "config.yaml"
        text.write_text(
            to_yaml(config.replace(run=dict(config.run) | {"dir": Path(folder) / "run"}), exclude_defaults=True)
        )
        for setup, rate in setups:
            trial = Trial(
                task="quality",
                setup=setup,
                shape=shape,
                text=text,
                device=device,
                warmup=0,
                steps=1,
                learning_rate=rate,
            )
            if curve := measured(trial, say):
                curves.append(curve)
                say(f"{curve.name}{f' at {rate:g}' if rate else ''}: {curve.final:.3f} bits per byte")
    return {
        "benchmark": "quality",
        "machine": machine(device),
        "minutes": minutes,
        "shape": asdict(shape),
        "symbols": config.train.valid_symbols,
        "left_out": missing,
        "curves": [asdict(curve) for curve in curves],
    }


def measured(trial: Trial, say: Callable[[str], None]) -> Curve | None:
    """One contestant's curve; None if a peer fails. Raises UserError if charlm does."""
    worker = Worker(trial)
    try:
        reply = worker.receive()
    except WorkerError as error:
        if trial.setup.library == "charlm":
            raise UserError(f"{trial.setup.name} failed: {error}") from error
        say(f"{trial.setup.name} failed and is left out: {error}")
        return None
    finally:
        worker.close()
    points = [tuple(point) for point in reply["points"]]
    return Curve(trial.setup.library, trial.learning_rate, reply["characters"], points)


def train_charlm(trial: Trial, timer: Timer) -> None:
    """A run of the config; its curve is that of its own validations."""
    from charlm.runs.folder import Run
    from charlm.training.loop import train

    keep_freed_memory()
    run = Run(train(load_config([trial.text])))
    corpus = load_corpus(run.config().data, show_progress=False).splits["valid"]
    per_byte = corpus.characters / corpus.bytes
    rows = [row for row in run.metrics() if "valid" in row]
    timer.ready(
        points=[(row["seconds"], row["valid"]["bits_per_character"] * per_byte) for row in rows],
        characters=run.config().train.steps * trial.shape.characters,
    )


def train_peer(trial: Trial, timer: Timer) -> None:
    """A plain loop with AdamW, scored at equal intervals while its clock stands still."""
    config = load_config([trial.text])
    torch.set_float32_matmul_precision(trial.setup.matmul_precision)
    splits = load_corpus(config.data, show_progress=False).splits
    valid = splits["valid"].ids[: config.train.valid_symbols]
    model, loss_of = build_peer(trial.setup, trial.shape)
    model.to(trial.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    total, spent, step, points = seconds_of(config.train.time), 0.0, 0, []
    began = time.perf_counter()
    while spent < total:
        progress = spent / total
        for group in optimizer.param_groups:
            group["lr"] = trial.learning_rate * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        windows = training_windows(
            [splits["train"].ids],
            seed=trial.seed,
            step=step,
            batch_size=trial.shape.batch_size,
            window_length=trial.shape.context_length + 1,
        )
        with autocast(trial):
            loss = loss_of(torch.from_numpy(windows).to(trial.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent = time.perf_counter() - began
        if spent >= total * (len(points) + 1) / VALIDATIONS:
            points.append((spent, bits_per_byte(model, loss_of, valid, trial)))
            began = time.perf_counter() - spent
    timer.ready(points=points, characters=step * trial.shape.characters)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, loss_of: Loss, ids: np.ndarray, trial: Trial) -> float:
    """The score of a text of bytes.

    The loss over the last predictions of a window is that over all of them less that over the first: the model is
    causal.
    """
    T = trial.shape.context_length
    windows = evaluation_windows(len(ids), T, default_stride(T))
    total = math.log(VOCABULARY)  # the first symbol has no context
    model.eval()
    for skipped in np.unique(windows.first_scored).tolist():
        starts = windows.starts[windows.first_scored == skipped]
        for part in np.array_split(starts, math.ceil(len(starts) / BATCHED)):
            texts = ids[part[:, None] + np.arange(windows.length + 1)].astype(np.int64)
            windows_BW = torch.from_numpy(texts).to(trial.device)
            with autocast(trial):
                total += len(part) * windows.length * loss_of(windows_BW).item()
                if skipped:
                    total -= len(part) * skipped * loss_of(windows_BW[:, : skipped + 1]).item()
    model.train()
    return total / len(ids) / math.log(2)


def best_of(curves: Sequence[Curve]) -> list[Curve]:
    """charlm, then each peer at its best learning rate, the best peer first."""
    own, *others = curves
    best: dict[str, Curve] = {}
    for curve in sorted(others, key=lambda curve: curve.final):
        best.setdefault(curve.name, curve)
    return [own, *best.values()]


def to_markdown(found: dict[str, Any], marks: Sequence[float]) -> str:
    """The table: scores at the end, and the seconds to each mark and to the best peer's score."""
    curves = best_of([Curve(**curve) for curve in found["curves"]])
    best_peer = min((curve.final for curve in curves[1:]), default=curves[0].final)
    marks = sorted({*marks, best_peer}, reverse=True)
    header = ["", "AdamW at", "characters", "bits per byte at the end", *(f"seconds to {mark:.4g}" for mark in marks)]
    rows = [
        [
            curve.name,
            f"{curve.learning_rate:g}" if curve.learning_rate else "",
            f"{curve.characters / 1e6:.2f}M",
            f"{curve.final:.3f}",
            *(f"{seconds:.0f}" if (seconds := curve.seconds_to(mark)) else "" for mark in marks),
        ]
        for curve in curves
    ]
    shape = Shape(**found["shape"])
    return (
        f"**Bits per byte after {found['minutes']:g} minutes of training** ({shape.in_words()})\n\n"
        f"{markdown_table(header, rows)}\n\nThe first {found['symbols']:,} symbols of the validation split at stride "
        f"{default_stride(shape.context_length)}; of each peer the best of {len(RATES)} learning rates; "
        f"one seed; {found['machine']}."
    )


def draw(found: dict[str, Any], path: Path) -> Path:
    """The curves of `best_of`, and the picture's path. Raises UserError for a suffix that matplotlib does not write."""
    import matplotlib
    from matplotlib.figure import Figure

    curves = best_of([Curve(**curve) for curve in found["curves"]])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = dict(zip([curve.name for curve in curves], [VALID, TRAIN, *[GREY] * len(curves)], strict=False))
        for curve in curves:
            axes.plot(*zip(*curve.points, strict=True), color=colours[curve.name], marker="o", markersize=3)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("bits per byte, validation")
        axes.set_xlim(0, 1.4 * curves[0].points[-1][0])
        step, below = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 16, -math.inf  # a line of text
        for curve in sorted(curves, key=lambda curve: curve.final):
            seconds, below = curve.points[-1][0], max(curve.final, below + step)
            axes.annotate(f"  {curve.name} {curve.final:.2f}", (seconds, below), va="center", color=colours[curve.name])
        axes.grid(axis="y")
    return save(figure, path)
