"""Trackers must record the numbers of metrics.jsonl. Needs no network; a tracker that is not installed is
skipped, see requirements-trackers.txt."""

import json
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

import charlm
from charlm.config import TrackerName, UserError
from charlm.runs.folder import Run
from charlm.training import log, loop
from tiny import SCRIPTS, TINY, typed

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
        yield home


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def read_aim(run: Path, home: Path) -> Metrics:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        import aim

        repo = aim.Repo(str(run.parent))
        # Those opened for writing read the record itself; the index of the others is made by aim's server.
        options = {"repo": repo, "system_tracking_interval": None, "capture_terminal_logs": False}
        records = [aim.Run(key, **options) for key in repo.list_all_runs()]
    record = max(records, key=lambda record: record.created_at)
    metrics = {
        (step, metric.name): value
        for metric in record.metrics()
        for step, value in zip(metric.data.indices_list(), metric.data.values_list()[0], strict=True)
        if not metric.name.startswith("__")  # the machine's own
    }
    for record in records:
        record.close()
    return metrics


def read_clearml(run: Path, home: Path) -> Metrics:
    with zipfile.ZipFile(newest(home, "clearml/**/offline-*.zip")) as session:
        lines = session.read("metrics.jsonl").decode().splitlines()
    events = [event for line in lines for event in json.loads(line) if not event["metric"].startswith(":monitor")]
    return {(event["iter"], event["metric"]): event["value"] for event in events}


def read_comet_ml(run: Path, home: Path) -> Metrics:
    with zipfile.ZipFile(newest(home, "comet_ml/*.zip")) as experiment:
        messages = [json.loads(line) for line in experiment.read("messages.json").decode().splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    return {
        (metric["step"], metric["metricName"]): metric["metricValue"]
        for metric in metrics
        if not metric["metricName"].startswith(("sys.", "process "))
    }


def read_dvclive(run: Path, home: Path) -> Metrics:
    from dvclive.utils import parse_metrics

    class Live:
        plots_dir, metrics_file = run / "trackers/dvclive/plots", run / "trackers/dvclive/metrics.json"

    history, _ = parse_metrics(Live)
    folder = Live.plots_dir / "metrics"
    return {
        (int(row["step"]), str(Path(file).relative_to(folder).with_suffix(""))): float(row[Path(file).stem])
        for file, rows in history.items()
        for row in rows
    }


def read_mlflow(run: Path, home: Path) -> Metrics:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("charlm")
    record = max(client.search_runs([experiment.experiment_id]), key=lambda record: record.info.start_time)
    history = [point for name in record.data.metrics for point in client.get_metric_history(record.info.run_id, name)]
    return {(point.step, point.key): point.value for point in history}


def read_swanlab(run: Path, home: Path) -> Metrics:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    file, reader, metrics = newest(run, "trackers/swanlab/run-*/*.swanlab"), DataStoreReader(), {}
    reader.open(file)
    for data in reader:
        record = Record.FromString(data)
        if record.HasField("scalar") and not record.scalar.key.startswith("__"):  # the machine's own
            metrics[record.scalar.step, record.scalar.key] = record.scalar.value.number
    reader.close()
    return metrics


def read_tensorboard(run: Path, home: Path) -> Metrics:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def read_trackio(run: Path, home: Path) -> Metrics:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}-{(run / 'trackers' / 'key').read_text()[:8]}"
    return {
        (row["step"], path): value
        for row in SQLiteStorage.get_logs("charlm", name)
        for path, value in row.items()
        if path not in ("step", "timestamp")
    }


def read_wandb(run: Path, home: Path) -> Metrics:
    """LevelDB's log format, after a header of 7 bytes: blocks of 32 KiB, of records in one or several pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pieces = newest(run, "trackers/wandb/offline-run-*/*.wandb").read_bytes(), 7, b""
    metrics = {}
    while position < len(data):
        if (left := -position % 32768) and left < 7:
            position += left
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, pieces = Record.FromString(pieces), b""
            items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            metrics |= {(items["_step"], name): items[name] for name in items if not name.startswith("_")}
    return metrics


READERS = {name.removeprefix("read_"): reader for name, reader in globals().items() if name.startswith("read_")}
INSTALLED = [name for name in READERS if name in map(str, get_available_trackers())]


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


@pytest.mark.parametrize("name", READERS)
def test_a_trackers_record_is_metrics_jsonl(name, home, tmp_path, text_corpus_flags):
    """Guards against numbers that a tracker drops, renames, rounds or puts at another step, and options that break it;
    and against a resumed run that cannot go on or whose record keeps what was rewound."""
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    flags, start = [*text_corpus_flags, f"--run.tracker={name}"], train if name == "tensorboard" else train_apart
    run = start(tmp_path / "run", *flags)
    assert READERS[name](run, home) == pytest.approx(recorded(run), rel=1e-6)  # tensorboard keeps 32 bits

    start(run, *flags, "--run.resume_from=10", "--train.log_every=5")
    metrics = READERS[name](run, home)
    anew = {key: value for key, value in recorded(run).items() if key[0] > 10}
    assert {key: metrics.get(key) for key in anew} == pytest.approx(anew, rel=1e-6)
    if name == "tensorboard":
        assert metrics == pytest.approx(recorded(run), rel=1e-6)


def test_several_trackers_at_once(home, tmp_path, text_corpus_flags):
    """Guards against trackers that disturb each other."""
    if len(INSTALLED) < 2:
        pytest.skip("fewer than two trackers are installed")
    run = train_apart(tmp_path / "run", *text_corpus_flags, f"--run.tracker={','.join(INSTALLED)}")
    for name in INSTALLED:
        assert READERS[name](run, home) == pytest.approx(recorded(run), rel=1e-6), name


def test_numbers_of_a_row():
    """Guards against values that trackers refuse: None, an empty table, and two values of one name at one step."""
    row = {"step": 5, "bits_per_character": None, "seconds": 2.5, "terms": {"layer1/offset1/all": {"loss": 4.0}}}
    assert log.numbers(row) == {"seconds": 2.5, "terms/layer1/offset1/all/loss": 4.0}
    assert log.numbers({"step": 5, "loss": 0.0, "terms": {}}) == {"loss": 0.0}
    row = {"step": 5, "seconds": 3.5, "valid": {"bits_per_byte": 2.0}}
    assert log.numbers(row) == {"valid/seconds": 3.5, "valid/bits_per_byte": 2.0}


def test_every_tracker_of_accelerate_has_a_name_here():
    """Guards against a tracker of accelerate that run.tracker does not accept."""
    assert set(get_args(TrackerName)) == set(LOGGER_TYPE_TO_CLASS)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, text_corpus_flags, monkeypatch):
    """Guards against accelerate silently leaving it out, and against writing anything before the refusal."""
    monkeypatch.setattr(log, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(UserError, match="aim,comet_ml: not installed; pip install 'aim<4' comet-ml") as caught:
        train(tmp_path / "run", "--run.tracker=aim,wandb,comet_ml", "--data.corpus=file", "--data.path=nowhere")
    assert caught.value.option == "run.tracker"
    assert not list(tmp_path.iterdir())


class Fake(GeneralTracker):
    """A tracker that fails at `fails`: "start", the step of a row, or "finish"."""

    requires_logging_directory = False
    fails: Any = None

    def __init__(self, project, **options):
        super().__init__(_blank=True)
        self.calls = []
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
    message = "mlflow: did not start: no server for start"
    with pytest.raises(UserError, match=message) as caught:
        train(tmp_path / "run", *flags)
    assert caught.value.option == "run.tracker"
    assert not list(tmp_path.iterdir())
    assert [fake.calls for fake in fakes.made] == [["start", "finish"], ["start"]]

    run = train(tmp_path / "run", *text_corpus_flags)
    with pytest.raises(UserError, match=message):
        train(run, *flags, "--run.resume_from=10")
    assert train(run, *text_corpus_flags, "--run.resume_from=10") == run


@pytest.mark.parametrize("fails", [8, "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(fails, fakes, tmp_path, text_corpus_flags, capsys):
    """Guards against losing hours of training to a tracker's server, and one tracker's failure reaching another."""
    fakes.fails = fails
    run = train(tmp_path / "run", *text_corpus_flags, "--run.tracker=[mlflow, wandb]")
    steps = [row["step"] for row in Run(run).metrics()]
    assert steps == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15, 16, 18, 20, 20]
    failing, sound = (fake.calls for fake in fakes.made)
    assert sound == ["start", *steps, "finish"]
    options = {"model.num_layers": 3, "train.adam_betas": "[0.9, 0.99]", "train.micro_batch_size": "null"}
    assert options.items() <= fakes.made[0].options.items(), "trackers take scalars"
    assert failing == ["start", 2, 4, 5, 6, 8] if fails == 8 else sound
    assert f"run.tracker=mlflow failed and is no longer used: OSError('no server for {fails}')" in (
        capsys.readouterr().err
    )


def test_trackers_are_finished_when_training_fails(fakes, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against a record that stays open, or is lost, when the run ends by an exception."""
    monkeypatch.setattr(loop, "count_units", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", *text_corpus_flags, "--run.tracker=wandb")
    assert [fake.calls for fake in fakes.made] == [["start", 2, 4, "finish"]]
