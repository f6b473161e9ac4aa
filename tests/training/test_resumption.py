"""A run that is stopped and resumed must end with the same bytes as one that never stopped."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import charlm
from charlm.config import AuxConfig, Config, LayersConfig, PositionsConfig, RunConfig, TargetsConfig, UserError
from charlm.config.objective import TaskConfig
from charlm.objective.terms import build_terms
from charlm.runs import folder
from charlm.runs.folder import Run
from charlm.runs.tensors import load_tensors
from charlm.training.start import check_agreed, check_resumable, rescaled
from storage import entries, forge, tensors
from tiny import SCRIPTS, TINY, assert_ended_like, checkpoint_bytes, checkpoint_folder, history, refused, train, typed

STEPS = 24
FLAGS = [
    *TINY,
    *typed(f"--model.num_layers=3 --train.steps={STEPS} --train.batch_size=6 --train.warmup=4"),
    *typed("--train.lr_schedule=cosine --train.log_every=1 --train.valid_every=1 --train.keep_checkpoints=100"),
    "--model.ngram_buckets=64",  # every run keeps 24 checkpoints
]
DROPOUT = typed("--model.attention_dropout=0.1 --model.activation_dropout=0.2 --model.residual_dropout=0.1")
CHECKPOINTING = ["--train.activation_checkpointing=true"]
BF16 = ["--train.mixed_precision=bf16"]
MANY = [*DROPOUT, *BF16, "--train.micro_batch_size=4", "--train.clip_norm=1"]
SETTINGS = {
    "fp32": DROPOUT,
    "bf16": [*BF16, *DROPOUT, "--train.micro_batch_size=2", "--model.head_bias=false"],
    "bf16-checkpointed": [*BF16, *DROPOUT, *CHECKPOINTING, "--train.micro_batch_size=4"],
    "sgd": [*DROPOUT, *CHECKPOINTING, "--train.optimizer=sgd", "--train.micro_batch_size=4"],
    "muon": [*BF16, "--train.optimizer=muon", "--train.clip_norm=1"],
    "ngrams": [*MANY, "--model.ngrams=[2,3]", "--train.mixed_precision=no"],
    "growing": typed("--train.context_divisor=2 --train.full_context_from=0.5 --train.micro_batch_size=2"),
    "wsd": typed("--train.lr_schedule=wsd --train.decay_steps=0.4 --train.final_lr=0.1"),
    "epochs": typed("--data.order=epochs --train.context_divisor=4 --train.full_context_from=0.4"),
    "ema": [*MANY, *typed("--train.average=ema --train.average_every=3 --model.ngrams=[2] --aux.hedge.enabled=true")],
    "tail": typed("--train.average=tail --train.average_tail=0.5 --train.average_every=2"),
    "relay": [*MANY, "--aux.route=relay"],
    "pairwise": [*MANY, "--aux.route=pairwise", "--model.ngrams=[2]"],
    "multiway": [*MANY, *CHECKPOINTING, "--aux.route=multiway", "--train.weight_decay=0.1"],
    "multiway-common": typed("--aux.route=multiway --aux.step_sizes=common --train.optimizer=muon --model.ngrams=[2]"),
}
DIFFER_LESS = {"bf16", "bf16-checkpointed", "sgd", "epochs", "relay", "multiway", "multiway-common"}
"""From others, which `make test` runs."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, text_corpus_flags):
    """Flags and folder of a run in fp32 that never stopped."""
    flags = [*FLAGS, *text_corpus_flags, *SETTINGS["fp32"]]
    return flags, train(*flags, f"--run.dir={tmp_path_factory.mktemp('whole') / 'run'}")


@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[pytest.mark.slow] if name in DIFFER_LESS else []) for name in SETTINGS],
)
def test_resuming_at_any_step_ends_in_the_same_bytes(setting, tmp_path, text_corpus_flags):
    """Guards against state missing from checkpoints, or given to another loss: optimizer moments, dropout noise, best
    score, schedule."""
    flags = [*FLAGS, *text_corpus_flags, *SETTINGS[setting]]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    for step in random.Random(setting).sample(range(1, STEPS), 3):
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(whole, resumed)
        train(*flags, f"--run.dir={resumed}", f"--run.resume_from={step}")
        assert_ended_like(resumed, whole)
        assert (resumed / "checkpoints" / "best").read_text() == (whole / "checkpoints" / "best").read_text()


def test_a_killed_process_resumes_to_the_same_bytes(tmp_path, whole_run):
    """Guards against a run that only resumes after a clean exit: SIGKILL leaves no time for anything."""
    flags, whole = whole_run
    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPTS / "train.py"), *flags, f"--run.dir={killed}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "step-00000005").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / f"step-{STEPS:08d}").exists(), "killed too late to prove anything"
    train(*flags, f"--run.dir={killed}", "--run.resume=true")
    assert_ended_like(killed, whole)


@pytest.mark.parametrize("lost", [("step-*", "best", "last"), ("checkpoints",)])
def test_a_run_without_checkpoints_starts_anew(lost, tmp_path, whole_run, capfd):
    """Guards against a folder that can neither be resumed nor be trained into."""
    flags, whole = whole_run
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns(*lost))
    train(*flags, f"--run.dir={stopped}", "--run.resume=true")
    assert "stopped before its first checkpoint" in capfd.readouterr().err
    assert_ended_like(stopped, whole)


def test_another_micro_batch_sees_the_same_characters(tmp_path, text_corpus_flags):
    """Guards against windows or weighting that depend on how the batch is cut up."""
    flags = [*FLAGS, *text_corpus_flags, "--train.mixed_precision=no", "--train.matmul_precision=highest"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    train(*flags, f"--run.dir={resumed}", "--run.resume_from=10", "--train.micro_batch_size=4")
    for before, after in zip(history(whole), history(resumed), strict=True):
        if "loss" in before:
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


CONTINUE = "--run.resume=true"


@pytest.mark.parametrize(
    "how", [CONTINUE, "--run.resume_from=2", "--run.auto_resume=true", f"{CONTINUE} --run.max_time=9h"]
)
def test_the_config_of_a_continued_run_begins_another(how, tmp_path, text_corpus_flags):
    """Guards against a config.yaml that says how its run was once called, and an older one that cannot be read."""
    run = train(*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}")
    train(*TINY, *text_corpus_flags, f"--run.dir={run}", "--train.steps=4", *typed(how))
    assert Run.open(run).config().run == RunConfig(dir=run, report=False)
    another = charlm.train(charlm.load_config(run / "config.yaml", {"run.dir": tmp_path / "another"}))
    assert Run.open(another).config().train.steps == 4
    record = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{record}  resume: true\n  max_time: 9h\n")
    assert Run.open(run).config().run.resume


@pytest.mark.parametrize(
    ("flags", "option", "words"),
    [
        ([CONTINUE, "--aux.targets.weight=0.25"], "aux.targets.weight", "0.5 -> 0.25"),
        ([CONTINUE, "--aux.route=pairwise"], "aux.route", "joint -> pairwise"),
        ([CONTINUE, "--train.optimizer=sgd"], "train.optimizer", "adamw -> sgd"),
        ([CONTINUE, "--train.average=ema"], "train.average", "no -> ema"),
        ([CONTINUE, "--train.seed=1"], "train.seed", "0 -> 1"),
        ([CONTINUE, "--data.test_fraction=0.2"], "data.test_fraction", "0.05 -> 0.2"),
        ([CONTINUE, "--train.steps=5"], "train.steps", "at step 24"),
        # The folder is looked at before the corpus is.
        (["--data.path=nowhere"], "run.dir", "--run.resume=true"),
        (["--run.dir={folder}"], "run.dir", "not empty"),
    ],
)
def test_what_cannot_be_begun_or_continued_is_refused(flags, option, words, whole_run, tmp_path):
    """Guards against a run that silently continues as another experiment, starts over, trains past its end, or is lost
    to a repeated or mistyped command."""
    whole_flags, whole = whole_run
    (tmp_path / "file").touch()
    before = {path: path.stat().st_mtime_ns for path in (*whole.rglob("*"), *tmp_path.rglob("*"))}
    flags = [flag.format(folder=tmp_path) for flag in flags]
    with refused(option, words):
        train(*whole_flags, f"--run.dir={whole}", *flags)
    assert before == {path: path.stat().st_mtime_ns for path in (*whole.rglob("*"), *tmp_path.rglob("*"))}


def test_changed_length_is_recorded_and_said(whole_run, tmp_path, capfd):
    """Guards against a config.yaml that is out of date, and schedules that stretch without a line about it."""
    flags, whole = whole_run
    longer = tmp_path / "longer"
    shutil.copytree(whole, longer)
    train(*flags, f"--run.dir={longer}", "--run.resume=true", f"--train.steps={STEPS + 4}")
    assert Run.open(longer).config().train.steps == STEPS + 4
    assert json.loads((longer / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS + 4
    said = capfd.readouterr().err
    assert f"train.steps changed: progress at this step was 1.000 and is now {STEPS / (STEPS + 4):.3f}\n" in said
    assert "finished before" not in said


def forge_state(run: Path, step: int, **changes) -> None:
    forge(checkpoint_folder(run, step), entries("state.json", **changes))


def state_of(run: Path, step: int = STEPS) -> dict:
    return json.loads((checkpoint_folder(run, step) / "state.json").read_text())


@pytest.fixture
def stopped(whole_run, tmp_path) -> tuple[list[str], Path]:
    """A copy of a run, with its newest checkpoint at step 10, and the flags that resume it."""
    flags, whole = whole_run
    run = shutil.copytree(whole, tmp_path / "stopped")
    for step in range(11, STEPS + 1):
        shutil.rmtree(checkpoint_folder(run, step))
    return [*flags, f"--run.dir={run}", "--run.resume=true"], run


def test_a_run_goes_on_past_a_damaged_checkpoint(stopped, whole_run, capfd):
    """Guards against a run that a damaged checkpoint ends, or that trains to another result; and against deleting the
    damaged files, which someone may still need."""
    flags, run = stopped
    rotten = checkpoint_folder(run, 10) / "model.safetensors"
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.write_bytes(content)
    train(*flags)
    said = capfd.readouterr().err
    assert f"checkpoint of step 10 skipped: {rotten} is damaged" in said
    assert "resumed at step 9" in said
    assert (run / "checkpoints" / ".step-00000010.damaged" / rotten.name).read_bytes() == content
    assert_ended_like(run, whole_run[1])


RESTARTED = {
    "by the launcher": ({"TORCHELASTIC_RESTART_COUNT": "1"}, False, STEPS),
    "by the launcher, before it had begun": ({"TORCHELASTIC_RESTART_COUNT": "1"}, True, 5),
    "by the queue": ({"SLURM_RESTART_COUNT": "2"}, True, STEPS),
    "by nobody": ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "0"}, False, 5),
}


@pytest.mark.parametrize("case", RESTARTED)
def test_a_restart_goes_back_to_a_chosen_step_only_once(case, whole_run, tmp_path, monkeypatch, capfd):
    """Guards against restarts that each go back to run.resume_from and discard the steps made since."""
    flags, whole = whole_run
    environment, old, step = RESTARTED[case]
    run = shutil.copytree(whole, tmp_path / "run")
    if old:
        os.utime(run / "config.yaml", (0, 0))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    train(*flags, f"--run.dir={run}", "--run.resume_from=5")
    said = capfd.readouterr().err
    assert f"resumed at step {step}\n" in said
    assert ("run.resume_from=5: ignored after a restart" in said) is (step == STEPS)
    assert Run.open(run).config().run.resume_from is None
    assert checkpoint_bytes(run, STEPS) == checkpoint_bytes(whole, STEPS)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_disk_at_the_beginning_is_said(resumed, stopped, tmp_path, monkeypatch):
    """Guards against a traceback when the first files of a run or of a resumption cannot be written."""
    flags, run = stopped
    if not resumed:
        flags = [flag for flag in flags if not flag.startswith("--run.resume")] + [f"--run.dir={tmp_path / 'new'}"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.raises(UserError, match=r"run.dir=.*: cannot be .* \(No space left on device\); fix that"):
        train(*flags)
    assert checkpoint_folder(run, 10).is_dir()


def test_processes_that_found_different_checkpoints_do_not_go_on(tmp_path, monkeypatch):
    """Guards against averaging the gradients of two steps, after one machine could not read the newest checkpoint."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "gather", lambda _, mine: torch.cat([mine, torch.tensor([20])]))
    check_agreed(Run(tmp_path), 20, accelerator)
    for step, named in ((10, "10 to 20"), (30, "20 to 30"), (0, "0 to 20")):
        with pytest.raises(UserError, match=f"different steps, {named}; make sure that all machines"):
            check_agreed(Run(tmp_path), step, accelerator)


@pytest.mark.parametrize(("name", "before"), [("precision", "bf16"), ("threads", 99), ("threads", None)])
def test_changes_of_the_machine_are_said(name, before, stopped, capfd):
    """Guards against silence about another precision or number of threads, which change the bits; and against a line
    about values that the checkpoint does not record."""
    flags, run = stopped
    forge_state(run, 10, **{name: before})
    train(*flags, f"--train.steps={STEPS}")
    now = {"precision": "no", "threads": torch.get_num_threads()}[name]
    said = f"{name}: {before} -> {now}; results may differ in rounding from here\n" in capfd.readouterr().err
    assert said is (before is not None)
    assert state_of(run)[name] == now


@pytest.mark.parametrize(("symbols", "asked_before"), [(50, False), (50, True), (100, False)])
def test_a_score_of_other_symbols_is_not_compared(symbols, asked_before, stopped, capfd):
    """Guards against a best checkpoint that no later one can beat, because it was scored on an easier part; also if an
    earlier resumption with the new value was killed before its first checkpoint; and against dropping a best score that
    is comparable."""
    flags, run = stopped
    forge_state(run, 10, best_bits=0.001)
    if asked_before:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("valid_symbols: 100\n", "valid_symbols: 50\n"))
    train(*flags, f"--train.valid_symbols={symbols}")
    changed = "train.valid_symbols was 100: scores cannot be compared" in capfd.readouterr().err
    assert changed == (state_of(run)["best_step"] > 10) == (symbols == 50)
    assert state_of(run)["valid_symbols"] == symbols


def test_a_state_from_before_the_first_validation_is_json(tmp_path, text_corpus_flags):
    """Guards against `Infinity`, which other readers of JSON refuse."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=1000000", "--train.checkpoint_every=1"]
    run = train(*flags, f"--run.dir={tmp_path / 'run'}")
    state = json.loads((checkpoint_folder(run, 10) / "state.json").read_text(), parse_constant=pytest.fail)
    assert state["best_bits"] is None
    assert state_of(run)["best_step"] == STEPS


def test_a_validation_is_recorded_once(stopped, whole_run):
    """Guards against two rows of a validation whose process was killed between its row and its checkpoint."""
    flags, run = stopped
    forge_state(run, 10, validated_step=9)
    train(*flags)
    assert history(run) == history(whole_run[1])


def test_optimizer_state_that_lacks_a_tensor_is_refused(stopped):
    """Guards against a KeyError in the first update, or a moment that silently starts at zero."""
    flags, run = stopped
    lacking = tensors("optimizer.safetensors", transformer__embedding__weight__exp_avg_sq=None)
    forge(checkpoint_folder(run, 10), lacking)
    with pytest.raises(UserError, match=r"tensor transformer\.embedding\.weight\.exp_avg_sq is missing"):
        train(*flags)


def test_state_that_lazy_adam_left_for_ngram_tables_is_begun_anew(tmp_path, text_corpus_flags, capfd):
    """Guards against runs of earlier versions that cannot go on, or do so without a word of what changed."""
    flags = [*FLAGS, *text_corpus_flags, "--model.ngrams=[2]", f"--run.dir={tmp_path / 'run'}"]
    run = train(*flags)
    table = "transformer.ngram_embedding.tables.0.weight"
    one = torch.ones(64, 64)
    adam = {f"{table}.exp_avg": one, f"{table}.exp_avg_sq": one.clone(), f"{table}.step": torch.tensor(10)}
    forge(checkpoint_folder(run, 10), tensors("optimizer.safetensors", **adam, **{f"{table}.mean_square": None}))
    capfd.readouterr()
    train(*flags, "--run.resume_from=10")
    assert "n-gram tables: another optimizer" in capfd.readouterr().err
    train(*flags, "--run.resume_from=20")
    assert "n-gram tables: another optimizer" not in capfd.readouterr().err
    state = load_tensors(checkpoint_folder(run, STEPS) / "optimizer.safetensors")[0]
    assert [name for name in state if table in name] == [f"{table}.mean_square"]
    assert state[f"{table}.mean_square"].shape == (64, 1)


def test_another_number_of_steps_wakes_and_silences_rows():
    """Guards against rows that start or stop without a line about it. The heads of layers 1, 2 and 3 of 4 stop at
    progress 1/8, 2/8 and 3/8; step 30 of 100 is at 0.3, of 200 at 0.15, of 60 at 0.5."""
    aux = AuxConfig(positions=PositionsConfig(enabled=False), targets=TargetsConfig(enabled=False))
    terms = build_terms(aux, 4)
    assert list(rescaled(terms, 30 / 100, 30 / 110))[1:] == []
    assert list(rescaled(terms, 30 / 100, 30 / 200))[1:] == ["terms switched on: layer2/offset1/last"]
    assert list(rescaled(terms, 30 / 100, 30 / 60))[1:] == ["terms switched off: layer3/offset1/last"]
    assert list(rescaled(terms, 30 / 60, 30 / 1000)) == [
        "train.steps changed: progress at this step was 0.500 and is now 0.030",
        "terms switched on: layer1/offset1/last, layer2/offset1/last, layer3/offset1/last",
    ]


def test_mappings_of_another_length_are_compared():
    """Guards against a KeyError, or no refusal, when a task was added or removed."""
    plain = Config()
    tasked = plain.replace(aux=plain.aux.replace(tasks={"order": TaskConfig(weight=0.1)}))
    for old, new in ((plain, tasked), (tasked, plain)):
        with pytest.raises(UserError, match=r"aux\.tasks\.order\.weight: .*0\.1"):
            check_resumable(old, new)
    assert check_resumable(tasked, tasked) == []


def test_turns_of_a_rotation_do_not_wake_at_another_number_of_steps():
    """Guards against a line about every head of a rotation, because another head has its turn at that step."""
    aux = AuxConfig(layers=LayersConfig(schedule="rotational"), targets=TargetsConfig(enabled=False))
    assert list(rescaled(build_terms(aux, 6, 100), 10 / 50, 10 / 100))[1:] == []
    fading = AuxConfig(layers=LayersConfig(schedule="cutoff", end=0.15), targets=TargetsConfig(enabled=False))
    assert list(rescaled(build_terms(fading, 2, 100), 10 / 50, 10 / 100))[1:] == [
        "terms switched on: layer1/offset1/all"
    ]
