"""Hedge Backpropagation (Sahoo et al. 2018, Online Deep Learning): layer weights that learn from the layers' losses."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Hedge(nn.Module):
    """One weight per layer; they sum to 1. After an update in which the n layers had the losses loss_i, in nats:

        alpha_i <- max(alpha_i * beta^loss_i, smoothing / n), then all divided by their sum

    (Sahoo et al. 2018, section 3.2 and algorithm 1). The weights start equal. They are the buffer `weights`, so that
    checkpoints hold them. Nothing here waits for the device.
    """

    def __init__(self, layers: Iterable[int], beta: float, smoothing: float):
        """`layers`: the layers' numbers; `weights` has an entry for each, from the lowest on."""
        super().__init__()
        self.layers = sorted(set(layers))
        self.beta, self.smoothing = beta, smoothing
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(self.layers),), 1.0 / len(self.layers)))

    def weight(self, layer: int) -> Tensor:
        """The factor on the losses of `layer`: a scalar on the device, without a gradient."""
        return self.weights[self.layers.index(layer)].clone()  # a backward pass may come after `adapt`

    @torch.no_grad()
    def adapt(self, losses: Mapping[int, Tensor], skip: Tensor | None = None) -> None:
        """Adapt the weights to the losses of one update, by layer, unless `skip` (a bool scalar on the device) is true.

        A layer without a loss, because its rows have weight zero at present, keeps its weight; the others share the
        rest.
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
