"""Messages about lack of memory and lost processes, and the search for a micro-batch that fits."""

import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import charlm
from charlm.ablation.variants import Variant, VariantRun
from charlm.config import Config, TrainConfig, UserError
from charlm.objective import tasks
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.runs.folder import Run
from charlm.training.gradients import find_micro_batch_size
from charlm.training.loop import Training
from charlm.training.stop import StopRequests, explained
from storage import CORPUS, content
from tiny import TINY, refused, run_script, small_model, train


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lack_of_memory_names_the_flags_to_change(device):
    """Guards against a traceback when a flag would help, by the error of the CPU's allocator or of the GPU's."""
    train = TrainConfig(micro_batch_size=8)
    with refused("train.micro_batch_size", "^[^\n]*now 8[^\n]*$"), explained(train, StopRequests()):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        torch.empty(2**50)


class Clone(torch.autograd.Function):
    """A function without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


class Raising(Clone):
    @staticmethod
    def backward(ctx, gradient):
        raise LookupError("lost")


class Misshapen(Clone):
    @staticmethod
    def backward(ctx, gradient):
        return gradient[:1]


class WithPeer(Clone):
    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")


BACKWARD = {"missing": Clone, "raising": Raising, "misshapen": Misshapen, "peer": WithPeer}


class OfAUser(torch.nn.Module):
    """A task that fails, by its name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        if name == "init":
            {}[name]

    def forward(self, hidden_BTD, windows_BW):
        if self.name in BACKWARD:
            return BACKWARD[self.name].apply(hidden_BTD)
        return None if self.name == "none" else self.fail(hidden_BTD)

    def fail(self, hidden_BTD):
        if self.name == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(2, 3) @ hidden_BTD


TASKS = {
    "init": ["KeyError('init')", "in __init__: {}[name]"],
    "shape": ["RuntimeError('", ", in forward: return None", ", in fail: return torch.zeros(2, 3) @ hidden_BTD"],
    "none": ["RuntimeError('"],
    "memory": ["out of memory: lower --train.micro_batch_size"],
    "missing": ["NotImplementedError('"],
    "raising": ["LookupError('lost')", 'in backward: raise LookupError("lost")'],
    "misshapen": ["RuntimeError('Function MisshapenBackward returned an invalid gradient"],
    "peer": ["another process has ended or hangs"],
}
OPTIONS = {"memory": "train.micro_batch_size", "peer": None}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_fails_is_named_with_its_own_lines(name, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against hundreds of lines of torch's around the one at fault, also in a backward pass, a lost process that
    is put down to a task, and a folder in the way of the next try."""
    monkeypatch.setattr(tasks, "_builders", {name: lambda *_: OfAUser(name)})
    with pytest.raises(UserError) as caught:
        train(*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", f"--aux.tasks={{{name}: 1}}")
    assert all(part in str(caught.value) for part in TASKS[name])
    assert caught.value.option == OPTIONS.get(name, "aux.tasks")
    assert "site-packages" not in str(caught.value) and not (tmp_path / "run").exists()


COMPILER = InductorError(InvalidCxxCompiler(), None)


@pytest.mark.parametrize(
    ("error", "shown"),
    [(MemoryError(), UserError), (COMPILER, UserError), (ValueError(), ValueError), (SystemExit(), SystemExit)],
    ids=str,
)
def test_a_run_that_fails_before_its_first_step_leaves_nothing(error, shown, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against a folder in the way of the corrected command, and one that is removed with what was trained."""
    flags = [*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.checkpoint_every=1"]
    for first, left in ((0, False), (1, True)):
        forward = failing_from(first / 3, error)
        with pytest.raises(shown) as caught, monkeypatch.context() as patch:
            patch.setattr(Objective, "forward", forward)
            train(*flags)
        assert (tmp_path / "run").exists() == left
        if error is COMPILER:
            assert caught.value.option == "train.compile" and "No working C++ compiler" in str(caught.value)


def failing_from(first: float, error: BaseException):
    forward = Objective.forward

    def failing(self, windows_BW, progress, layers=None):
        if progress >= first:
            raise error
        return forward(self, windows_BW, progress, layers)

    return failing


def test_a_fault_of_the_model_is_not_put_down_to_a_task(tmp_path, text_corpus_flags, monkeypatch):
    """Guards against a search in the user's code for what is wrong elsewhere."""
    monkeypatch.setattr(tasks, "_builders", {"none": lambda *_: OfAUser("none")})
    monkeypatch.setattr(Objective, "forward", failing_from(0.0, LookupError()))
    with pytest.raises(LookupError):
        train(*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--aux.tasks={none: 1}")


@pytest.mark.parametrize("again", [[], ["--run.auto_resume=true"], ["--run.resume=true"]], ids=str)
def test_a_run_killed_before_its_first_step_is_not_in_the_way(again, tmp_path, text_corpus_flags):
    """Guards against a command that cannot be corrected once the system has killed it for its memory."""
    flags = [*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    config = charlm.load_config(overrides=flags)
    run = Run.create(config, charlm.load_corpus(config.data).model_dump())
    VariantRun(Variant("full"), 0, charlm.load_config(overrides=[*flags, "--model.d_ff=48"])).check_unchanged()
    with pytest.raises(UserError, match="has no checkpoint 2"):
        train(*flags, "--run.resume_from=2")
    train(*flags, "--model.d_ff=48", *again)
    assert run.config().model.d_ff == 48
    with pytest.raises(UserError, match="d_ff"):
        train(*flags, "--run.resume=true")


def test_a_run_that_lost_its_folder_leaves_the_next_one_alone(tmp_path, text_corpus_flags, monkeypatch, capfd):
    """Guards against metrics, checkpoints and pictures of two runs in one folder, and an exit code of success."""
    run, log, before = tmp_path / "run", Training.log, {}

    def replace(training: Training) -> None:
        if training.state.step == 2:
            training.writer.wait()  # or it writes into what is being removed
            shutil.rmtree(run)
            Run.create(training.config, CORPUS).append_metrics({"step": 1, "loss": 1.0, "terms": {}})
            before.update(content(run))
        log(training)

    monkeypatch.setattr(Training, "log", replace)
    flags = [*TINY, *text_corpus_flags, f"--run.dir={run}", "--train.log_every=1", "--train.checkpoint_every=1"]
    assert run_script("train", *flags) == 2
    printed = capfd.readouterr().err
    assert printed.count("error:") == 1 and "was removed, moved or replaced" in printed and "Traceback" not in printed
    assert before and content(run) == before


def test_a_lost_process_is_said_in_words_and_other_errors_are_left_alone():
    """Guards against gloo's source lines as the message of a run, and a bug that is reported as a lost process."""
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")
    with pytest.raises(UserError, match="another process"), explained(TrainConfig(), StopRequests()):
        raise lost
    with pytest.raises(RuntimeError, match="shapes cannot"), explained(TrainConfig(), StopRequests()):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_message_about_a_lost_process_survives_the_launchers_signal(capfd):
    """Guards against a SIGTERM that ends the process between the end of training and the message: here it would end
    the tests."""
    with pytest.raises(UserError), StopRequests() as stop, explained(TrainConfig(), stop):
        raise RuntimeError("Connection reset by peer")
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "SIGTERM"
    stop.stays = False
    stop.__exit__()


@pytest.mark.parametrize(("capacity", "found"), [(4, 4), (3, 3), (1, 1), (0, None)])
def test_the_search_finds_what_fits_and_leaves_no_trace(capacity, found, monkeypatch):
    """Guards against a search that changes gradients, weights or random state, and with them the run."""
    objective = build_objective(Config(model=small_model()), 11)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    forward = objective.forward

    def with_little_memory(windows_BW, progress):
        if len(windows_BW) > capacity:
            raise torch.OutOfMemoryError("out of memory")
        return forward(windows_BW, progress)

    monkeypatch.setattr(objective, "forward", with_little_memory)
    torch.manual_seed(0)
    with nullcontext() if found else refused("train.micro_batch_size"):
        assert find_micro_batch_size(objective, Accelerator(cpu=True), upper=4) == found
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_the_search_hides_no_other_error(monkeypatch):
    """Guards against a bug that is reported as lack of memory."""
    objective = build_objective(Config(model=small_model()), 11)
    monkeypatch.setattr(objective, "forward", lambda windows_BW, progress: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_micro_batch_size(objective, Accelerator(cpu=True), upper=4)
