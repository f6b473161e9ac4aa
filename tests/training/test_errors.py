"""Messages about lack of memory and lost processes, and the search for a micro-batch that fits."""

import signal
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from charlm.config import Config, TrainConfig, UserError
from charlm.objective.build import build_objective
from charlm.training.gradients import find_micro_batch_size
from charlm.training.stop import StopRequests, explained
from tiny import refused, small_model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lack_of_memory_names_the_flags_to_change(device):
    """Guards against a traceback when a flag would help, by the error of the CPU's allocator or of the GPU's."""
    train = TrainConfig(micro_batch_size=8)
    with refused("train.micro_batch_size", "^[^\n]*now 8[^\n]*$"), explained(train, StopRequests()):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        torch.empty(2**50)


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


@pytest.mark.parametrize(("capacity", "found"), [(16, 16), (3, 3), (1, 1), (0, None)])
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
        assert find_micro_batch_size(objective, Accelerator(cpu=True), upper=16) == found
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
