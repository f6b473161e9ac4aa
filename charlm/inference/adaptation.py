"""Learning while reading, or dynamic evaluation: a model learns from what it has predicted (Krause et al. 2018).

A text is cut into S streams of equal lengths, or longer by one symbol, which are read side by side. Each step
predicts the next symbols of all streams, and then learns from them. Streams share one set of weights.

Shapes: S streams, T positions of a window, Q last positions, L layers, V vocabulary, M predictions, K figures.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import UserError
from charlm.config.adapt import AdaptConfig
from charlm.data.windows import default_stride, evaluation_windows
from charlm.hardware import in_float64
from charlm.inference.scoring import Measure, measure_text, measured, nats, progress_bar
from charlm.model.heads import Heads
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.model.transformer import CharTransformer
from charlm.runs.trained import TrainedModel

GROUPS = {"all": "", "heads": r"heads\.|norm", "ngrams": r"ngram_embedding\.tables"}
"""Patterns of the names of parameters that learn."""
AT_ONCE = {"cpu": 2**13, "cuda": 2**16}
"""Symbols of windows that a backward pass holds, by type of device."""


class Learner:
    """A copy of a model that learns from what it reads; the model itself stays as it is."""

    def __init__(self, transformer: CharTransformer, heads: Heads, adapt: AdaptConfig | None):
        """Without `adapt` it does not learn. UserError if the model has nothing of what shall."""
        trained = nn.ModuleDict({"transformer": transformer, "heads": heads})
        self.adapt, self.modules = adapt, trained if adapt is None else copy.deepcopy(trained)
        self.transformer, self.heads = self.modules["transformer"], self.modules["heads"]
        self.device = next(transformer.parameters()).device
        self.optimizers: list[torch.optim.Optimizer] = []
        self.moved: list[tuple[Tensor, Tensor]] = []
        """Parameters that learn, without n-gram tables, and as they were."""
        if adapt is not None:
            self.modules.eval().requires_grad_(False)
            self._choose(trained, adapt)

    def _choose(self, trained: nn.ModuleDict, adapt: AdaptConfig) -> None:
        """Choose the parameters that learn, and make their optimizers."""
        own = dict(self.modules.named_parameters())
        names = [name for name in own if re.search(GROUPS[adapt.parameters], name)]
        if not names:
            problem = "the model has no n-gram tables; choose all"
            raise UserError(f"adapt.parameters={adapt.parameters}: {problem}", "adapt.parameters")
        tables = [own[name] for name in names if re.search(GROUPS["ngrams"], name)]
        self.moved = [(own[name], trained.get_parameter(name)) for name in names if own[name] not in set(tables)]
        others = [parameter for parameter, _ in self.moved]
        if others and adapt.rule == "sgd":
            self.optimizers.append(torch.optim.SGD(others, lr=adapt.rate))
        elif others:
            self.optimizers.append(torch.optim.Adam(others, lr=adapt.rate, betas=(0.0, 0.99)))
        if tables and adapt.ngram_rate:
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=adapt.ngram_rate, betas=(0.9, 0.99)))
            others += tables
        for parameter in others:
            parameter.requires_grad_()

    def learn(
        self,
        ids_ST: Tensor,
        targets_SQ: Tensor,
        counts_SQ: Tensor,
        layers: Iterable[int] = (),
        autocast_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Take the steps of a window: on its last Q predictions, where `counts_SQ` holds.

        Returns the logits of `layers` and of the last layer before the first step, [L, S, Q, V]. UserError if
        the loss is no longer finite.
        """
        layers = sorted({*layers, self.transformer.config.num_layers})
        rows = max(1, AT_ONCE.get(self.device.type, AT_ONCE["cuda"]) // ids_ST.shape[1])
        learns, before = bool(self.optimizers), []
        for step in range(self.adapt.steps if learns else 1):
            parts = zip(ids_ST.split(rows), targets_SQ.split(rows), counts_SQ.split(rows), strict=True)
            for ids, targets, counts in parts:
                with torch.set_grad_enabled(learns), full_fp32_matmul(self.device):
                    logits = self._logits(ids, targets.shape[1], layers, autocast_dtype)
                    if learns:
                        loss = F.cross_entropy(logits[-1][counts], targets[counts], reduction="sum")
                        if not loss.isfinite():
                            raise self.diverged()
                        (loss / counts_SQ.sum()).backward()
                before += [logits.detach()] * (step == 0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for parameter, trained in self.moved if learns and self.adapt.decay else ():
                parameter.data.lerp_(trained.data, self.adapt.decay)
        return torch.cat(before, dim=1)

    def diverged(self) -> UserError:
        """The error for weights that have left what numbers can say."""
        return UserError(f"adapt={dict(self.adapt)}: diverged; take lower rates", "adapt.rate")

    def _logits(self, ids_ST: Tensor, num_last: int, layers: list[int], dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            hidden = self.transformer(ids_ST, layers=layers, num_last=num_last)
        return torch.stack([self.heads(hidden[layer].float(), layer)[:, :, 0] for layer in layers])


def read_streams(
    learner: Learner,
    ids: np.ndarray,
    *,
    streams: int,
    stride: int,
    layers: Iterable[int] = (),
    autocast_dtype: torch.dtype | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Read a text of N symbols, in windows like those of `evaluation_windows` in each stream, and learn.

    Yields for each step where in the text the predicted symbols are, int64 [S, Q]; which of them count, bool
    [S, Q], as the end of a shorter stream does not; and the logits [L, S, Q, V] of `layers` and of the last.
    The first symbols of the streams come first, with equal logits.

    Raises UserError unless there are 1 to N streams and the stride is in [1, context_length].
    """
    if not 1 <= streams <= len(ids):
        raise UserError(f"streams={streams}: must lie in [1, {len(ids)}], the symbols of the text", "streams")
    each, longer = divmod(len(ids), streams)
    lengths_S1 = each + (np.arange(streams) < longer)[:, None]
    starts_S1 = np.cumsum(lengths_S1, axis=0) - lengths_S1
    windows = evaluation_windows(int(lengths_S1[0, 0]), learner.transformer.config.context_length, stride)
    num_layers = len({*layers, learner.transformer.config.num_layers})
    V = learner.transformer.vocabulary_size
    yield starts_S1, np.full((streams, 1), True), torch.zeros(num_layers, streams, 1, V, device=learner.device)
    for start, first in zip(windows.starts, windows.first_scored, strict=True):
        places = start + np.arange(windows.length + 1)
        # The end of a shorter stream is filled up, and does not count.
        window_SW = torch.from_numpy(ids[np.minimum(starts_S1 + places, len(ids) - 1)].astype(np.int64))
        counts_SQ = places[first + 1 :] < lengths_S1
        parts = window_SW[:, :-1], window_SW[:, first + 1 :], torch.from_numpy(counts_SQ)
        parts = (part.to(learner.device) for part in parts)
        yield starts_S1 + places[first + 1 :], counts_SQ, learner.learn(*parts, layers, autocast_dtype)


def adaptive_predictions(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    adapt: AdaptConfig | None,
    layers: Iterable[int],
    measure: Measure = nats,
    experts: Sequence[str] = (),
    known: Iterable[np.ndarray] = (),
    show_progress: bool = False,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `charlm.inference.scoring.predictions`, learning; options as for `read_streams`.

    With `experts`, the last figures are the costs of a mixture, which has counted the texts `known`.
    """
    learner, layers = Learner(transformer, heads, adapt), sorted(layers)
    if experts:
        from charlm.inference.experts import Experts  # needs numba

        mixed = layers if "heads" in experts else layers[-1:]
        mixture = Experts(experts, transformer.vocabulary_size, len(mixed), options["streams"])
        for text in known:
            mixture.read(text)
    with progress_bar(len(ids), "evaluating", show_progress) as bar:
        for symbols_SQ, counts_SQ, logits_LSQV in read_streams(learner, ids, layers=layers, **options):
            symbols_M = torch.from_numpy(symbols_SQ[counts_SQ])
            targets_M = torch.from_numpy(ids[symbols_M.numpy()].astype(np.int64)).to(learner.device)
            counts = torch.from_numpy(counts_SQ).to(learner.device)
            figures = [measured(measure, logits_SQV[counts], targets_M) for logits_SQV in logits_LSQV[: len(layers)]]
            if experts:
                log_p_LSQV = in_float64(logits_LSQV[-len(mixed) :]).log_softmax(-1).cpu().numpy()
                targets_SQ = ids[np.minimum(symbols_SQ, len(ids) - 1)]
                nats_SQ = mixture.score(log_p_LSQV.transpose(1, 2, 0, 3), targets_SQ, counts_SQ)
                figures.append(torch.from_numpy(nats_SQ[counts_SQ])[None].to(figures[0]))
            yield symbols_M, torch.stack(figures).cpu()
            bar.update(len(symbols_M))


def adapted(
    trained: TrainedModel, text: bytes, adapt: AdaptConfig | Mapping[str, Any] | None = None, *, streams: int = 1
) -> TrainedModel:
    """The model after it has read a text and learned from it, at the default stride; `trained` stays as it is.

    Raises UserError for options that do not fit, and a text that is empty or that the vocabulary cannot spell.
    """
    ids = trained.ids(text, "adapt")
    if not len(ids):
        raise UserError("adapt: the text is empty; give one to learn from", "adapt")
    learner = Learner(trained.transformer, trained.heads, AdaptConfig.read(dict(adapt or {})))
    stride = default_stride(trained.config.model.context_length)
    for _ in read_streams(learner, ids, streams=streams, stride=stride):
        pass
    last = ids[-trained.config.model.context_length - 1 :]
    how = {"stride": stride, "layers": [trained.config.model.num_layers]}
    if not np.isfinite(measure_text(learner.transformer, learner.heads, last, **how)).all():
        raise learner.diverged()
    return replace(trained, checkpoint=f"{trained.checkpoint}, adapted", scores=(), **learner.modules)
