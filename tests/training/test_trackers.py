"""Trackers must get the numbers of metrics.jsonl. Needs no network; a tracker that is not installed is skipped, see
requirements-trackers.txt."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

import charlm
from charlm.config import TrackerName
from charlm.runs.folder import Run
from charlm.training import log, loop
from tiny import SCRIPTS, TINY, refused, typed

FLAGS = [
    *TINY,
    *typed("--model.num_layers=3 --train.steps=20 --train.log_every=2 --train.valid_every=5"),
    *typed("--train.keep_checkpoints=9"),
]
Metrics = dict[tuple[int, str], float]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory):
    """Where trackers that don't write into the run's folder write; and no tracker may ask the network."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": f"{home}/clearml",
        "CLEARML__sdk__development__report_use_subprocess": "false",  # at times it waits for that one for ever
        "CLEARML__sdk__development__vcs_repo_detect_async": "false",  # and for git, which its thread starts
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": f"{home}/comet_ml",
        "MLFLOW_TRACKING_URI": (home / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # the only one without a database
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": f"{home}/trackio",
        "WANDB_MODE": "offline",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


INSTALLED = [name for name in get_args(TrackerName) if name in map(str, get_available_trackers())]


def read_tensorboard(run: Path) -> Metrics:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def recorded(run: Path) -> Metrics:
    """The numbers of metrics.jsonl; all that a validation says is named valid/..."""
    numbers = {}
    for row in Run(run).metrics():
        step, terms, valid = row.pop("step"), row.pop("terms", {}), row.pop("valid", {})
        row = {f"valid/{name}": value for name, value in (row | valid).items()} if valid else row
        row |= {f"terms/{term}/{name}": value for term in terms for name, value in terms[term].items()}
        numbers |= {(step, name): value for name, value in row.items() if value is not None}
    return numbers


def train(run: Path, *flags: str) -> Path:
    return charlm.train(charlm.load_config(overrides=[*FLAGS, *flags, f"--run.dir={run}"]))


def train_apart(run: Path, *flags: str) -> Path:
    """In a process of its own, as most trackers leave threads, sockets and a wrapped stdout behind; and outside of any
    git repository, which dvclive would make one of DVC's."""
    command = [sys.executable, SCRIPTS / "train.py", *FLAGS, *flags, f"--run.dir={run}"]
    ended = subprocess.run(command, cwd=run.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "failed and is no longer used" not in ended.stderr
    return run


@pytest.mark.parametrize("names", dict.fromkeys([*get_args(TrackerName), ",".join(INSTALLED)]))
def test_trackers_record_a_run_and_its_resumption(names, tmp_path, text_corpus_flags):
    """Guards against options that a tracker does not take, trackers that disturb each other, and a resumed run that
    cannot go on; tensorboard's record must be metrics.jsonl, without what was rewound."""
    if not set(names.split(",")) <= set(INSTALLED):
        pytest.skip(f"{names} is not installed")
    start = train if names == "tensorboard" else train_apart
    for flags in ([], ["--run.resume_from=10", "--train.log_every=5"]):
        run = start(tmp_path / "run", *text_corpus_flags, f"--run.tracker={names}", *flags)
        if names == "tensorboard":  # which keeps 32 bits
            assert read_tensorboard(run) == pytest.approx(recorded(run), rel=1e-6)


def test_numbers_of_a_row():
    """Guards against values that trackers refuse: None, an empty table, and two values of one name at one step."""
    row = {"step": 5, "bits_per_character": None, "seconds": 2.5, "terms": {"layer1/offset1/all": {"loss": 4.0}}}
    assert log.numbers(row) == {"seconds": 2.5, "terms/layer1/offset1/all/loss": 4.0}
    assert log.numbers({"step": 5, "loss": 0.0, "terms": {}}) == {"loss": 0.0}
    row = {"step": 5, "seconds": 3.5, "valid": {"bits_per_byte": 2.0}}
    assert log.numbers(row) == {"valid/seconds": 3.5, "valid/bits_per_byte": 2.0}
    row = {"step": 5, "progress": 0.25, "diagnostics": {"windows": 16, "gradient_norm": {"layer1": 2.0}}}
    assert log.numbers(row) == {"diagnostics/windows": 16, "diagnostics/gradient_norm/layer1": 2.0}


def test_every_tracker_of_accelerate_has_a_name_here():
    """Guards against a tracker of accelerate that run.tracker does not accept."""
    assert set(get_args(TrackerName)) == set(LOGGER_TYPE_TO_CLASS)


class Fake(GeneralTracker):
    """A tracker that fails at `fails`: "start", the step of a row, or "finish"."""

    requires_logging_directory = False
    fails: Any = None

    def __init__(self, project, **options):
        super().__init__(_blank=True)
        self.calls, self.metrics, self.key = [], {}, options.get("id")
        self.made.append(self)

    def _take(self, call):
        self.calls.append(call)
        if call == self.fails:
            raise OSError(f"no server for {call}")

    def start(self):
        self._take("start")

    def store_init_configuration(self, values):
        self.options = values

    def log(self, values, step):
        self.metrics |= {(step, name): value for name, value in values.items()}
        self._take(step)

    def finish(self):
        self._take("finish")


@pytest.fixture
def fakes(monkeypatch):
    """wandb, which works, and mlflow, which fails at what is put into `fails` of the class returned."""

    class Sound(Fake):
        name, made = "wandb", []

    class Failing(Fake):
        name, made = "mlflow", Sound.made

    monkeypatch.setattr(log, "get_available_trackers", lambda: ["wandb", "mlflow"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Sound)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Failing)
    return Failing


def test_a_tracker_that_does_not_start_is_a_user_error(fakes, tmp_path, text_corpus_flags):
    """Guards against a traceback where a login is missing, and a run's folder that is in the way of the next try; but
    also against losing a run that was to be resumed."""
    fakes.fails, flags = "start", [*text_corpus_flags, "--run.tracker=[wandb, mlflow]"]
    with refused("run.tracker", "mlflow: did not start: no server"):
        train(tmp_path / "run", *flags)
    assert not list(tmp_path.iterdir())
    assert [fake.calls for fake in fakes.made] == [["start", "finish"], ["start"]]

    run = train(tmp_path / "run", *text_corpus_flags)
    with refused("run.tracker"):
        train(run, *flags, "--run.resume_from=10")
    assert train(run, *text_corpus_flags, "--run.resume_from=10") == run


@pytest.mark.parametrize("fails", [8, "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(fails, fakes, tmp_path, text_corpus_flags, capsys):
    """Guards against losing hours of training to a tracker's server, one tracker's failure reaching another, and
    numbers that are dropped, renamed or put at another step."""
    fakes.fails = fails
    run = train(tmp_path / "run", *text_corpus_flags, "--run.tracker=[mlflow, wandb]")
    steps = [row["step"] for row in Run(run).metrics()]
    assert steps == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15, 16, 18, 20, 20]
    failing, sound = (fake.calls for fake in fakes.made)
    assert sound == ["start", *steps, "finish"]
    assert fakes.made[1].metrics == recorded(run)
    options = {"model.num_layers": 3, "train.adam_betas": "[0.9, 0.99]", "train.micro_batch_size": "null"}
    assert options.items() <= fakes.made[0].options.items(), "trackers take scalars"
    assert failing == ["start", 2, 4, 5, 6, 8] if fails == 8 else sound
    assert f"run.tracker=mlflow failed and is no longer used: OSError('no server for {fails}')" in (
        capsys.readouterr().err
    )


def test_trackers_are_finished_when_training_fails(fakes, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against a record that stays open, or is lost, when the run ends by an exception."""
    monkeypatch.setattr(loop, "ScoredText", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", *text_corpus_flags, "--run.tracker=wandb")
    assert [fake.calls for fake in fakes.made] == [["start", 2, 4, "finish"]]


@pytest.mark.parametrize("kind", ["pipe", "endless", "terabyte"])
def test_the_key_of_a_stranger_is_read_with_a_bound(kind, fakes, tmp_path):
    """Guards against a run that waits for a pipe, or reads what fills its memory."""
    config = charlm.load_config(overrides=["--run.tracker=wandb"])
    key = tmp_path / "trackers" / "key"
    key.parent.mkdir()
    if kind == "terabyte":
        key.write_text("key")
        os.truncate(key, 2**40)
        log.start_trackers(config, Run(tmp_path), step=1)
        assert fakes.made[0].key == "key".ljust(64, "\0")
        return
    os.mkfifo(key) if kind == "pipe" else key.symlink_to("/dev/zero")
    with refused("run.tracker", "a pipe or a device is there"):
        log.start_trackers(config, Run(tmp_path), step=1)
