"""Texts, and predictions by brute force."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from charlm.runs.trained import TrainedModel


@pytest.fixture
def letters() -> Callable[..., np.ndarray]:
    """`letters(length, seed)`: the ids of random letters."""
    return lambda length, seed=0: np.random.default_rng(seed).integers(97, 123, length).astype(np.uint8)


@pytest.fixture
def brute_force() -> Callable[..., np.ndarray]:
    """`brute_force(trained, ids, stride)`: log-probabilities of each symbol by each layer, [L, N, V], one forward pass
    each over its own context, which follows from the protocol alone."""

    @torch.no_grad()
    def predict(trained: TrainedModel, ids: np.ndarray, stride: int) -> np.ndarray:
        layers, V = range(1, trained.config.model.num_layers + 1), trained.vocabulary.size
        context_length = trained.config.model.context_length
        found = [torch.zeros(len(layers), V, dtype=torch.float64)]
        for target in range(1, len(ids)):
            start = 0
            while start + context_length < target:
                start += stride
            start = max(0, min(start, len(ids) - 1 - context_length))
            context = torch.from_numpy(ids[start:target].astype(np.int64))[None]
            hidden = trained.transformer(context, layers=layers)
            found.append(torch.stack([trained.heads(hidden[layer], layer)[0, -1, 0].double() for layer in layers]))
        return torch.stack(found, dim=1).log_softmax(dim=-1).numpy()

    return predict
