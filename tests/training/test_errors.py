"""What ends a run from outside: memory and lost processes, as errors for people and as a search."""

import pytest
import torch
from accelerate import Accelerator

from charlm.config import AuxConfig, Config, ModelConfig, TrainConfig, UserError
from charlm.objective.build import build_objective
from charlm.training.errors import explained, find_micro_batch_size, largest_micro_batch


def test_memory_that_is_used_up_names_the_flags_to_turn():
    """Guards against a traceback where a flag would have helped. The error is the CPU allocator's own."""
    with pytest.raises(UserError) as caught, explained(TrainConfig(micro_batch_size=8)):
        torch.empty(2**50)
    message = str(caught.value)
    assert "--train.micro_batch_size, now 8" in message and "--train.activation_checkpointing=true" in message
    assert "\n" not in message


def test_a_flag_that_is_turned_already_is_not_named():
    """Guards against advice that was followed and did not help."""
    train = TrainConfig(micro_batch_size=1, activation_checkpointing=True)
    with pytest.raises(UserError, match="smaller model") as caught, explained(train):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert "micro_batch_size" not in str(caught.value)


def test_a_lost_process_is_said_in_words_and_other_errors_are_left_alone():
    """Guards against gloo's source lines as the last word of a run, and against a bug that is taken for a lost peer."""
    with pytest.raises(UserError, match="another process of this run has ended"), explained(TrainConfig()):
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained(TrainConfig()):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("upper", [1, 2, 7, 16, 33])
def test_the_largest_micro_batch_is_found(upper):
    """Guards against an off-by-one at either end, and a search that tries as often as there are sizes."""
    for capacity in range(1, upper + 3):
        tried = []

        def try_step(windows, capacity=capacity, tried=tried):
            tried.append(windows)
            if windows > capacity:
                raise torch.OutOfMemoryError("out of memory")

        assert largest_micro_batch(try_step, upper) == min(capacity, upper)
        assert len(tried) == len(set(tried)) <= 2 * upper.bit_length() + 1
        assert max(tried) <= upper


def test_the_search_follows_what_the_processes_agree_on_and_hides_no_other_error():
    """Guards against processes that end with different micro-batches, and a bug that is taken for a full memory."""
    tried = []
    assert largest_micro_batch(tried.append, 16, agree=lambda fits: fits and tried[-1] <= 5) == 5
    with pytest.raises(RuntimeError, match="a bug"):
        largest_micro_batch(lambda windows: (_ for _ in ()).throw(RuntimeError("a bug")), 4)
    with pytest.raises(UserError, match="not one window fits"):
        largest_micro_batch(lambda windows: None, 4, agree=lambda fits: False)


def test_the_search_tries_the_objective_and_leaves_no_trace(monkeypatch):
    """Guards against gradients, weights or random numbers that the search left behind: runs would part from those
    with a size given by hand."""
    config = Config(
        model=ModelConfig(num_layers=2, num_heads=2, d_model=16, d_ff=32, context_length=8), aux=AuxConfig()
    )
    objective = build_objective(config, vocabulary_size=11)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    forward = objective.forward

    def with_little_memory(windows_BW, progress):
        if len(windows_BW) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(windows_BW, progress)

    monkeypatch.setattr(objective, "forward", with_little_memory)
    torch.manual_seed(0)
    assert find_micro_batch_size(objective, Accelerator(cpu=True), upper=16) == 3
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
