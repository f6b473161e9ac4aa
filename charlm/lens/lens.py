"""A model along a text: the symbols that each layer expects, and the cost of each symbol.

Shapes: N symbols of a text, M new ones, T of a window, P pairs of layer and offset, K offsets, D d_model, H heads,
C head size, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from charlm.compression.report import compressed_sizes
from charlm.config import UserError
from charlm.config.adapt import AdaptConfig
from charlm.data.vocabulary import Vocabulary
from charlm.data.windows import default_stride
from charlm.hardware import in_float64
from charlm.inference.adaptation import adaptive_predictions
from charlm.inference.generation import Writing, write
from charlm.inference.scoring import measure_text, nats
from charlm.inference.speculative import Draft, DraftStatistics
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel, exit_layers

READ_AT_ONCE, CACHED = 256, 2**28
"""Symbols of a pass, between which work can be cancelled, and bytes of keys and values that are kept."""
Text = str | np.ndarray
"""A text, or its ids [N]."""


class Expected(NamedTuple):
    """The likeliest symbol for each place and its probability, [N]; -1 and NaN where nothing is known."""

    symbol: np.ndarray
    probability: np.ndarray


class Reading(NamedTuple):
    """A text as a model reads it. Position n has seen the symbols 0 to n."""

    vocabulary: Vocabulary
    pairs: tuple[tuple[int, int], ...]  # layer and offset of each head
    ids: np.ndarray
    bits: np.ndarray  # the cost of each by the last layer, float64 [N]; the first has equal probabilities
    symbols: np.ndarray  # that each head holds likeliest after each position, int32 [P, N]
    probabilities: np.ndarray  # theirs, float32 [P, N]
    next_logits: np.ndarray  # log-probabilities of the symbol after the text, float64 [V]

    def grid(self, offset: int = 1) -> dict[int, Expected]:
        """The symbol that each layer with such a head expected for each place, `offset` symbols before it."""
        rows = [row for row, (_, own) in enumerate(self.pairs) if own == offset]
        if not rows:
            choices = ", ".join(map(str, sorted({own for _, own in self.pairs})))
            raise UserError(f"offset={offset}: no layer has such a head; choose one of {choices}", "offset")
        known = max(0, len(self.ids) - offset)
        unknown = (0, 0), (len(self.ids) - known, 0)
        symbols_LN = np.pad(self.symbols[rows, :known], unknown, constant_values=-1)
        probabilities_LN = np.pad(self.probabilities[rows, :known], unknown, constant_values=np.nan)
        layers = [self.pairs[row][0] for row in rows]
        return dict(zip(layers, map(Expected, symbols_LN, probabilities_LN), strict=True))

    def decided(self, offset: int = 1) -> np.ndarray:
        """The lowest layer from which up all expect what the highest expects, int [N]; -1 if nothing is known."""
        grid = self.grid(offset)
        symbols_LN = np.stack([own.symbol for own in grid.values()])
        agree_LN = np.logical_and.accumulate((symbols_LN == symbols_LN[-1])[::-1])[::-1]
        return np.where(symbols_LN[-1] < 0, -1, np.array(list(grid))[agree_LN.argmax(axis=0)])

    def pieces(self, since: int = 0) -> list[str]:
        """The character that starts at each place from `since` on, "" where one goes on; joined they are the text."""
        found = [""] * len(self.ids)
        starts = self.vocabulary.begins(self.ids)
        for first, end in pairwise([*starts[starts >= since].tolist(), len(self.ids)]):
            found[first] = self.vocabulary.decode(self.ids[first:end]).decode("utf-8", "surrogateescape")
        return found[since:]

    def bits_by_character(self) -> np.ndarray:
        """The cost of each character, float64 [characters]."""
        return np.add.reduceat(self.bits, self.vocabulary.begins(self.ids)) if len(self.ids) else self.bits

    def sizes(self) -> dict[str, int]:
        """The bytes that charlm, without the model, `gzip -9` and `xz -9e` take for the text."""
        data = self.vocabulary.decode(self.ids)
        others = compressed_sizes([data], len(data))
        return {"charlm": math.ceil(self.bits.sum() / 8), "gzip": others["gzip -9"], "xz": others["xz -9e"]}


class Drawn(NamedTuple):
    """A symbol, and the model's probabilities before and after temperature and top-k, float64 [V]."""

    symbol: int
    before: np.ndarray
    after: np.ndarray
    draft: str | None  # "accepted" or "rejected", if there was one for its place
    passes: int  # of the whole model so far


class Knockout(NamedTuple):
    """A prediction without the n-gram of one length, and the likeliest symbol then."""

    length: int
    bits: float | None  # that the symbol in the text costs more; None after the text
    symbol: int
    probability: float


class Lens:
    """A model to look into. It keeps its last reading, and reads another text from where the two differ.

    A prediction sees all symbols before it, up to the context. When that is full, the oldest `stride` symbols
    are forgotten at once, so that what was read never changes when text is added.

    Layers count from 1, places, heads and units from 0. Methods raise UserError for one that is not there, and
    for a text that the vocabulary cannot spell. Stray bytes in a text are lone surrogates.
    """

    def __init__(self, trained: TrainedModel, stride: int | None = None):
        self.trained, self.config, self.heads = trained, trained.config.model, trained.heads
        self.context, self.last = self.config.context_length, self.config.num_layers
        self.stride = max(1, self.context - default_stride(self.context) + 1) if stride is None else stride
        _check("stride", self.stride, 1, self.context)
        self.watch: Callable[[], None] = lambda: None
        """Called before each piece of work; what it raises cancels the rest."""
        drafts = ["offsets" for layer, offset in self.heads.pairs if layer == self.last and offset > 1]
        self.draft: Draft | None = next(iter(drafts + exit_layers(trained)[:-1]), None)
        """The source of drafts: heads for later symbols, else the lowest exit; None without either."""
        new = partial(KVCache, self.config, 1, trained.device)
        size = 8 * self.last * self.context * self.config.d_model
        self._held = lru_cache(max(1, CACHED // size))(lambda begin: [np.zeros(0, np.int64), new()])
        """The symbols of the window that begins at a place, and their keys and values."""
        V, P = trained.vocabulary.size, len(self.heads.pairs)
        nothing = np.zeros(0, np.int64), np.zeros(0), np.zeros((P, 0), np.int32), np.zeros((P, 0), np.float32)
        pairs, equal = tuple(self.heads.pairs), np.full(V, -math.log(V))
        self.reading = self._empty = Reading(trained.vocabulary, pairs, *nothing, equal)

    def ids(self, text: Text) -> np.ndarray:
        """The ids of a text, int64 [N]."""
        return np.array(self.trained.ids(text, "text") if isinstance(text, str) else text, np.int64)

    def window(self, position: int) -> int:
        """The first place that the prediction after `position` sees."""
        return max(0, -((self.context - 1 - position) // self.stride)) * self.stride

    def read(self, text: Text) -> Reading:
        """Read a text."""
        ids, old = self.ids(text), self.reading
        shared = common(ids, old.ids)
        if shared < max(len(ids), len(old.ids)):
            first = max(0, shared - 1)  # the last position once more, as its logits are not kept
            parts = [self._look(ids[position + 1 :], states) for position, states in self._states(ids, first)]
            self.reading = self._joined(ids, first, parts) if len(ids) else self._empty
        return self.reading

    def _joined(self, ids: np.ndarray, first: int, parts: Sequence[tuple[np.ndarray, ...]]) -> Reading:
        """The last reading before position `first`, and the parts from there on."""
        old = self.reading
        bits, symbols, probabilities, logits = zip(*parts, strict=True)
        bits_N = np.concatenate([[math.log2(old.vocabulary.size)], old.bits[1 : first + 1], *bits])
        symbols_PN = np.concatenate([old.symbols[:, :first], *symbols], axis=1)
        probabilities_PN = np.concatenate([old.probabilities[:, :first], *probabilities], axis=1)
        return Reading(old.vocabulary, old.pairs, ids, bits_N, symbols_PN, probabilities_PN, logits[-1])

    @torch.inference_mode()
    def _states(self, ids: np.ndarray, first: int) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Hidden states after the positions from `first` on, {layer: [M, D]}, and the first position of each part."""
        while first < len(ids):
            begin = self.window(first)
            held = cached, cache = self._held(begin)
            end, known = min(len(ids), begin + self.context), common(cached, ids[begin:first])
            while (place := begin + known) < end:
                self.watch()
                new, held[0] = ids[None, place : min(end, place + READ_AT_ONCE)], ids[begin:place]
                cache.lengths.fill_(known)
                with full_fp32_matmul(self.trained.device, new.size):
                    ids_1M = torch.from_numpy(new).to(self.trained.device)
                    states = self.trained.transformer(ids_1M, self.heads.layers, cache)
                known += new.size
                if begin + known > first:
                    yield first, {layer: own_1MD[0, max(0, first - place) :] for layer, own_1MD in states.items()}
                    first = begin + known
                held[0] = ids[begin:][:known]  # not if the user broke off: a hook may have changed the last

    def probabilities(self, states: Mapping[int, Tensor], layer: int, offset: int = 1) -> Tensor:
        """The probabilities that a layer gives from its hidden states, float64 [M, V]."""
        return in_float64(self.heads(states[layer][None], layer, [offset])[0, :, 0]).softmax(dim=-1)

    @torch.inference_mode()
    def measured(self, ids: np.ndarray, first: int, measure: Callable[[Mapping[int, Tensor]], Tensor]) -> np.ndarray:
        """The `measure` [M, ...] of the hidden states after the positions from `first` on."""
        parts = [measure(states).cpu() for _, states in self._states(ids, first)]
        return torch.cat([torch.zeros(0), *parts]).numpy()

    @torch.inference_mode()
    def _look(self, targets: np.ndarray, states: Mapping[int, Tensor]) -> tuple[np.ndarray, ...]:
        """Costs of the symbols that came, likeliest symbols, their probabilities, and the last logits."""
        likeliest = zip(*(self.probabilities(states, *pair).max(dim=-1) for pair in self.heads.pairs), strict=True)
        probabilities, symbols = (torch.stack(own).cpu().numpy() for own in likeliest)
        logits_MV = self.probabilities(states, self.last).log().cpu()
        targets_M = torch.from_numpy(targets[: len(logits_MV)])
        bits = nats(logits_MV[: len(targets_M)], targets_M)[0].numpy() / math.log(2)
        return bits, symbols.astype(np.int32), probabilities.astype(np.float32), logits_MV[-1].numpy()

    def adapted(self, text: Text, adapt: AdaptConfig | None = None) -> np.ndarray:
        """The cost of each symbol by the model as it is, and as it learns the text after each prediction, [2, N].

        Both are those of `evaluate.py --stride`. The model itself stays as it is. UserError if learning diverges.
        """

        def watched(*models: Any, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:  # `watch` gives None, or raises
            return (found for found in adaptive_predictions(*models, **how) if not self.watch())

        models = self.trained.transformer, self.trained.heads, self.ids(text)
        how = {"read": watched, "streams": 1, "stride": self.stride, "layers": [self.last]}
        both = [measure_text(*models, adapt=way, **how) for way in (None, adapt or AdaptConfig())]
        return np.concatenate(both)[:, 0] / math.log(2)

    def distribution(self, text: Text, place: int, layer: int | None = None, offset: int = 1) -> np.ndarray:
        """A layer's probabilities for a place, from `offset` symbols before it, float64 [V]; equal if it knows none."""
        ids, layer, V = self.ids(text), layer or self.last, self.trained.vocabulary.size
        _check("place", place, 0, len(ids) + offset - 1)
        if (layer, offset) not in self.heads.pairs:
            raise UserError(f"offset={offset}: layer {layer} has none; heads are {self.heads.pairs}", "offset")
        known, measure = ids[: max(0, place - offset + 1)], partial(self.probabilities, layer=layer, offset=offset)
        found = self.measured(known, max(0, place - offset), measure)
        return found[0] if len(found) else np.full(V, 1 / V)

    def follow(self, text: Text, symbol: int, offset: int = 1, since: int = 0) -> dict[int, np.ndarray]:
        """The probability that each layer gave a symbol at the places from `since` on; NaN where nothing is known."""
        ids, layers = self.ids(text), self._empty.grid(offset)
        _check("symbol", symbol, 0, self.trained.vocabulary.size - 1)
        _check("since", since, 0, len(ids))

        def measure(states: Mapping[int, Tensor]) -> Tensor:
            return torch.stack([self.probabilities(states, layer, offset)[:, symbol] for layer in layers], dim=1)

        found = self.measured(ids[: max(0, len(ids) - offset)], max(0, since - offset), measure)
        unknown = np.full((max(0, min(len(ids), offset) - since), len(layers)), np.nan)
        return dict(zip(layers, np.concatenate([unknown, found.reshape(-1, len(layers))]).T, strict=True))

    def unit(self, text: Text, layer: int, unit: int, since: int = 0) -> np.ndarray:
        """The activation of a unit of a layer's feed-forward sublayer at the places from `since` on, float32."""
        ids = self.ids(text)
        _check("layer", layer, 1, self.last)
        _check("unit", unit, 0, self.config.d_ff - 1)
        _check("since", since, 0, len(ids))
        dropout = self.trained.transformer.blocks[layer - 1].feed_forward.dropout  # the module after the activation
        inner: deque[Tensor] = deque(maxlen=1)
        with dropout.register_forward_hook(lambda module, inputs, inner_1TF: inner.append(inner_1TF)):
            return self.measured(ids, since, lambda states: inner[-1][0, -len(states[self.last]) :, unit])

    @torch.inference_mode()
    def attention(self, text: Text, layer: int, head: int, place: int) -> np.ndarray:
        """The weights that a head gives the places up to its own, float32 [place + 1]; 0 outside of the window."""
        ids, transformer = self.ids(text), self.trained.transformer
        _check("layer", layer, 1, self.last)
        _check("head", head, 0, self.config.num_heads - 1)
        _check("place", place, 0, len(ids) - 1)
        module, queries = transformer.blocks[layer - 1].attention.query, []
        with module.register_forward_hook(lambda module, inputs, query_1TD: queries.append(query_1TD)):
            next(self._states(ids[: place + 1], place))
        query_H1C, T = queries[-1][0, -1].view(self.config.num_heads, 1, -1), place + 1 - self.window(place)
        rotation = transformer.rotation(transformer.places(T, None))
        query_H1C = query_H1C if rotation is None else rotation.last(1)(query_H1C)
        keys_TC = self._held(place + 1 - T)[1].keys[layer - 1, 0, head, :T]
        weights_T = (keys_TC @ query_H1C[head, 0] * keys_TC.shape[1] ** -0.5).softmax(dim=0)
        return np.pad(weights_T.cpu().numpy(), (place + 1 - T, 0))

    @torch.inference_mode()
    def knockouts(self, text: Text, place: int) -> list[Knockout]:
        """The last layer's predictions for a place without the newest n-gram of each length; none for the first."""
        ids, ngrams, found = self.ids(text), self.trained.transformer.ngram_embedding, []
        _check("place", place, 0, len(ids))
        if ngrams is None or place == 0:
            return found
        whole_V = torch.from_numpy(self.distribution(ids, place)).log()  # all before the last symbol is cached now
        for length, table in zip(ngrams.lengths, ngrams.tables, strict=True):
            with table.register_forward_hook(lambda module, inputs, rows: torch.zeros_like(rows)):
                _, states = next(self._states(ids[:place], place - 1))
            without_V = self.probabilities(states, self.last)[0].log().cpu()
            lost = [float(own) / math.log(2) for own in (whole_V - without_V)[ids[place : place + 1]]] or [None]
            best = int(without_V.argmax())
            found.append(Knockout(length, *lost, best, float(without_V[best].exp())))
        return found

    def generate(self, text: Text, *, drafts: bool = False, **options: Any) -> Iterator[Drawn]:
        """Read a text and what `charlm.generate` writes after it, symbol by symbol; options and errors are its."""
        how = Writing.read(options | {"draft": (self.draft or "offsets") if drafts else None})
        reading = self.read(text)
        if not len(reading.ids):
            raise UserError("text: nothing can be written after no text; type a symbol", "text")
        prompt, statistics = reading.ids[self.window(len(reading.ids) - 1) :].tolist(), DraftStatistics()
        drafted = accepted = 0
        for passes, (symbols,) in enumerate(write(self.trained, [prompt], statistics, **dict(how)), 1):
            accepted, drafted = statistics.accepted - accepted, statistics.drafted - drafted
            marks = ["accepted"] * accepted + ["rejected"] * (drafted > accepted) + [None] * len(symbols)
            for symbol, mark in zip(symbols, marks, strict=False):
                logits_V = torch.from_numpy(reading.next_logits)
                after_V = how.distribution(logits_V).numpy()
                reading = self.read(np.append(reading.ids, symbol))
                yield Drawn(symbol, logits_V.exp().numpy(), after_V, mark, statistics.passes or passes)
            accepted, drafted = statistics.accepted, statistics.drafted


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many symbols two texts begin with alike."""
    shared = min(len(one), len(other))
    return int(np.append(np.flatnonzero(one[:shared] != other[:shared]), shared)[0])


def _check(option: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise UserError(f"{option}={value}: must lie in [{lowest}, {highest}]", option)
