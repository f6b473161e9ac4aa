"""Symbols read by a model behind those that its cache holds.

Shapes: B texts, T symbols given at once, D d_model, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import exact_matmul
from charlm.runs.load import TrainedModel


def read(
    trained: TrainedModel, ids: Sequence[Sequence[int]], cache: KVCache, *, layer: int, num_last: int | None = None
) -> Tensor:
    """The hidden states of `layer` at the last `num_last` of `ids`, by default at all: [B, T, D].

    `ids` are equally many for each text, and follow what the cache holds of it.
    """
    ids_BT = torch.tensor(ids, device=trained.device)
    with exact_matmul(trained.device, ids_BT.numel()):
        return trained.transformer(ids_BT, [layer], cache, num_last)[layer]


def read_last(trained: TrainedModel, ids: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """The last layer's hidden states after `ids`, [B, 1, D]; see `read`."""
    return read(trained, ids, cache, layer=trained.config.model.num_layers, num_last=1)


def logits_after(trained: TrainedModel, hidden_B1D: Tensor) -> Tensor:
    """The logits of the next symbol from what `read_last` gives: [B, V] on the CPU."""
    return trained.heads(hidden_B1D, trained.config.model.num_layers)[:, 0, 0].cpu()


@torch.inference_mode()
def next_logits(trained: TrainedModel, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
    """Logits after `ids`, which follow what the cache holds of each text: [B, V] on the CPU."""
    if len({len(own) for own in ids}) > 1:  # all but the last of each apart, then the last of all together
        for row, own in enumerate(ids):
            if len(own) > 1:
                read_last(trained, [own[:-1]], cache.row(row))
        ids = [own[-1:] for own in ids]
    return logits_after(trained, read_last(trained, ids, cache))
