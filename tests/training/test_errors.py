"""Messages about lack of memory and lost processes, and the search for a micro-batch that fits."""

import pytest
import torch
from accelerate import Accelerator

from charlm.config import AuxConfig, Config, ModelConfig, TrainConfig, UserError
from charlm.objective.build import build_objective
from charlm.training.errors import explained
from charlm.training.gradients import find_micro_batch_size


def test_lack_of_memory_names_the_flags_to_change():
    """Guards against a traceback when a flag would help. The CPU allocator raises the error."""
    with pytest.raises(UserError) as caught, explained(TrainConfig(micro_batch_size=8)):
        torch.empty(2**50)
    message = str(caught.value)
    assert "--train.micro_batch_size, now 8" in message and "--train.activation_checkpointing=true" in message
    assert "\n" not in message


def test_a_flag_that_is_set_already_is_not_named():
    """Guards against advice that has been followed already."""
    train = TrainConfig(micro_batch_size=1, activation_checkpointing=True)
    with pytest.raises(UserError, match="smaller model") as caught, explained(train):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert "micro_batch_size" not in str(caught.value)


def test_a_lost_process_is_said_in_words_and_other_errors_are_left_alone():
    """Guards against gloo's source lines as the message of a run, and a bug that is reported as a lost process."""
    with pytest.raises(UserError, match="another process of this run has ended"), explained(TrainConfig()):
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained(TrainConfig()):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize(("capacity", "found"), [(16, 16), (3, 3), (1, 1), (0, None)])
def test_the_search_finds_what_fits_and_leaves_no_trace(capacity, found, monkeypatch):
    """Guards against a search that changes gradients, weights or random state, and with them the run."""
    config = Config(
        model=ModelConfig(num_layers=2, num_heads=2, d_model=16, d_ff=32, context_length=8), aux=AuxConfig()
    )
    objective = build_objective(config, vocabulary_size=11)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    forward = objective.forward

    def with_little_memory(windows_BW, progress):
        if len(windows_BW) > capacity:
            raise torch.OutOfMemoryError("out of memory")
        return forward(windows_BW, progress)

    monkeypatch.setattr(objective, "forward", with_little_memory)
    torch.manual_seed(0)
    if found:
        assert find_micro_batch_size(objective, Accelerator(cpu=True), upper=16) == found
    else:
        with pytest.raises(UserError) as caught:
            find_micro_batch_size(objective, Accelerator(cpu=True), upper=16)
        assert caught.value.option == "train.micro_batch_size"
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_the_search_hides_no_other_error(monkeypatch):
    """Guards against a bug that is reported as lack of memory."""
    objective = build_objective(Config(model=ModelConfig(num_layers=2, num_heads=2, d_model=16, d_ff=32)), 11)
    monkeypatch.setattr(objective, "forward", lambda windows_BW, progress: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_micro_batch_size(objective, Accelerator(cpu=True), upper=4)
