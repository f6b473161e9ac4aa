"""Layer weights that learn from the layers' losses: Hedge Backpropagation (Sahoo et al. 2018, Online Deep Learning)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Hedge(nn.Module):
    """A weight per layer; together they are 1. After an update with losses loss_i, in nats, of the n layers

        alpha_i <- max(alpha_i * beta^loss_i, smoothing / n), then all divided by their sum

    (Sahoo et al. 2018, section 3.2 and algorithm 1). They start equal and lie in the buffer `weights`, so that
    checkpoints hold them; no device is waited for.
    """

    def __init__(self, layers: Iterable[int], beta: float, smoothing: float):
        """`layers`: their numbers, of which `weights` has one entry each, from the lowest on."""
        super().__init__()
        self.layers = sorted(set(layers))
        self.beta, self.smoothing = beta, smoothing
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(self.layers),), 1.0 / len(self.layers)))

    def weight(self, layer: int) -> Tensor:
        """What the losses of `layer` are multiplied by: a scalar on the device, without a gradient."""
        return self.weights[self.layers.index(layer)].clone()  # a backward pass may come after `adapt`

    @torch.no_grad()
    def adapt(self, losses: Mapping[int, Tensor], skip: Tensor | None = None) -> None:
        """Follow the losses of one update, by layer, unless `skip` (bool, a scalar on the device) holds.

        A layer without a loss, whose rows weigh nothing at present, keeps its weight; the others share what it leaves.
        """
        heard = [index for index, layer in enumerate(self.layers) if layer in losses]
        if not heard:
            return
        before = torch.stack([self.weights[index] for index in heard])
        factors = self.beta ** torch.stack([losses[self.layers[index]].to(before) for index in heard])
        raised = (before * factors).clamp(min=self.smoothing / len(self.layers))
        after = raised / raised.sum() * (1.0 - self.weights.sum() + before.sum())
        if skip is not None:
            after = torch.where(skip, before, after)
        for index, weight in zip(heard, after, strict=True):
            self.weights[index] = weight
