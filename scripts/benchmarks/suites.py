"""The six benchmarks: which races each runs, and what it says before it starts."""

import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.race import Entry, estimate, race
from benchmarks.results import PRODUCT, RaceResult
from benchmarks.setups import (
    CHECKPOINTED,
    MAIN_LOSS,
    Contestant,
    Job,
    Task,
    charlm,
    drafts_lineup,
    evaluation_lineup,
    generation_lineup,
    installed_peers,
    training_lineup,
)
from benchmarks.shapes import Shape, flop_per_character, text_config
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
START_SECONDS, COMPILE_SECONDS, EFFICIENCY = 8.0, 40.0, 0.4
"""Guesses for the estimate: until a process has built its model, more where it compiles, and the share of the matrix
rate that steps reach."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line decides."""

    benchmark: str
    shape: Shape
    device: str
    precision: str
    """fp32 or bf16, of charlm and of tuned peers."""
    rounds: int | None = None
    steps: int | None = None
    threads: int | None = None
    compile: bool = False
    peers: tuple[str, ...] = ()
    """Only these; empty for all."""
    run: Path | None = None
    """drafts: the trained run."""

    @property
    def num_rounds(self) -> int:
        return self.rounds or ROUNDS[self.benchmark]

    @property
    def num_steps(self) -> int:
        return self.steps or STEPS[self.device]


@dataclass(frozen=True)
class Point:
    """A place on an axis of `auxiliary` or `scaling`: the shape, and charlm's set-ups there by name."""

    axis: str
    value: int
    shape: Shape
    setups: dict[str, Entry]
    utilisations: dict[str, float]
    """Shares of the matrix rate by the names of set-ups: what compares across races, each beside its own product."""


@dataclass(frozen=True)
class Outcome:
    """What a benchmark measured: races against peers, or points on axes."""

    races: list[RaceResult] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


Say = Callable[[str], None]
Plan = list[tuple[str, list[Job]]]
"""Titles of races, and who runs in them."""


def run(settings: Settings, say: Say) -> Outcome:
    """Measure.

    Raises:
        UserError: a value that cannot work, or charlm failed.
    """
    check(settings)
    peers, missing = installed_peers(settings.peers) if settings.benchmark in ("train", "generate") else ([], [])
    for line in missing:
        say(line)
    with text_file() as text:
        plan = build_plan(settings, peers, text)
        say(f"this will take about {estimate(expected_seconds(settings, plan, say))}: {in_words(settings, plan)}")
        results = []
        for number, (title, jobs) in enumerate(plan, start=1):
            results.append(run_race(settings, title, jobs, say, f"race {number} of {len(plan)}"))
    if settings.benchmark in ("auxiliary", "scaling"):
        return Outcome(points=points_of(plan, results), missing=missing)
    return Outcome(races=results, missing=missing)


def check(settings: Settings) -> None:
    """Raise UserError for a value that cannot work."""
    if settings.benchmark not in ROUNDS:
        raise UserError(f"benchmark={settings.benchmark}: must be one of {', '.join(ROUNDS)}")
    for name in ("rounds", "steps", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if (settings.benchmark == "drafts") != (settings.run is not None):
        raise UserError(f"run={settings.run}: `drafts` needs a trained run, and the other benchmarks none")
    if settings.benchmark in ("generate", "drafts") and settings.precision != "fp32":
        raise UserError(f"precision={settings.precision}: charlm generates in fp32; use --precision fp32 or auto")


@contextmanager
def text_file() -> Iterator[Path]:
    """The characters that all contestants read: the beginning of the Python standard library, prepared as a corpus."""
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

    def jobs(contestants: Sequence[Contestant], task: Task, shape: Shape = settings.shape, **options) -> list[Job]:
        is_training = task == "train"
        return [
            Job(
                task=task,
                contestant=contestant,
                shape=shape,
                text=text,
                device=settings.device,
                threads=settings.threads,
                warmup=settings.num_steps if is_training and settings.device == "cuda" else 1,
                steps=settings.num_steps if is_training else 1,
                **options,
            )
            for contestant in contestants
        ]

    shape, precision = settings.shape, settings.precision
    if settings.benchmark == "train":
        lineup = training_lineup(precision, settings.compile, peers)
        return [(f"Training, shape {shape.name}: {shape.in_words()}", jobs(lineup, "train"))]
    if settings.benchmark == "evaluate":
        windows = WINDOWS[settings.device]
        return [
            (f"Evaluation at stride {stride}, shape {shape.name}, {precision}", jobs(
                evaluation_lineup(precision), "evaluate", stride=stride, windows=windows
            ))
            for stride in STRIDES
            if stride <= shape.context_length
        ]  # fmt: skip
    if settings.benchmark == "generate":
        lineup, length = generation_lineup(settings.compile, peers), min(128, shape.context_length // 2)
        return [
            (f"Generation, {prompts} prompt{'s' * (prompts > 1)}, shape {shape.name}, fp32", jobs(
                lineup, "generate", prompts=prompts, length=length
            ))
            for prompts in PROMPTS
        ]  # fmt: skip
    if settings.benchmark == "drafts":
        from charlm.runs.load import load

        heads = load(settings.run, device="cpu").heads
        lineup = drafts_lineup(heads.pairs, heads.layers[-1])
        texts = {"run": settings.run, "prompts": DRAFT_PROMPTS, "length": shape.context_length}
        return [
            (f"Drafts, {f'temperature {temperature:g}' if temperature else 'greedy'}", jobs(
                lineup, "drafts", temperature=temperature, **texts
            ))
            for temperature in TEMPERATURES
        ]  # fmt: skip
    pair = [charlm(precision), charlm(precision, MAIN_LOSS)]
    if settings.benchmark == "auxiliary":
        depths = sorted({shape.num_layers, *AUXILIARY_DEPTHS})
        return [(f"depth {depth}", jobs(pair, "train", replace(shape, num_layers=depth))) for depth in depths]
    checkpointed = [charlm(precision, CHECKPOINTED)]  # apart, or 64 layers of P would not fit into 24 GB three times
    return [
        (f"{axis} {value}", jobs(lineup, "train", point))
        for axis, value, point in axis_points(shape, settings.device)
        for lineup in (pair, checkpointed)
    ]


def axis_points(shape: Shape, device: str) -> Iterator[tuple[str, int, Shape]]:
    """Where `scaling` measures. Along the context, a step keeps its number of characters as far as it can."""
    for context in CONTEXTS:
        batch = max(1, shape.characters // context)
        yield "context", context, replace(shape, context_length=context, batch_size=batch)
    for depth in DEPTHS:
        yield "depth", depth, replace(shape, num_layers=depth)
    for batch in BATCHES[device]:
        yield "batch", batch, replace(shape, batch_size=batch)


def product_jobs(settings: Settings, text: Path = Path()) -> list[Job]:
    """The matrix products that bound the contestants: fp32 both ways, and bf16 where it is used."""
    kinds = [("fp32", "highest"), ("fp32", "medium"), *([("bf16", "highest")] if settings.precision == "bf16" else [])]
    return [
        Job(
            task=PRODUCT,
            contestant=Contestant(library=PRODUCT, setup=f"{dtype} {matmul}", precision=dtype, matmul_precision=matmul),
            shape=settings.shape,
            text=text,
            device=settings.device,
            threads=settings.threads,
            warmup=2 if settings.device == "cpu" else 100,
            steps=10 if settings.device == "cpu" else 1000,
        )
        for dtype, matmul in kinds
    ]


def run_race(settings: Settings, title: str, jobs: list[Job], say: Say, progress: str) -> RaceResult:
    """A race and the matrix products between its turns."""
    products = product_jobs(settings) if jobs[0].task == "train" else []
    entries = race([*jobs, *products], settings.num_rounds, say, progress)
    return RaceResult(
        title,
        [entry for entry in entries if entry.contestant.library != PRODUCT],
        [entry for entry in entries if entry.contestant.library == PRODUCT],
        settings.device,
    )


def expected_seconds(settings: Settings, plan: Plan, say: Say) -> float:
    """A guess, from the matrix rate of this machine and the arithmetic of all jobs."""
    products = race(product_jobs(replace(settings, precision="bf16")), 1, say, "estimating")
    rates: dict[str, float] = {}
    for product in products:
        dtype = product.contestant.precision
        rates[dtype] = max(rates.get(dtype, 0.0), *product.rates("flop_per_step"))
    seconds = 0.0
    for _, jobs in plan:
        for job in jobs:
            steps = (job.warmup + job.steps) * (settings.num_rounds + 1)
            seconds += START_SECONDS + COMPILE_SECONDS * job.contestant.compile
            seconds += steps * _step_flop(job) / (EFFICIENCY * rates[job.contestant.precision])
    return seconds


def _step_flop(job: Job) -> float:
    """Of a step; generation runs at a fiftieth of the matrix rate, by which its arithmetic is multiplied."""
    per_character = flop_per_character(job.shape)
    if job.task == "evaluate":
        return per_character / 3 * job.windows * job.shape.context_length
    if job.task == "generate":
        return per_character / 3 * job.length * 50
    if job.task == "drafts":
        return per_character / 3 * job.length * job.prompts * 50
    return per_character * job.shape.characters


def in_words(settings: Settings, plan: Plan) -> str:
    """What a benchmark consists of, for people."""
    contestants = sum(len(jobs) for _, jobs in plan)
    races = f"{len(plan)} races" if len(plan) > 1 else "one race"
    return (
        f"{races}, {contestants} contestants in turn, {settings.num_rounds} rounds of "
        f"{plan[0][1][0].steps} timed steps; {settings.shape.in_words()}; {settings.device}"
    )


def points_of(plan: Plan, results: list[RaceResult]) -> list[Point]:
    """Races of one title are one place."""
    points: dict[str, Point] = {}
    for (title, jobs), result in zip(plan, results, strict=True):
        axis, value = title.split()
        point = points.setdefault(title, Point(axis, int(value), jobs[0].shape, {}, {}))
        for entry in result.entries:
            point.setups[entry.contestant.setup] = entry
            point.utilisations[entry.contestant.setup] = result.utilisation(entry)["median"]
    return list(points.values())
