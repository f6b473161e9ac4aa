"""The six benchmarks: which races each runs."""

import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.race import TrialResult, race
from benchmarks.results import PRODUCT, RaceResult
from benchmarks.setups import (
    CHECKPOINTED,
    MAIN_LOSS,
    Setup,
    Trial,
    charlm,
    drafts_lineup,
    evaluation_lineup,
    generation_lineup,
    installed_peers,
    training_lineup,
)
from benchmarks.shapes import Shape, text_config
from charlm.config import UserError

SYMBOLS = 2_000_000
CONTEXTS = (128, 256, 512, 1024, 2048)
DEPTHS = (6, 12, 24, 64)
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (4, 16, 64, 256)}
AUXILIARY_DEPTHS = (12, 24, 64)
STRIDES = (1, 64)
PROMPTS = (1, 8)
TEMPERATURES, DRAFT_PROMPTS = (0.0, 0.8, 1.0), 4
ROUNDS = {"train": 7, "evaluate": 5, "generate": 5, "drafts": 5, "auxiliary": 7, "scaling": 3}
STEPS = {"cpu": 3, "cuda": 5}
WINDOWS = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of the command line."""

    benchmark: str
    shape: Shape
    device: str
    precision: str
    """fp32 or bf16, of charlm and of tuned peers."""
    rounds: int
    steps: int
    threads: int | None = None
    compile: bool = False
    peers: tuple[str, ...] = ()
    """Peers to measure; empty for all."""
    run: Path | None = None
    """drafts: the trained run."""


@dataclass(frozen=True)
class Point:
    """One value on an axis of `auxiliary` or `scaling`, with charlm's trials by the labels of its set-ups."""

    axis: str
    value: int
    shape: Shape
    trials: dict[str, TrialResult]
    utilisations: dict[str, float]
    """Share of the matrix rate, by label. It compares across races, since each race has its own matrix products."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The measurements of a benchmark: races against peers, or points on axes."""

    races: list[RaceResult] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """A line for each peer that is not installed."""


Say = Callable[[str], None]
Plan = list[tuple[str, list[Trial]]]
"""The title and the trials of each race."""


def run(settings: Settings, say: Say) -> BenchmarkResult:
    """Run a benchmark.

    Raises:
        UserError: a value cannot work, or charlm failed.
    """
    check(settings)
    peers, missing = installed_peers(settings.peers) if settings.benchmark in ("train", "generate") else ([], [])
    for line in missing:
        say(line)
    with text_file() as text:
        plan = build_plan(settings, peers, text)
        products = product_trials(settings) if plan[0][1][0].task == "train" else []
        say(in_words(settings, plan))
        turns = (settings.rounds + 2) * sum(len(trials) + len(products) for _, trials in plan)
        with tqdm(total=turns, unit="turn", disable=None, leave=False) as bar:
            results = []
            for title, trials in plan:
                measured = race([*trials, *products], settings.rounds, say, bar)
                limits = [result for result in measured if result.setup.library == PRODUCT]
                others = [result for result in measured if result not in limits]
                results.append(RaceResult(title, others, limits, settings.device))
    if settings.benchmark in ("auxiliary", "scaling"):
        return BenchmarkResult(points=points_of(plan, results), missing=missing)
    return BenchmarkResult(races=results, missing=missing)


def check(settings: Settings) -> None:
    """Raise UserError for settings that cannot be combined."""
    if (settings.benchmark == "drafts") != (settings.run is not None):
        raise UserError(f"run={settings.run}: `drafts` needs a trained run, and the other benchmarks none")
    if settings.benchmark in ("generate", "drafts") and settings.precision != "fp32":
        raise UserError(f"precision={settings.precision}: charlm generates in fp32; use --precision fp32 or auto")


@contextmanager
def text_file() -> Iterator[Path]:
    """The text that all trials read: the beginning of the Python standard library, prepared as a corpus."""
    from charlm.data.corpus import load_corpus

    with tempfile.TemporaryDirectory(prefix="charlm-benchmark-") as folder:
        path, size = Path(folder) / "text.txt", 0
        with path.open("wb") as file:
            for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                size += file.write(source.read_bytes())
                if size >= SYMBOLS:
                    break
        load_corpus(text_config(path), show_progress=False)
        yield path


def build_plan(settings: Settings, peers: Sequence[str], text: Path) -> Plan:
    """All races of a benchmark."""

    def trial(setup: Setup, **options: Any) -> Trial:
        is_training = options["task"] == "train"
        shared = {
            "shape": settings.shape,
            "text": text,
            "device": settings.device,
            "threads": settings.threads,
            "warmup": settings.steps if is_training and settings.device == "cuda" else 1,
            "steps": settings.steps if is_training else 1,
        }
        return Trial(setup=setup, **(shared | options))

    return [(title, [trial(setup, **options) for setup in setups]) for title, setups, options in races(settings, peers)]


def races(settings: Settings, peers: Sequence[str]) -> Iterator[tuple[str, list[Setup], dict[str, Any]]]:
    """The title, the contestants and the trials' other options of each race."""
    benchmark, shape, precision = settings.benchmark, settings.shape, settings.precision
    if benchmark == "train":
        contestants = training_lineup(precision, settings.compile, peers)
        yield f"Training, shape {shape.name}: {shape.in_words()}", contestants, {"task": "train"}
    elif benchmark == "evaluate":
        for stride in [stride for stride in STRIDES if stride <= shape.context_length]:
            options = {"task": "evaluate", "stride": stride, "windows": WINDOWS[settings.device]}
            title = f"Evaluation at stride {stride}, shape {shape.name}, {precision}"
            yield title, evaluation_lineup(precision), options
    elif benchmark == "generate":
        contestants = generation_lineup(settings.compile, peers)
        for prompts in PROMPTS:
            options = {"task": "generate", "prompts": prompts, "length": min(128, shape.context_length // 2)}
            yield f"Generation, {prompts} prompt{'s' * (prompts > 1)}, shape {shape.name}, fp32", contestants, options
    elif benchmark == "drafts":
        from charlm.runs.load import load

        heads = load(settings.run, device="cpu").heads
        contestants = drafts_lineup(heads.pairs, heads.layers[-1])
        for temperature in TEMPERATURES:
            options = {"task": "drafts", "run": settings.run, "prompts": DRAFT_PROMPTS, "length": shape.context_length}
            how = f"temperature {temperature:g}" if temperature else "greedy"
            yield f"Drafts, {how}", contestants, options | {"temperature": temperature}
    else:
        pair = [charlm(precision), charlm(precision, MAIN_LOSS)]
        # A race of its own, as 64 layers of P fit into 24 GB only twice.
        checkpointed = [charlm(precision, CHECKPOINTED)]
        for axis, value, point in axis_points(benchmark, shape, settings.device):
            for contestants in [pair] if benchmark == "auxiliary" else [pair, checkpointed]:
                yield f"{axis} {value}", contestants, {"task": "train", "shape": point}


def axis_points(benchmark: str, shape: Shape, device: str) -> Iterator[tuple[str, int, Shape]]:
    """The points of `auxiliary` or `scaling`.

    A longer context has a smaller batch, so that a step keeps its number of characters.
    """
    if benchmark == "auxiliary":
        for depth in sorted({shape.num_layers, *AUXILIARY_DEPTHS}):
            yield "depth", depth, replace(shape, num_layers=depth)
        return
    for context in CONTEXTS:
        batch = max(1, shape.characters // context)
        yield "context", context, replace(shape, context_length=context, batch_size=batch)
    for depth in DEPTHS:
        yield "depth", depth, replace(shape, num_layers=depth)
    for batch in BATCHES[device]:
        yield "batch", batch, replace(shape, batch_size=batch)


def product_trials(settings: Settings) -> list[Trial]:
    """Matrix products whose rate bounds the others: in fp32 both ways, and in bf16 if it is used."""
    kinds = [("fp32", "highest"), ("fp32", "medium"), *([("bf16", "highest")] if settings.precision == "bf16" else [])]
    return [
        Trial(
            task=PRODUCT,
            setup=Setup(library=PRODUCT, label=f"{dtype} {matmul}", precision=dtype, matmul_precision=matmul),
            shape=settings.shape,
            text=Path(),
            device=settings.device,
            threads=settings.threads,
            warmup=2 if settings.device == "cpu" else 10,
            steps=10 if settings.device == "cpu" else 20,
        )
        for dtype, matmul in kinds
    ]


def in_words(settings: Settings, plan: Plan) -> str:
    """The parts of a benchmark, for people."""
    contestants = sum(len(trials) for _, trials in plan)
    races = f"{len(plan)} races" if len(plan) > 1 else "one race"
    return (
        f"{races}, {contestants} contestants in turn, {settings.rounds} rounds of "
        f"{plan[0][1][0].steps} timed steps; {settings.shape.in_words()}; {settings.device}"
    )


def points_of(plan: Plan, results: list[RaceResult]) -> list[Point]:
    """One point for the races of each title."""
    points: dict[str, Point] = {}
    for (title, trials), result in zip(plan, results, strict=True):
        axis, value = title.split()
        point = points.setdefault(title, Point(axis, int(value), trials[0].shape, {}, {}))
        for trial in result.trials:
            point.trials[trial.setup.label] = trial
            point.utilisations[trial.setup.label] = result.utilisation(trial)["median"]
    return list(points.values())
