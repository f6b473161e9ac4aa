"""Early exit: every symbol is predicted by the first layer that is sure enough.

A layer with a head predicts a symbol if the entropy of its prediction is under a threshold; otherwise the next one
decides (Teerapittayanon et al. 2016, "BranchyNet"). This measures the number of layers used. It saves no time: scoring
reads a text in parallel and computes all layers of every symbol.

Shapes: M symbols of a batch, N symbols, E layers with an exit including the last, Q thresholds.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from charlm.config import Precision, UserError
from charlm.data.corpus import Corpus
from charlm.data.windows import default_stride
from charlm.inference.evaluation import (
    Score,
    bits_per,
    check_options,
    count_units,
    exit_layers,
    score,
)
from charlm.inference.scoring import AUTOCAST_DTYPES, nats_and_entropies, sum_over_processes, visit_predictions
from charlm.model.kernels_cpu import exact_matmul
from charlm.runs.trained import TrainedModel

QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A point of the curve: one threshold for all exits."""

    quantile: float
    """Share of the exits' predictions on the validation text whose entropy is under the threshold."""
    threshold: float | None
    """In bits; None means infinity."""
    mean_layers: float
    """Mean number of the layer that predicts, over all symbols."""
    bits_per_character: float
    bits_per_byte: float
    shares: dict[str, float]
    """Share of the symbols that each layer predicts."""


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """The curve, and the scores of the whole model and of each layer alone on the same text by the same protocol."""

    score: Score
    points: tuple[ExitPoint, ...]
    chosen_on: str
    """Description of the text on which the thresholds were chosen."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the keys of the score, and the curve under `early_exit`."""
        curve = {"chosen_on": self.chosen_on, "points": [asdict(point) for point in self.points]}
        return self.score.as_dict() | {"early_exit": curve}


def early_exit(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    quantiles: Sequence[float] = QUANTILES,
    show_progress: bool = True,
) -> EarlyExit:
    """Bits per character against layers used, for thresholds at quantiles of the entropies on validation text.

    The validation text is the first `train.valid_symbols` symbols of the validation split, which the run was validated
    on. At quantile 0 the last layer predicts everything, at 1 the first exit. Other arguments, errors and processes as
    for `charlm.bits_per_character`; memory does not grow with the text.

    Raises:
        UserError: also if only the last layer has a head, or a quantile is not in [0, 1].
    """
    check_options(trained, corpus, split, limit, batch_size, precision)
    layers = exit_layers(trained)
    if len(layers) < 2:
        raise UserError(
            "early exit: only the last layer has a head for the next symbol; train with --aux.layers.enabled=true, or "
            "export with --keep-heads"
        )
    if any(not 0 <= quantile <= 1 for quantile in quantiles):
        raise UserError(f"quantiles={list(quantiles)}: must lie in [0, 1]")
    started = time.perf_counter()
    stride = default_stride(trained.config.model.context_length) if stride is None else stride
    options = {
        "stride": stride,
        "batch_size": batch_size,
        "autocast_dtype": AUTOCAST_DTYPES[precision],
        "show_progress": show_progress,
        "layers": layers,
        "measure": nats_and_entropies,
    }
    valid_ids = corpus.splits["valid"].ids[: trained.config.train.valid_symbols]
    ids = corpus.splits[split].ids[:limit]
    with exact_matmul(trained.device):
        thresholds_Q = choose_thresholds(_entropies(trained, valid_ids, options), quantiles)
        tally = _Tally(layers, thresholds_Q, len(ids))
        visit_predictions(trained.transformer, trained.heads, ids, tally.add, **options)
        nats_N, nats_E, nats_Q, counts_QE = tally.over_processes(trained.device)
    characters, num_bytes = count_units(ids, corpus.vocabulary)
    points = [
        ExitPoint(
            quantile=quantile,
            threshold=None if math.isinf(threshold) else threshold / math.log(2),
            mean_layers=float(counts_E @ layers) / len(ids),
            bits_per_character=bits_per([nats], characters),
            bits_per_byte=bits_per([nats], num_bytes),
            shares={str(layer): count / len(ids) for layer, count in zip(layers, counts_E.tolist(), strict=True)},
        )
        for quantile, threshold, nats, counts_E in zip(quantiles, thresholds_Q, nats_Q, counts_QE, strict=True)
    ]
    whole = score(
        trained,
        corpus,
        nats_N,
        split=split,
        stride=stride,
        precision=precision,
        seconds=time.perf_counter() - started,
        layers={str(layer): bits_per([nats], characters) for layer, nats in zip(layers, nats_E, strict=True)},
    )
    chosen_on = f"the first {len(valid_ids):,} of {corpus.splits['valid'].symbols:,} symbols of the valid split"
    return EarlyExit(score=whole, points=tuple(points), chosen_on=chosen_on)


def choose_thresholds(entropies_EN: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """The thresholds [Q] at these quantiles of the entropies of all exits except the last, which needs none.

    Quantile 0 gives 0 and 1 gives infinity, so that nothing or everything is under it whatever text is scored.
    """
    thresholds_Q = np.quantile(entropies_EN[:-1], quantiles)
    return np.select([np.equal(quantiles, 0), np.equal(quantiles, 1)], [0.0, math.inf], thresholds_Q)


def first_sure(entropies_EM: np.ndarray, thresholds_Q: np.ndarray) -> np.ndarray:
    """The index of the first exit whose entropy is under each threshold, or that of the last exit, [Q, M]."""
    sure_QEM = entropies_EM < thresholds_Q[:, None, None]
    sure_QEM[:, -1] = True
    return sure_QEM.argmax(axis=1)


class _Tally:
    """Sums over the symbols of a text; each process adds its share."""

    def __init__(self, layers: Sequence[int], thresholds_Q: np.ndarray, num_symbols: int):
        self.layers, self.thresholds_Q = layers, thresholds_Q
        self.last_nats_N = torch.zeros(num_symbols, dtype=torch.float64)
        self.counts_QE = torch.zeros(len(thresholds_Q), len(layers), dtype=torch.int64)
        self.nats = [torch.zeros(len(layers) + len(thresholds_Q), dtype=torch.float64)]
        """For each batch: the nats of each layer alone, followed by those at each threshold, [E + Q]."""

    def add(self, symbols_M: Tensor, measured: dict[int, Tensor]) -> None:
        """Add a batch; see `Visit`."""
        nats_EM, entropies_EM = torch.stack([measured[layer] for layer in self.layers], dim=1)
        self.last_nats_N[symbols_M] = nats_EM[-1]
        chosen_QM = torch.from_numpy(first_sure(entropies_EM.numpy(), self.thresholds_Q))
        self.nats.append(torch.cat([nats_EM, nats_EM.gather(0, chosen_QM)]).sum(-1))
        self.counts_QE += torch.nn.functional.one_hot(chosen_QM, len(self.layers)).sum(1)

    def over_processes(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sums over all processes: nats of the last layer [N], of each layer [E], at each threshold [Q]; symbols that
        each layer predicts [Q, E]."""
        sums = torch.tensor([math.fsum(column) for column in torch.stack(self.nats).T.tolist()], dtype=torch.float64)
        parts = [sum_over_processes(part, device).numpy() for part in (self.last_nats_N, sums, self.counts_QE)]
        return parts[0], parts[1][: len(self.layers)], parts[1][len(self.layers) :], parts[2]


def _entropies(trained: TrainedModel, ids: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The entropy of each exit's prediction of each symbol, [E, N] in nats."""
    entropies_EN = torch.zeros(len(options["layers"]), len(ids), dtype=torch.float64)

    def keep(symbols_M: Tensor, measured: dict[int, Tensor]) -> None:
        entropies_EN[:, symbols_M] = torch.stack([measured[layer][1] for layer in options["layers"]])

    visit_predictions(trained.transformer, trained.heads, ids, keep, **options)
    return sum_over_processes(entropies_EN, trained.device).numpy()
