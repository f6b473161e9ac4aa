"""What all tests share."""

from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # more threads only slow models of this size down
# The same examples every time, and none timed: the tests must not depend on luck or on the machine's load.
hypothesis.settings.register_profile("charlm", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("charlm")


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """`randomise(module, seed)` draws every parameter anew, and returns the module.

    Heads start at zero, biases at zero, norms at the identity and residual branches small: on fresh weights a wrong
    model is hard to tell from a right one.
    """

    def draw(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.normal_(std=0.5, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        return module

    return draw
