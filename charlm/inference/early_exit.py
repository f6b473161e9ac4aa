"""Early exit: every symbol is predicted by the first layer that is sure enough.

A layer with a head predicts if its prediction has less entropy than a threshold; otherwise the next one
decides (Teerapittayanon et al. 2016, "BranchyNet"). Only generation skips the layers above.

Shapes: M symbols of a batch, N symbols, E exits with the last layer, Q thresholds, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.inference.evaluation import EarlyExit, ExitPoint, Score, Scorer, bits_per
from charlm.inference.scoring import measure_text, nats_and_entropies, predictions, sum_over_processes
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel, exit_layers

QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def early_exit(
    trained: TrainedModel, corpus: Corpus, *, quantiles: Sequence[float] = QUANTILES, **protocol: Any
) -> Score:
    """Score the model, each layer that has a head, and early exit at several thresholds.

    These are quantiles of the entropies on the run's validation text: at 0 the last layer predicts
    everything, at 1 the first exit. `protocol` and errors are those of `charlm.bits_per_character`;
    UserError also if only the last layer has a head.
    """
    if corpus.sources:
        raise UserError("early exit: scores one text; name a source of the mixture", "source")
    scorer = Scorer(trained, corpus, **protocol)
    layers = _exits(trained)
    models = (trained.transformer, trained.heads)
    valid = corpus.splits["valid"]
    valid_ids = valid.ids[: trained.config.train.valid_symbols]
    num_symbols = len(scorer.ids)
    options = scorer.options | {"layers": layers, "measure": nats_and_entropies}
    with full_fp32_matmul(trained.device):
        figures_EKN = measure_text(*models, valid_ids, **options)
        thresholds_Q = choose_thresholds(figures_EKN[:, 1], quantiles)
        batches = predictions(*models, scorer.ids, **options)
        sums = _sums(batches, thresholds_Q, len(layers), num_symbols)
    sums = (sum_over_processes(part, trained.device) for part in sums)
    last_nats_N, nats_E, nats_Q, counts_QE = sums
    rows = zip(quantiles, thresholds_Q.tolist(), nats_Q.split(1), counts_QE.numpy(), strict=True)
    names = list(map(str, layers))
    points = [
        ExitPoint(
            quantile=quantile,
            threshold=None if math.isinf(threshold) else threshold / math.log(2),
            mean_layers=float(counts_E @ layers) / num_symbols,
            bits_per_character=bits_per(nats, scorer.characters),
            bits_per_byte=bits_per(nats, scorer.bytes),
            shares=dict(zip(names, (counts_E / num_symbols).tolist(), strict=True)),
        )
        for quantile, threshold, nats, counts_E in rows
    ]
    chosen_on = f"the first {len(valid_ids):,} of {valid.symbols:,} symbols of the valid split"
    curve = EarlyExit(chosen_on=chosen_on, points=tuple(points))
    by_layer = scorer.by_layer(dict(zip(layers, nats_E.split(1), strict=True)))
    return scorer.score(last_nats_N.numpy(), layers=by_layer, early_exit=curve)


def _exits(trained: TrainedModel) -> list[int]:
    layers = exit_layers(trained)
    if len(layers) < 2:
        problem = "early exit: only the last layer has a head for the next symbol"
        raise UserError(f"{problem}; train with --aux.layers.enabled=true")
    return layers


class ExitReader(Reader):
    """Reads a text symbol by symbol, each up to the first exit that is sure of the next.

    The layers above get keys and values of the exit's hidden state (Schuster et al. 2022, CALM): later
    predictions are roughly the whole model's. All layers read a prompt, and half a full context.
    """

    def __init__(self, trained: TrainedModel, entropy: float, exits: Counter[int]):
        """`entropy` is in bits; `exits` counts the symbols that each layer predicts."""
        super().__init__(trained)
        self.exit_layers, self.threshold = _exits(trained), entropy * math.log(2)
        self.exits = exits

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
        """As `Reader.next_logits`, for one text."""
        if cache.length == 0:
            self.exits[self.config.num_layers] += 1
            return super().next_logits(ids, cache)
        layer, *higher = self.exit_layers
        hidden_11D = self.read(ids, cache, layer=layer)
        logits_1V = self.logits(hidden_11D, layer)[:, 0, 0]
        for above in higher:
            cache.lengths -= 1
            if torch.special.entr(logits_1V.double().softmax(-1)).sum() < self.threshold:
                self.skip_from(hidden_11D, layer, cache)
                break
            hidden_11D = self.run_from(hidden_11D, layer, cache, above)
            layer = above
            logits_1V = self.logits(hidden_11D, layer)[:, 0, 0]
        self.exits[layer] += 1
        return logits_1V


def choose_thresholds(entropies_EN: np.ndarray, quantiles: Sequence[float]) -> Tensor:
    """Quantiles [Q] of the entropies of all exits but the last; 0 gives 0, 1 infinity."""
    thresholds_Q = np.quantile(entropies_EN[:-1], quantiles)
    ends = [np.equal(quantiles, 0), np.equal(quantiles, 1)]
    return torch.from_numpy(np.select(ends, [0.0, math.inf], thresholds_Q))


def first_sure(entropies_EM: Tensor, thresholds_Q: Tensor) -> Tensor:
    """The first exit with less entropy than each threshold, or the last: indices [Q, M]."""
    sure_QEM = entropies_EM < thresholds_Q[:, None, None]
    sure_QEM[:, -1] = True
    return sure_QEM.int().argmax(dim=1)


def _sums(
    batches: Iterable[tuple[Tensor, Tensor]], thresholds_Q: Tensor, num_exits: int, num_symbols: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats: the last layer's [N], by exit [E], by threshold [Q]; symbols by exit [Q, E]."""
    last_nats_N = torch.zeros(num_symbols, dtype=torch.float64)
    nats, counts = [], []
    for symbols_M, figures in batches:
        nats_EM, entropies_EM = figures.unbind(dim=1)
        last_nats_N[symbols_M] = nats_EM[-1]
        chosen_QM = first_sure(entropies_EM, thresholds_Q)
        nats.append(torch.cat([nats_EM, nats_EM.gather(0, chosen_QM)]).sum(dim=-1))
        counts.append(F.one_hot(chosen_QM, num_exits).sum(dim=1))
    columns = torch.stack(nats).T.tolist()
    totals = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    counts_QE = torch.stack(counts).sum(dim=0)
    return last_nats_N, totals[:num_exits], totals[num_exits:], counts_QE
