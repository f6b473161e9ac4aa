"""Scores: bits per character and per byte of a text, with their protocol. Shapes: N symbols.

Costs are float64 nats, added exactly (`math.fsum`) and divided once.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import attrgetter, mul
from typing import Any, Literal

import numpy as np

from charlm.config import Precision, UserError
from charlm.config.adapt import AdaptConfig, fixed
from charlm.data.corpus import Corpus
from charlm.data.text_files import changes
from charlm.data.vocabulary import Vocabulary
from charlm.data.windows import default_stride
from charlm.inference.adaptation import adaptive_predictions
from charlm.inference.scoring import AUTOCAST_DTYPES, check_precision, negative_log_likelihoods, rank_and_processes
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel, exit_layers
from charlm.text import html_table

FITTED = 500_000  # symbols of validation that weights of fixed experts learn from


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A point of the curve of early exit: one threshold for all exits."""

    quantile: float
    """Share of validation predictions under the threshold."""
    threshold: float | None
    """In bits; None means infinity."""
    mean_layers: float
    bits_per_character: float
    bits_per_byte: float
    shares: dict[str, float]
    """Share of the symbols that each layer predicts."""


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """The curve of early exit; `chosen_on` says on what text the thresholds were."""

    chosen_on: str
    points: tuple[ExitPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its protocol."""

    bits_per_character: float
    bits_per_byte: float
    standard_error: float | None
    """Of `bits_per_character`; None for a single symbol."""
    symbols: int
    characters: int
    """Characters that begin in the scored text."""
    bytes: int
    split: str
    stride: int
    context_length: int
    checkpoint: str
    corpus: str
    corpus_sha256: str
    precision: Precision
    seconds: float
    layers: dict[str, float] | None = None
    """Bits per character of each layer that has a head for the next symbol."""
    mixture: dict[str, float] | None = None
    """Weight of each layer in the scored prediction, if it is a mixture."""
    streams: int | None = None
    """Parts of the text read side by side, if scored as a compressor or adaptively."""
    compressed_bytes: int | None = None
    """Bytes that the bits of all symbols fill, if scored as a compressor."""
    adapt: dict[str, Any] | None = None
    """How the model learned from the text, if the score is adaptive: `AdaptConfig`."""
    experts: tuple[str, ...] | None = None
    """Experts that the network is mixed with."""
    network: float | None = None
    """Bits per character of the network by itself, if mixed with experts."""
    early_exit: EarlyExit | None = None
    sources: dict[str, float] | None = None
    """Bits per character of each source, if the corpus is a mixture."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without optional fields that are None."""
        kept = {name: value for name, value in asdict(self).items() if value is not None}
        return kept | {"standard_error": self.standard_error}

    def _repr_html_(self) -> str:
        return html_table(self.as_dict())


def bits_per_character(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    all_layers: bool = False,
    mixture: Literal["hedge"] | None = None,
    adapt: AdaptConfig | Mapping[str, Any] | None = None,
    experts: Sequence[str] = (),
    streams: int | None = None,
    show_progress: bool = True,
) -> Score:
    """Score a split of the corpus that the model was trained on (see `charlm.data.windows`).

    Where torch.distributed is initialised, every process must call this; all return the score. An adaptive score
    takes one process, and each text of a mixture begins with the trained model, which stays as it is.

    Args:
        corpus: the one that `charlm.load_corpus(trained.config.data)` returns.
        stride: from one window to the next; 1 is the paper's, the default half the context.
        limit: score only this many symbols, as if the split ended there.
        batch_size: windows per batch and process; the default depends on the device.
        precision: the transformer's; heads are in fp32 and the softmax in float64.
        all_layers: also score every layer that has a head for the next symbol.
        mixture: "hedge" scores sum_i alpha_i f_i with the weights alpha that hedge backpropagation
            has learned (Sahoo et al. 2018).
        adapt: learn from each symbol after it was scored; a mapping has options of `AdaptConfig`.
        experts: score the mixture of the network with these, see `charlm.inference.experts`. Weights of fixed
            ones have learned from the beginning of the validation split.
        streams: parts of the text that are read side by side where something is learned, by default one.

    Raises UserError for a value out of range, another corpus, or a mixture without weights.
    """
    scorer = Scorer(trained, corpus, split, stride, limit, batch_size, precision, show_progress)
    last = trained.config.model.num_layers
    weights = trained.hedge_weights if mixture else {last: 1.0}
    if weights is None:
        problem = "mixture=hedge: no weights were learned"
        raise UserError(f"{problem}; train with --aux.hedge.enabled=true", "mixture")
    shares = {str(layer): weights[layer] for layer in sorted(weights)}
    models = (trained.transformer, trained.heads)
    layers = exit_layers(trained) if all_layers or "heads" in experts else weights
    if mixture and experts:
        raise UserError(f"mixture={mixture}: cannot be combined with experts; leave one out", "mixture")
    adapt = None if adapt is None else AdaptConfig.read(dict(adapt))
    if adapt is not None or experts:
        if scorer.options.pop("batch_size") is not None:
            raise UserError("batch_size: cannot be combined with adapt or experts; choose streams", "batch_size")
        if rank_and_processes()[1] > 1:
            raise UserError("adapt or experts: learn from a text in its order; use one process", "adapt")
        streams = 1 if streams is None else streams
        known = corpus.texts("train") if "train" in experts else ()
        fitted = np.concatenate(corpus.texts("valid", FITTED)) if fixed(experts) else None
        own = {"adapt": adapt, "streams": streams, "experts": experts, "known": known, "fitted": fitted}
        scorer.options |= {"read": adaptive_predictions} | own
    elif streams is not None:
        raise UserError(f"streams={streams}: requires adapt, experts, or a score as a compressor", "streams")
    with full_fp32_matmul(trained.device):
        nats = negative_log_likelihoods(*models, scorer.ids, layers=layers, lengths=scorer.lengths, **scorer.options)
    own = mixture_nats(nats, weights) if mixture else nats[last]
    return scorer.score(
        nats.pop(0, own),
        layers=scorer.by_layer(nats) if all_layers else None,
        mixture=shares if mixture else None,
        adapt=adapt and dict(adapt),
        experts=tuple(experts) or None,
        network=scorer.bits(own) if experts else None,
        streams=streams,
    )


def tune(
    trained: TrainedModel, corpus: Corpus, adapt: AdaptConfig, *, limit: int | None = None, **options: Any
) -> Iterator[Score]:
    """Adaptive scores of the beginning of the validation split, as rates are tried: see their `adapt`.

    From those of `adapt` on, the rate, and then that of n-gram tables, is doubled or halved as long as that helps.
    `limit` is by default `train.valid_symbols`; options and errors are those of `bits_per_character`.
    """
    options |= {"split": "valid", "limit": limit or trained.config.train.valid_symbols}
    lowest = bits_per_character(trained, corpus, adapt=adapt, **options)
    yield lowest
    tried = [lowest.adapt]
    for name, factor in product(("rate", "ngram_rate"), (2.0, 0.5)):
        while (rates := lowest.adapt | {name: factor * lowest.adapt[name]}) not in tried:
            tried.append(rates)
            with suppress(UserError):  # learning diverged
                score = bits_per_character(trained, corpus, adapt=rates, **options)
                yield score
                lowest = min(lowest, score, key=attrgetter("bits_per_character"))


class ScoredText:
    """The beginning of a split, of a mixture that of each source."""

    def __init__(self, corpus: Corpus, shares: Sequence[float], split: str, symbols: int | None):
        """A source counts by its share, one of `shares`. UserError if no character begins in a text."""
        texts = corpus.texts(split, symbols)
        self.ids, self.lengths = np.concatenate(texts), list(map(len, texts))
        self.names, self.shares, self.vocabulary = list(corpus.sources or [corpus.name]), shares, corpus.vocabulary
        self.units = [count_units(ids, corpus.vocabulary) for ids in texts]
        self.characters, self.bytes = map(sum, zip(*self.units, strict=True))

    def split(self, values_N: np.ndarray) -> list[np.ndarray]:
        """The values of each source."""
        return np.split(values_N, np.cumsum(self.lengths[:-1], dtype=int))

    def by_source(self, nats_N: np.ndarray, unit: int = 0) -> dict[str, float]:
        """Bits per character of each source; per byte if `unit` is 1."""
        parts = zip(self.names, self.split(nats_N), self.units, strict=True)
        return {name: bits_per(nats, counts[unit]) for name, nats, counts in parts}

    def bits(self, nats_N: np.ndarray, unit: int = 0) -> float:
        """Their mean by weight."""
        return math.fsum(map(mul, self.shares, self.by_source(nats_N, unit).values()))


class Scorer(ScoredText):
    """A text to score and the protocol; arguments and errors as for `bits_per_character`."""

    def __init__(
        self,
        trained: TrainedModel,
        corpus: Corpus,
        split: str = "test",
        stride: int | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        precision: Precision = "fp32",
        show_progress: bool = True,
    ):
        self.started = time.perf_counter()
        known = [trained.corpus, *trained.corpus.get("sources", {}).values()]
        if corpus.sha256 not in [one["sha256"] for one in known] or corpus.vocabulary != trained.vocabulary:
            own = f"{trained.corpus['name']} ({trained.corpus['sha256'][:12]})"
            raise UserError(
                f"corpus={corpus.name} ({corpus.sha256[:12]}): the model was trained on {own}, another "
                f"text or vocabulary{changes(trained.corpus.get('files'), corpus.files)}; "
                "name that one (--data.path, --data.hub_id), "
                "or score any file with scripts/compress.py RUN FILE -o FILE.clm --report"
            )
        if split not in corpus.splits:
            choices = ", ".join(corpus.splits)
            raise UserError(f"split={split}: must be one of {choices}", "split")
        check_precision(precision, trained.device)
        for option, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{option}={value}: must be at least 1", option)
        context_length = trained.config.model.context_length
        self.options = {
            "stride": default_stride(context_length) if stride is None else stride,
            "batch_size": batch_size,
            "autocast_dtype": AUTOCAST_DTYPES[precision],
            "show_progress": show_progress,
        }
        """Options of `predictions`."""
        shares = trained.config.data.shares if corpus.sources else (1.0,)
        super().__init__(corpus, shares, split, limit)
        self.protocol = {
            "split": split,
            "stride": self.options["stride"],
            "context_length": context_length,
            "checkpoint": trained.checkpoint,
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            "precision": precision,
        }

    def by_layer(self, nats: Mapping[int, np.ndarray]) -> dict[str, float]:
        """Bits per character of each layer, in ascending order."""
        return {str(layer): self.bits(nats[layer]) for layer in sorted(nats)}

    def score(self, nats_N: np.ndarray, **fields: Any) -> Score:
        """The score of the costs of all symbols, with further `fields`."""
        pairs = zip(self.split(nats_N), self.split(self.ids), strict=True)
        errors = [standard_error(*pair, self.vocabulary) for pair in pairs]
        return Score(
            bits_per_character=self.bits(nats_N),
            bits_per_byte=self.bits(nats_N, 1),
            standard_error=None if None in errors else math.hypot(*map(mul, self.shares, errors)),
            sources=self.by_source(nats_N) if len(self.names) > 1 else None,
            symbols=len(self.ids),
            characters=self.characters,
            bytes=self.bytes,
            seconds=time.perf_counter() - self.started,
            **(self.protocol | fields),
        )


def score_at(score: Score, depth: int) -> dict[str, Any]:
    """The score of one layer, for the card of a model that ends there; of a mixture not per byte."""
    bits = score.layers[str(depth)]
    per_byte = None if score.sources else bits * score.characters / score.bytes
    own = {"bits_per_character": bits, "bits_per_byte": per_byte, "standard_error": None, "sources": None}
    return replace(score, **own, layers=None).as_dict()


def mixture_nats(nats: Mapping[int, np.ndarray], weights: Mapping[int, float]) -> np.ndarray:
    """-log sum_i weight_i exp(-nats_i) [N], with weights scaled to sum to 1."""
    total = math.fsum(weights.values())
    present = [(layer, weight / total) for layer, weight in weights.items() if weight > 0]
    log_shares = [math.log(share) - nats[layer] for layer, share in present]
    return -np.logaddexp.reduce(log_shares, axis=0)


def bits_per(nats: np.ndarray, count: int) -> float:
    """Bits per unit of a text of `count` units."""
    return math.fsum(nats) / (count * math.log(2))


def count_units(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[int, int]:
    """The characters that begin in a text, and its bytes; UserError if none begins."""
    characters = vocabulary.count_characters(ids)
    if characters == 0:
        raise UserError(f"a text of {len(ids)} symbols: no character begins in it")
    return characters, len(vocabulary.decode(ids))


def standard_error(nats: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary) -> float | None:
    """Standard error of bits per character: a ratio estimator over blocks; None for one symbol.

    The text is cut into K equal blocks: 100, or fewer so that each holds 1,000 symbols, but at least 10.
    With b_k bits and c_k characters in block k, and R = sum b / sum c:

        sqrt(K / (K - 1) * sum_k (b_k - R c_k)^2) / sum_k c_k
    """
    num_blocks = min(max(10, min(100, len(nats) // 1000)), len(nats))
    if num_blocks < 2:
        return None
    bits = np.array([block.sum() for block in np.array_split(nats, num_blocks)]) / math.log(2)
    blocks = np.array_split(ids, num_blocks)
    characters = np.array([vocabulary.count_characters(block) for block in blocks])
    residuals = bits - bits.sum() / characters.sum() * characters
    variance = num_blocks / (num_blocks - 1) * np.square(residuals).sum()
    return math.sqrt(variance) / int(characters.sum())
