"""How well a model predicts a text: bits per character and per byte, with their protocol.

Every symbol of the text is scored exactly once. Each symbol's cost is kept in float64 nats; the costs are added
exactly (`math.fsum`) and divided once, at the end. The figure therefore does not depend on the batch size or the number
of processes, but for the rounding inside the model.

Shapes: N symbols.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import Vocabulary
from charlm.data.windows import default_stride
from charlm.inference.scoring import AUTOCAST_DTYPES, negative_log_likelihoods
from charlm.model.kernels_cpu import exact_matmul
from charlm.runs.load import TrainedModel

EvaluationPrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure with its protocol. `as_dict` is what `scripts/evaluate.py --json` prints."""

    bits_per_character: float
    """Bits of all scored symbols over `characters`."""
    bits_per_byte: float
    """The same bits over `bytes`."""
    standard_error: float | None
    """Of bits_per_character, see `standard_error`; None for a single symbol."""
    symbols: int
    """Symbols scored: all of the split's, or the first `limit`."""
    characters: int
    """Characters that begin in the scored text."""
    bytes: int
    split: str
    stride: int
    context_length: int
    checkpoint: str
    corpus: str
    corpus_sha256: str
    precision: EvaluationPrecision
    seconds: float
    layers: dict[str, float] | None = None
    """Bits per character from each layer that has a head for the next symbol, where asked."""
    mixture: dict[str, float] | None = None
    """What each layer's prediction weighs in the one that was scored, where it is a mixture of several."""
    streams: int | None = None
    """Parts of the text that were read side by side, each from no context, where it was scored as it is compressed."""
    compressed_bytes: int | None = None
    """Bytes that the bits of all symbols fill, where it was scored as it is compressed."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; without those of the last four that were not asked for."""
        optional = ("layers", "mixture", "streams", "compressed_bytes")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


def bits_per_character(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: EvaluationPrecision = "fp32",
    all_layers: bool = False,
    mixture: Literal["hedge"] | None = None,
    show_progress: bool = True,
) -> Score:
    """Score a split of the corpus that the model was trained on (see `charlm.data.windows`).

    Where torch.distributed is initialised, every process calls this, each scores its share of the windows, and all
    return the same figure.

    Args:
        corpus: as `charlm.load_corpus(trained.config.data)` gives it.
        stride: symbols from one window to the next; 1 is the paper's, the default half the context.
        limit: score the first so many symbols, as if the split ended there.
        batch_size: windows that one process runs at once; by default as many as `BATCH_SYMBOLS` allows.
        precision: of the transformer; heads and softmax are computed in fp32 and float64 whatever it is.
        all_layers: score every layer that has a head for the next symbol, in the same pass.
        mixture: "hedge" scores the prediction sum_i alpha_i f_i in place of the last layer's, with the weights alpha
            that hedge backpropagation has learned (Sahoo et al. 2018).
        show_progress: show a bar on stderr if that is a terminal.

    Raises:
        UserError: a value out of range, fp16 on a CPU, a corpus other than the run's, or a mixture without weights.
    """
    check_options(trained, corpus, split, limit, batch_size, precision)
    started = time.perf_counter()
    weights = _mixture_weights(trained) if mixture else {trained.config.model.num_layers: 1.0}
    stride = default_stride(trained.config.model.context_length) if stride is None else stride
    ids = corpus.splits[split].ids[:limit]
    characters, _ = count_units(ids, corpus.vocabulary)
    with exact_matmul(trained.device):
        nats = negative_log_likelihoods(
            trained.transformer,
            trained.heads,
            ids,
            stride=stride,
            layers=exit_layers(trained) if all_layers else weights,
            batch_size=batch_size,
            autocast_dtype=AUTOCAST_DTYPES[precision],
            show_progress=show_progress,
        )
    return score(
        trained,
        corpus,
        mixture_nats(nats, weights) if mixture else nats[trained.config.model.num_layers],
        split=split,
        stride=stride,
        precision=precision,
        seconds=time.perf_counter() - started,
        layers={str(layer): bits_per(nats[layer], characters) for layer in sorted(nats)} if all_layers else None,
        mixture={str(layer): weight for layer, weight in sorted(weights.items())} if mixture else None,
    )


def score(trained: TrainedModel, corpus: Corpus, nats_N: np.ndarray, *, split: str, **protocol: Any) -> Score:
    """The figure that the costs of the first N symbols of a split make, with what is known of their protocol."""
    ids = corpus.splits[split].ids[: len(nats_N)]
    characters, num_bytes = count_units(ids, corpus.vocabulary)
    return Score(
        bits_per_character=bits_per(nats_N, characters),
        bits_per_byte=bits_per(nats_N, num_bytes),
        standard_error=standard_error(nats_N, ids, corpus.vocabulary),
        symbols=len(ids),
        characters=characters,
        bytes=num_bytes,
        split=split,
        context_length=trained.config.model.context_length,
        checkpoint=trained.checkpoint,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        **protocol,
    )


def exit_layers(trained: TrainedModel) -> list[int]:
    """The layers that have a head for the next symbol, the last one among them."""
    return [layer for layer, offset in trained.heads.pairs if offset == 1]


def mixture_nats(nats: Mapping[int, np.ndarray], weights: Mapping[int, float]) -> np.ndarray:
    """What each symbol costs, in nats, if layers predict it together: -log sum_i weight_i exp(-nats_i), float64 [N].

    No weight is negative, and they are scaled to add up to 1: else this would not be a distribution's cost.
    """
    total = math.fsum(weights.values())
    log_shares = [math.log(weight / total) - nats[layer] for layer, weight in weights.items() if weight > 0]
    return -np.logaddexp.reduce(log_shares, axis=0)


def bits_per(nats: np.ndarray, count: int) -> float:
    """Nats of all symbols to bits per unit, of which the text has `count`. The sum is exact, whatever its order."""
    return math.fsum(nats) / (count * math.log(2))


def count_units(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[int, int]:
    """The characters that begin in a text, and its bytes.

    Raises:
        UserError: no character begins in it, as in a few bytes from the middle of one.
    """
    characters = vocabulary.count_characters(ids)
    if characters == 0:
        raise UserError(f"a text of {len(ids)} symbols: no character begins in it, so bits per character do not exist")
    return characters, vocabulary.count_bytes(ids)


def standard_error(nats: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary) -> float | None:
    """Standard error of bits per character, as of a sample of text of this length.

    Neighbouring symbols are not independent, so the text is cut into K contiguous blocks of equal numbers of symbols:
    100, or fewer so that each holds 1,000 symbols, yet at least 10. With b_k bits and c_k characters in block k and
    R = sum b / sum c, it is the ratio estimator's

        sqrt(K / (K - 1) * sum_k (b_k - R c_k)^2) / sum_k c_k

    None where there are not two symbols.
    """
    num_blocks = min(max(10, min(100, len(nats) // 1000)), len(nats))
    if num_blocks < 2:
        return None
    bits = np.array([block.sum() for block in np.array_split(nats, num_blocks)]) / math.log(2)
    characters = np.array([vocabulary.count_characters(block) for block in np.array_split(ids, num_blocks)])
    residuals = bits - bits.sum() / characters.sum() * characters
    return math.sqrt(num_blocks / (num_blocks - 1) * np.square(residuals).sum()) / int(characters.sum())


def _mixture_weights(trained: TrainedModel) -> dict[int, float]:
    if trained.hedge_weights is None:
        raise UserError(
            "mixture=hedge: the model has no weights to mix its layers with; train one with --aux.hedge.enabled=true"
        )
    return trained.hedge_weights


def check_options(
    trained: TrainedModel, corpus: Corpus, split: str, limit: int | None, batch_size: int | None, precision: str
) -> None:
    """Raise UserError unless the model can be scored on this split of the corpus in this way."""
    if corpus.sha256 != trained.corpus["sha256"] or corpus.vocabulary != trained.vocabulary:
        raise UserError(
            f"corpus={corpus.name} ({corpus.sha256[:12]}): the model was trained on {trained.corpus['name']} "
            f"({trained.corpus['sha256'][:12]}), another text or vocabulary; score it on that one "
            "(--data.path, --data.hub_id)"
        )
    if split not in corpus.splits:
        raise UserError(f"split={split}: must be one of {', '.join(corpus.splits)}")
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision}: must be one of {', '.join(AUTOCAST_DTYPES)}")
    if precision == "fp16" and trained.device.type == "cpu":
        raise UserError("precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
