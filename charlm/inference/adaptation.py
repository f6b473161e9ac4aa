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
from charlm.inference.scoring import measure_text, measured, nats, progress_bar
from charlm.model.heads import Heads
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.model.rowwise import RowwiseRMS
from charlm.model.transformer import CharTransformer
from charlm.runs.trained import TrainedModel

TABLES = "ngram_embedding.tables"
GROUPS = {"all": "", "heads": r"heads\.|norm", "ngrams": TABLES}
"""Patterns of the names of parameters that learn."""
AT_ONCE = {"cpu": 2**13, "cuda": 2**16}
"""Symbols of windows that a backward pass holds, by type of device."""


class Learner:
    """A model that learns from what it reads, in copies of the parameters that move; without `adapt` it does not."""

    def __init__(
        self,
        transformer: CharTransformer,
        heads: Heads,
        adapt: AdaptConfig | None,
        layers: Iterable[int] = (),
        autocast_dtype: torch.dtype | None = None,
    ):
        """`layers` predict beside the last. UserError if the model has nothing of what shall learn."""
        self.adapt, self.device = adapt, next(transformer.parameters()).device
        self.layers = sorted({*layers, transformer.config.num_layers})
        self.autocast = torch.autocast(self.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        self.modules = nn.ModuleDict({"transformer": transformer, "heads": heads})
        self.optimizers: list[torch.optim.Optimizer] = []
        self.moved: list[tuple[Tensor, Tensor]] = []
        """Parameters that learn, without n-gram tables, and as they were."""
        if adapt is not None:
            trained = dict(self.modules.named_parameters())
            names = [name for name in trained if re.search(GROUPS[adapt.parameters], name)]
            tables = [name for name in names if TABLES in name and adapt.ngram_rate]
            others = [name for name in names if TABLES not in name]
            if not tables + others:
                problem = "no n-gram tables learn, as the model has none or ngram_rate is 0; choose all"
                raise UserError(f"adapt.parameters={adapt.parameters}: {problem}", "adapt.parameters")
            # Parameters that do not learn share the memory of the trained ones.
            own = {name: nn.Parameter(trained[name].detach(), requires_grad=False) for name in trained}
            own |= {name: nn.Parameter(trained[name].detach().clone()) for name in tables + others}
            self.modules = copy.deepcopy(self.modules, {id(trained[name]): own[name] for name in own}).eval()
            self.moved = [(own[name], trained[name]) for name in others]
            if others:
                rms = adapt.rule == "rms"
                kind, options = (torch.optim.Adam, {"betas": (0.0, 0.99)}) if rms else (torch.optim.SGD, {})
                self.optimizers.append(kind([own[name] for name in others], lr=adapt.rate, **options))
            if tables:
                rows = [own[name] for name in tables]
                self.optimizers.append(RowwiseRMS([{"params": rows, "lr": adapt.ngram_rate}]))
        self.transformer, self.heads = self.modules["transformer"], self.modules["heads"]

    def learn(self, windows_SW: Tensor, counts_SQ: Tensor) -> Tensor:
        """Take the steps of windows of W = T + 1 symbols: on their last Q predictions, where `counts_SQ` holds.

        Returns the logits of all layers before the first step, [L, S, Q, V]. UserError if the loss is not finite.
        """
        T, Q = windows_SW.shape[1] - 1, counts_SQ.shape[1]
        rows = max(1, AT_ONCE.get(self.device.type, AT_ONCE["cuda"]) // T)
        learns, before = self.adapt is not None, []
        for step in range(self.adapt.steps if learns else 1):
            for windows, counts in zip(windows_SW.split(rows), counts_SQ.split(rows), strict=True):
                with torch.set_grad_enabled(learns), full_fp32_matmul(self.device):
                    with self.autocast:
                        hidden = self.transformer(windows[:, :-1], layers=self.layers, num_last=Q)
                    logits = [self.heads(hidden[layer].float(), layer)[:, :, 0] for layer in self.layers]
                    if learns:
                        loss = F.cross_entropy(logits[-1][counts], windows[:, -Q:][counts], reduction="sum")
                        if not loss.isfinite():
                            raise self.diverged()
                        (loss / counts_SQ.sum()).backward()
                before += [torch.stack(logits).detach()] * (step == 0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for parameter, trained in self.moved if learns and self.adapt.decay else ():
                parameter.data.lerp_(trained.data, self.adapt.decay)
        return torch.cat(before, dim=1)

    def diverged(self) -> UserError:
        """The error for weights that have left what numbers can say."""
        return UserError(f"adapt={dict(self.adapt)}: diverged; take lower rates", "adapt.rate")


def read_streams(
    learner: Learner, ids: np.ndarray, *, streams: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Read a text of N symbols, in windows like those of `evaluation_windows` in each stream, and learn.

    Yields for each step where in the text the predicted symbols are, int64 [S, Q]; which of them count, bool
    [S, Q], as the end of a shorter stream does not; and the logits [L, S, Q, V] of the learner's layers.
    The first symbols of the streams come first, with equal logits.

    Raises UserError unless there are 1 to N streams and the stride is in [1, context_length].
    """
    if not 1 <= streams <= len(ids):
        raise UserError(f"streams={streams}: must lie in [1, {len(ids)}], the symbols of the text", "streams")
    lengths_S1 = np.array([[len(part)] for part in np.array_split(ids, streams)])
    starts_S1 = np.cumsum(lengths_S1, axis=0) - lengths_S1
    windows = evaluation_windows(int(lengths_S1[0, 0]), learner.transformer.config.context_length, stride)
    equal_LS1V = torch.zeros(len(learner.layers), streams, 1, learner.transformer.vocabulary_size)
    yield starts_S1, np.full((streams, 1), True), equal_LS1V.to(learner.device)
    for start, first in zip(windows.starts, windows.first_scored, strict=True):
        places = start + np.arange(windows.length + 1)
        # The end of a shorter stream is filled up, and does not count.
        windows_SW = torch.from_numpy(ids[np.minimum(starts_S1 + places, len(ids) - 1)].astype(np.int64))
        counts_SQ = places[first + 1 :] < lengths_S1
        window = windows_SW.to(learner.device), torch.from_numpy(counts_SQ).to(learner.device)
        yield starts_S1 + places[first + 1 :], counts_SQ, learner.learn(*window)


def adaptive_predictions(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    adapt: AdaptConfig | None,
    layers: Iterable[int],
    experts: Sequence[str] = (),
    known: Iterable[np.ndarray] = (),
    fitted: np.ndarray | None = None,
    autocast_dtype: torch.dtype | None = None,
    show_progress: bool = False,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `charlm.inference.scoring.predictions`, learning; options as for `read_streams`.

    With `experts`, the last figures are the costs of a mixture, which has counted the texts `known`. Weights of a
    fixed one have learned from the text `fitted`, beside the network before it learns.
    """
    learner, layers = Learner(transformer, heads, adapt, layers, autocast_dtype), sorted(layers)
    if experts:
        from charlm.inference.experts import Experts  # needs numba

        mixed = layers if "heads" in experts else layers[-1:]
        mixture = Experts(experts, transformer.vocabulary_size, len(mixed), options["streams"])
        for text in known:
            mixture.read(text, show_progress)

        def cost(text: np.ndarray, symbols_SQ: np.ndarray, counts_SQ: np.ndarray, logits_LSQV: Tensor) -> np.ndarray:
            log_p_LSQV = in_float64(logits_LSQV[-len(mixed) :]).log_softmax(-1).cpu().numpy()
            targets_SQ = text[np.minimum(symbols_SQ, len(text) - 1)]
            return mixture.score(log_p_LSQV.transpose(1, 2, 0, 3), targets_SQ, counts_SQ)

        if fitted is not None:
            still = Learner(transformer, heads, None, layers, autocast_dtype)
            with progress_bar(len(fitted), "fitting", show_progress) as bar:
                for step in read_streams(still, fitted, **options):
                    bar.update(cost(fitted, *step).size)
            mixture.fix()
    with progress_bar(len(ids), "evaluating", show_progress) as bar:
        for symbols_SQ, counts_SQ, logits_LSQV in read_streams(learner, ids, **options):
            symbols_M, counts = symbols_SQ[counts_SQ], torch.from_numpy(counts_SQ).to(learner.device)
            targets_M = torch.from_numpy(ids[symbols_M].astype(np.int64)).to(learner.device)
            figures = [measured(nats, logits_SQV[counts], targets_M) for logits_SQV in logits_LSQV[: len(layers)]]
            if experts:
                nats_SQ = cost(ids, symbols_SQ, counts_SQ, logits_LSQV)
                figures.append(torch.from_numpy(nats_SQ[counts_SQ])[None].to(figures[0]))
            yield torch.from_numpy(symbols_M), torch.stack(figures).cpu()
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
    T = trained.config.model.context_length
    how = {"stride": default_stride(T), "layers": learner.layers}
    for _ in read_streams(learner, ids, streams=streams, stride=how["stride"]):
        pass
    if not np.isfinite(measure_text(learner.transformer, learner.heads, ids[-T - 1 :], **how)).all():
        raise learner.diverged()
    return replace(trained, checkpoint=f"{trained.checkpoint}, adapted", scores=(), **learner.modules)
