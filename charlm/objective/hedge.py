"""Hedge Backpropagation: layer weights learned from the layers' losses.

Source: Sahoo et al. 2018, Online Deep Learning, section 3.2, algorithm 1.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Hedge(nn.Module):
    """One weight per layer, equal at first; they sum to 1. Nothing here waits for the device.

    After an update in which the n layers had the losses loss_i, in nats:

        alpha_i <- max(alpha_i * beta^loss_i, smoothing / n), then all divided by their sum
    """

    def __init__(self, layers: Iterable[int], beta: float, smoothing: float):
        super().__init__()
        self.layers = sorted(set(layers))
        self.beta = beta
        self.smoothing = smoothing
        self.weights: Tensor  # a buffer, so that checkpoints hold it
        equal = torch.full((len(self.layers),), 1.0 / len(self.layers))
        self.register_buffer("weights", equal)

    def weight(self, layer: int) -> Tensor:
        """The factor on the losses of `layer`: a scalar without a gradient."""
        # A copy, as a backward pass may come after `adapt`.
        return self.weights[self.layers.index(layer)].clone()

    @torch.no_grad()
    def adapt(self, losses: Mapping[int, Tensor], skip: Tensor | None = None) -> None:
        """Adapt the weights to an update's losses by layer, unless the scalar `skip` is true.

        A layer without a loss keeps its weight; the others share the rest.
        """
        heard = [index for index, layer in enumerate(self.layers) if layer in losses]
        if not heard:
            return
        before = torch.stack([self.weights[index] for index in heard])
        own_losses = torch.stack([losses[self.layers[index]].to(before) for index in heard])
        raised = before * self.beta**own_losses
        raised = raised.clamp(min=self.smoothing / len(self.layers))
        after = raised / raised.sum() * (1.0 - self.weights.sum() + before.sum())
        if skip is not None:
            after = torch.where(skip, before, after)
        for index, weight in zip(heard, after, strict=True):
            self.weights[index] = weight
