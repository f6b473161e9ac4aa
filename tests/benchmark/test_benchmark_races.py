"""Trials run at a toy shape, and mistakes on the command line of scripts/benchmark.py are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import inference, setups
from benchmarks.pictures import draw
from benchmarks.race import TrialResult, race
from benchmarks.report import document, to_markdown
from benchmarks.results import RaceResult
from benchmarks.setups import CHECKPOINTED, MAIN_LOSS, TUNED, Setup, Trial, charlm
from benchmarks.shapes import Shape, charlm_config, shape_of
from benchmarks.suites import BenchmarkResult, Settings, build_plan, points_of, product_trials, text_file
from benchmarks.timing import Stop
from tqdm import tqdm

from charlm.config import RunConfig, UserError
from charlm.data.corpus import load_corpus
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import take_snapshot
from tiny import table_cells

TOY = Shape(name="toy", num_layers=2, d_model=16, num_heads=2, d_ff=32, context_length=16, batch_size=2)


@pytest.fixture(scope="module")
def text() -> Iterator[Path]:
    with text_file() as path:
        yield path


def settings(benchmark: str, **options) -> Settings:
    given = {"shape": TOY, "device": "cpu", "precision": "fp32", "rounds": 2, "steps": 2, "threads": 1}
    return Settings(benchmark=benchmark, **(given | options))


class OneStep:
    """Timer of a single step in this process, whose result is kept."""

    result = None

    def start(self) -> None:
        pass

    def ready(self, **facts) -> None:
        self.facts = facts

    def repeat(self, work) -> None:
        self.result = work()
        raise Stop


def one_step(measure, trial: Trial) -> OneStep:
    timer = OneStep()
    with pytest.raises(Stop):
        measure(trial, timer)
    return timer


def trial(task: str, setup: Setup, text: Path, **options) -> Trial:
    shared = {"shape": TOY, "device": "cpu", "warmup": 1, "steps": 1}
    return Trial(task=task, setup=setup, text=text, **(shared | options))


@pytest.mark.slow
def test_train_end_to_end(text: Path, tmp_path: Path) -> None:
    """Guards against a training loop that the benchmark no longer drives, and a failing peer that ends the others."""
    peer = Setup(library="torch TransformerEncoder", label=TUNED, precision="fp32", tuned=True)
    broken = Setup(library="no such library", label=TUNED, precision="fp32", tuned=True)
    runners = [*(charlm("fp32", setup) for setup in ("all losses", MAIN_LOSS, CHECKPOINTED)), peer, broken]
    trials = [trial("train", runner, text, threads=1, steps=2) for runner in runners]
    said: list[str] = []
    results = race([*trials, product_trials(settings("train"))[0]], rounds=2, say=said.append, bar=tqdm(disable=True))
    names = ["all losses", MAIN_LOSS, CHECKPOINTED, TUNED, "fp32 highest"]
    assert [result.setup.label for result in results] == names
    assert len(said) == 1
    assert said[0].startswith("no such library, tuned failed and is left out: KeyError")
    assert all(len(result.seconds) == 2 and result.facts["threads"] == 1 for result in results)
    on, off, _, tuned, _ = (result.facts for result in results)
    assert on["characters_per_step"] == tuned["characters_per_step"] == 2 * 16
    # Three more heads of 256 x 16 and their biases, and a norm for the exit of layer 1.
    assert on["parameters"] - off["parameters"] == 3 * (256 * 16 + 256) + 2 * 16
    result = RaceResult("Training", results[:-1], results[-1:])
    picture = draw(settings("train"), BenchmarkResult(races=[result]), tmp_path / "race.png")
    assert picture.stat().st_size > 10_000
    assert result.headline()["fastest_tuned_peer"] == "torch TransformerEncoder, tuned"


def test_charlm_that_fails_ends_the_race() -> None:
    """Guards against a table without charlm in it, and a message that hides what went wrong."""
    with pytest.raises(UserError, match=r"charlm, all losses failed: .*nowhere"):
        race([trial("train", charlm("fp32"), Path("nowhere"))], rounds=1, say=print, bar=tqdm(disable=True))


@pytest.mark.parametrize("stride", [1, 5])
def test_plain_loop_scores_the_same_characters(stride: int, text: Path) -> None:
    """Guards against a plain loop that does less work than charlm's evaluation, or other work."""
    options = {"stride": stride, "windows": 40}
    plain = Setup(library="plain loop", label=TUNED, precision="fp32")
    loop = one_step(inference.evaluate_plainly, trial("evaluate", plain, text, **options))
    own = one_step(inference.evaluate_charlm, trial("evaluate", charlm("fp32"), text, **options))
    assert own.result.symbols == 1 + 16 + 39 * stride
    first_symbol = 8.0  # bits: charlm scores it too, from nothing
    bits = own.result.bits_per_character * own.result.characters - first_symbol
    assert loop.result / 0.6931471805599453 == pytest.approx(bits, rel=1e-5)
    assert loop.facts == own.facts | {"parameters": loop.facts["parameters"]}


def test_charlm_and_peer_write_as_much(text: Path) -> None:
    """Guards against a peer that stops early or writes less than it is credited with."""
    pytest.importorskip("transformers")
    options = {"prompts": 2, "length": 5}
    own = one_step(inference.generate_charlm, trial("generate", charlm("fp32"), text, **options))
    assert own.facts["characters_per_step"] == 10
    for library in ("transformers GPT-2", "transformers Llama", "x-transformers"):
        if library in setups.installed_peers()[0]:
            peer = Setup(library=library, label=TUNED, precision="fp32", tuned=True)
            written = one_step(inference.generate_peer, trial("generate", peer, text, **options)).result
            assert written.shape[0] == 2
            assert written.shape[1] in (5, 8 + 5)  # with the prompt, or without


def test_drafts_from_run_to_table(text: Path, tmp_path: Path) -> None:
    """Guards against a run whose ways to drafts are not all measured, a table without plain generation's line, and
    contestants that write different amounts."""
    config = charlm_config(TOY, text, mixed_precision="fp32").replace(run=RunConfig(dir=tmp_path / "run"))
    objective = build_objective(config, 256)
    run = Run.create(config, load_corpus(config.data, show_progress=False).model_dump())
    save_checkpoint(run, take_snapshot(objective, [], {"step": 0}), best=True, keep=1)
    shape = shape_of(run.path)
    assert vars(shape) == vars(TOY) | {"name": "run"}
    drafts = settings("drafts", shape=shape, run=run.path, rounds=1)
    plan = build_plan(drafts, [], text)
    assert [title for title, _ in plan] == ["Drafts, greedy", "Drafts, temperature 0.8", "Drafts, temperature 1"]
    title, trials = plan[0]
    facts = [one_step(inference.generate_with_drafts, trial).facts | {"threads": 1} for trial in trials]
    assert {of_one["characters_per_step"] for of_one in facts} == {4 * 16}
    seconds = ([3.0, 8.0], [1.0, 4.0], [3.0, 4.0])
    results = [
        TrialResult(trial.setup, of_one, steps=1, seconds=of_job)
        for trial, of_one, of_job in zip(trials, facts, seconds, strict=True)
    ]
    measured = BenchmarkResult(races=[RaceResult(title, results, [])])
    assert [(row[0], row[3]) for row in table_cells(to_markdown(drafts, measured))[2:]] == [
        ("no drafts", ""), ("drafts from offsets", "2.50"), ("drafts from layer 1", "1.50")
    ]  # fmt: skip
    written = document(drafts, measured)["races"][0]["contestants"]
    assert "acceptance_rate" not in written[0]
    assert written[1]["num_draft_tokens"] == 1
    assert 0 < written[1]["characters_per_pass"] <= 2
    assert draw(drafts, measured, tmp_path / "drafts.svg").exists()


def made_up(setup: str, depth: int) -> TrialResult:
    facts = {"characters_per_step": 32, "flop_per_step": 1000 * depth, "parameters": 10**6, "threads": 1}
    return TrialResult(
        charlm("fp32", setup), facts, steps=2, seconds=[depth * 1.0, depth * 1.1], peak_memory=depth * 2**20
    )


@pytest.mark.parametrize("benchmark", ["auxiliary", "scaling"])
def test_points_from_races(benchmark: str, tmp_path: Path) -> None:
    """Guards against set-ups of one place that end up in different rows, and a table or picture that cannot be made."""
    labels = [["all losses", MAIN_LOSS], [CHECKPOINTED]]
    plan = [(title, trials) for title, trials in build_plan(settings("scaling"), [], Path()) if "depth" in title]
    limit = Setup(library="matrix product", label="highest", precision="fp32")
    product = TrialResult(limit, {"flop_per_step": 10**6}, steps=1, seconds=[1.0, 1.0])
    races = [
        RaceResult(title, [made_up(label, int(title.split()[1])) for label in labels[number % 2]], [product])
        for number, (title, _) in enumerate(plan)
    ]
    points = points_of(plan, races)
    assert [(point.axis, point.value) for point in points] == [("depth", depth) for depth in (6, 12, 24, 64)]
    assert all(list(point.trials) == ["all losses", MAIN_LOSS, CHECKPOINTED] for point in points)
    result = BenchmarkResult(points=points)
    assert len(table_cells(to_markdown(settings(benchmark), result))) == 2 + 4
    assert draw(settings(benchmark), result, tmp_path / "picture.svg").exists()


def test_plans() -> None:
    """Guards against a benchmark that leaves out a place, a peer or a set-up that the page promises."""
    peers = ["x-transformers", "transformers GPT-2", "transformers Llama", "torch TransformerEncoder"]

    def sizes(benchmark: str, **options) -> list[int]:
        return [len(trials) for _, trials in build_plan(settings(benchmark, **options), peers, Path())]

    assert sizes("train") == [2 + 4 * 2]
    assert sizes("train", compile=True) == [3 + 4 * 3]
    assert sizes("generate") == [1 + 3 * 3] * 2
    assert sizes("scaling") == [2, 1] * (5 + 4 + 4)
    assert sizes("evaluate") == [3]
    [(_, training)] = build_plan(settings("train", precision="bf16"), peers, Path())
    assert {trial.setup.precision for trial in training if trial.setup.label == "as it comes"} == {"fp32"}
    assert {trial.setup.precision for trial in training if trial.setup.tuned} == {"bf16"}
    depths = [title for title, _ in build_plan(settings("auxiliary"), [], Path())]
    assert depths == ["depth 2", "depth 12", "depth 24", "depth 64"]
    first = build_plan(settings("scaling"), [], Path())[0][1][0].shape
    assert (first.context_length, first.batch_size) == (128, 1)


def test_a_missing_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a crash where a peer is not installed, and silence about it."""
    found = {"torch": True, "transformers": True, "x_transformers": None}
    monkeypatch.setattr(setups, "find_spec", found.get)
    peers, lines = setups.installed_peers()
    assert peers == ["transformers GPT-2", "transformers Llama", "torch TransformerEncoder"]
    assert len(lines) == 1 and lines[0].startswith("x-transformers is not installed")
    assert setups.installed_peers(["torch TransformerEncoder"]) == (["torch TransformerEncoder"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["race"], "benchmark=race"),
        (["train", "--rounds=0"], "rounds=0"),
        (["train", "--shape=D"], "shape=D"),
        (["train", "--peers=nanoGPT"], "peers=nanoGPT"),
        (["generate", "--precision=bf16"], "precision=bf16"),
        (["drafts"], "run=None"),
        (["drafts", "--run=nowhere"], "nowhere"),
        (["train", "--picture=speed.doc"], "speed.doc"),
        (["pretend", "--picture=speed.png"], "picture=speed.png"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch, script) -> None:
    """Guards against a traceback, and against minutes of measuring before a mistake is found."""
    monkeypatch.chdir(tmp_path)
    code, shown, printed = script("benchmark", *arguments)
    assert (code, shown, len(printed.splitlines()), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert printed.startswith("error: ") and message in printed
