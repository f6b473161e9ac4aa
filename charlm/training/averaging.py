"""Averages of the parameters, for validation and use; training itself goes on without them."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from charlm.config import TrainConfig, steps_of
from charlm.runs.tensors import AVERAGE


class WeightAverage:
    """The mean of each parameter by `train.average`, for checkpoints in the form of an optimizer.

    Inside `with`, the parameters are the means, if there are any yet. All rows of n-gram tables enter,
    too, which costs less than a record of those that have moved.
    """

    def __init__(self, train: TrainConfig, model: nn.Module):
        self.train = train
        parameters = [] if train.average == "no" else list(model.parameters())
        self.param_groups = [{"params": parameters, "state_prefix": AVERAGE}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)  # empty before the first entry

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Let the parameters after `step` steps enter, if it is their turn."""
        decay = decay_of(self.train, step)
        if decay is None:
            return
        parameters = self.param_groups[0]["params"]
        if not self.state:
            self.state |= {parameter: {"mean": parameter.detach().clone()} for parameter in parameters}
        whole = [own for own in parameters if not hasattr(own, "full_tensor")]
        shards = [own for own in parameters if hasattr(own, "full_tensor")]
        for own in filter(None, (whole, shards)):  # torch mixes none
            get_ema_multi_avg_fn(decay)([self.state[parameter]["mean"] for parameter in own], own, None)

    @torch.no_grad()
    def _swap(self, *_: object) -> None:
        for parameter, state in self.state.items():
            raw = parameter.clone()
            parameter.copy_(state["mean"])
            state["mean"].copy_(raw)

    __enter__ = __exit__ = _swap


def decay_of(train: TrainConfig, step: int) -> float | None:
    """The factor of the mean as the parameters after `step` steps enter it; None if they do not."""
    steps, every = train.steps, steps_of(train.average_every, train.steps)
    if train.average == "no" or (step % every and step < steps):
        return None
    if train.average == "ema":
        return min(train.average_decay, (1 + step) / (10 + step)) ** (step % every or every)
    begin = max(0, steps - steps_of(train.average_tail, steps))
    entries = -(-step // every) - begin // every
    return 1 - 1 / entries if step > begin else None
