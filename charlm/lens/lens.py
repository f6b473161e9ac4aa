"""A model along a text: the symbols that each layer expects, and the cost of each symbol.

Shapes: N symbols of a text, M new ones, T of a window, P pairs of layer and offset, K offsets, D d_model, H heads,
C head size, F d_ff, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.windows import default_stride
from charlm.hardware import in_float64
from charlm.inference.generation import Writing, write
from charlm.inference.scoring import nats
from charlm.inference.speculative import Draft, DraftStatistics
from charlm.inference.stepping import Reader
from charlm.lens.reading import Reading
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel, exit_layers

READ_AT_ONCE = 256
"""Symbols of a pass. Work can be cancelled between passes, and between the layers of one."""
Text = str | np.ndarray
"""A text, or its ids [N]."""
Measure = Callable[[Tensor], Tensor]


class Drawn(NamedTuple):
    """A symbol, and the model's probabilities before and after temperature and top-k, float64 [V]."""

    symbol: int
    before: np.ndarray
    after: np.ndarray
    draft: str | None
    """The draft for its place was "accepted" or "rejected"; None if there was none."""
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
    are forgotten at once, so that what was read never changes when text is added. Costs are those of
    `evaluate.py --stride`, but for its last window, which it moves back to the end of the text. By default
    generation and compression of one stream see the same.

    Layers count from 1, places, heads and units from 0. Methods raise UserError for one that is not there, and
    for a text that the vocabulary cannot spell.
    """

    def __init__(self, trained: TrainedModel, stride: int | None = None):
        """Raises UserError if the stride is not in [1, context_length]."""
        self.trained, self.config, self.heads = trained, trained.config.model, trained.heads
        self.context, self.last = self.config.context_length, self.config.num_layers
        self.stride = max(1, self.context - default_stride(self.context) + 1) if stride is None else stride
        _check("stride", self.stride, 1, self.context)
        self.watch: Callable[[], None] = lambda: None
        """Called before each piece of work; what it raises cancels the rest."""
        exits: list[Draft] = [*exit_layers(trained)[:-1]]
        has_offsets = any(layer == self.last and offset > 1 for layer, offset in self.heads.pairs)
        self.draft = "offsets" if has_offsets else next(iter(exits), None)
        """The source of drafts: heads for later symbols, else the lowest exit; None without either."""
        self._reader = Reader(trained)
        self._cache = KVCache(self.config, 1, trained.device)
        self._begin = self._known = 0
        """The place where the window in the cache begins, and its positions that all layers have read."""
        V, P = trained.vocabulary.size, len(self.heads.pairs)
        nothing = np.zeros(0, np.int64), np.zeros(0), np.zeros((P, 0), np.int32), np.zeros((P, 0), np.float32)
        self._empty = Reading(trained.vocabulary, tuple(self.heads.pairs), *nothing, np.full(V, -math.log(V)))
        self.reading = self._empty

    def ids(self, text: Text) -> np.ndarray:
        """The ids of a text, int64 [N]. Stray bytes are lone surrogates, as in Python's "surrogateescape"."""
        if not isinstance(text, str):
            return np.asarray(text, np.int64)
        try:
            data = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise UserError(f"text: its code unit {error.start:,} is half a character; remove it", "text") from None
        return self.trained.vocabulary.encode(data).astype(np.int64)

    def window(self, position: int) -> int:
        """The first place that the prediction after `position` sees."""
        return max(0, -((self.context - 1 - position) // self.stride)) * self.stride

    def read(self, text: Text) -> Reading:
        """Read a text. If it is cancelled, the part that was read is kept for the next call."""
        ids, old = self.ids(text), self.reading
        shared = min(len(ids), len(old.ids))
        shared = int(np.append(np.flatnonzero(ids[:shared] != old.ids[:shared]), shared)[0])
        if shared == len(ids) == len(old.ids) and old.next_logits is not None:
            return old
        first, parts = max(0, shared - 1), []  # the last position once more, as its logits are not kept
        try:
            for positions, states in self._states(ids, first):
                parts.append(self._look(ids, positions, states))
        finally:
            self.reading = self._joined(ids, first, parts)
        return self.reading

    @torch.inference_mode()
    def _states(self, ids: np.ndarray, first: int) -> Iterator[tuple[slice, dict[int, Tensor]]]:
        """Hidden states after the positions from `first` on, {layer: [1, M, D]}; `reading` has the ids before it."""
        for begin, start, end in self._spans(first, len(ids)):
            if self._begin != begin or self._known < start - begin:
                self._begin, self._known = begin, 0
            self._known = min(self._known, start - begin)
            while (place := begin + self._known) < end:
                new, states = ids[place : min(place + READ_AT_ONCE, end)], {}
                for below, layer in pairwise([0, *self.heads.layers]):
                    self.watch()
                    self._cache.lengths.fill_(self._known)
                    if below:
                        states[layer] = self._reader.run_from(states[below], below, self._cache, layer)
                    else:
                        states[layer] = self._reader.read([new.tolist()], self._cache, layer=layer)
                self._known += len(new)
                if (stop := place + len(new)) > start:
                    place = max(place, start)
                    yield slice(place, stop), {layer: hidden[:, place - stop :] for layer, hidden in states.items()}

    def _spans(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The windows for the predictions after positions first to end - 1: begin, first and end of each."""
        while first < end:
            begin = self.window(first)
            yield begin, first, min(end, begin + self.context)
            first = begin + self.context

    @torch.inference_mode()
    def _look(self, ids: np.ndarray, positions: slice, states: dict[int, Tensor]) -> tuple[np.ndarray, ...]:
        """Costs of the symbols after `positions`, likeliest symbols, their probabilities, and the last logits."""
        likeliest = []
        for layer, hidden_1MD in states.items():
            offsets = [offset for own, offset in self.heads.pairs if own == layer]
            logits_MKV = self._reader.logits(hidden_1MD, layer, offsets)[0]
            likeliest.append(logits_MKV.softmax(dim=-1).max(dim=-1))
        logits_MV = logits_MKV[:, 0].double().log_softmax(dim=-1)
        targets = torch.from_numpy(ids[positions.start + 1 : positions.stop + 1])
        bits = nats(logits_MV[: len(targets)], targets)[0] / math.log(2)
        probabilities, symbols = (torch.cat(own, dim=1).T.numpy() for own in zip(*likeliest, strict=True))
        return bits.numpy(), symbols.astype(np.int32), probabilities, logits_MV[-1].numpy()

    def _joined(self, ids: np.ndarray, first: int, parts: Sequence[tuple[np.ndarray, ...]]) -> Reading:
        """The last reading before position `first`, and the parts from there on."""
        if not len(ids):
            return self._empty
        old = self.reading
        bits, symbols, probabilities, logits = zip(*parts, strict=True) if parts else ((), (), (), (None,))
        symbols_PN = np.concatenate([old.symbols[:, :first], *symbols], axis=1)
        probabilities_PN = np.concatenate([old.probabilities[:, :first], *probabilities], axis=1)
        N = symbols_PN.shape[1]
        bits_N = np.concatenate([[math.log2(old.vocabulary.size)], old.bits[1 : first + 1], *bits])[:N]
        return Reading(old.vocabulary, old.pairs, ids[:N].copy(), bits_N, symbols_PN, probabilities_PN, logits[-1])

    def distribution(self, text: Text, place: int, layer: int | None = None, offset: int = 1) -> np.ndarray:
        """A layer's probabilities for a place, from `offset` symbols before it, float64 [V]; N is after the text.

        Equal ones where nothing is known.
        """
        ids, layer, V = self.ids(text), layer or self.last, self.trained.vocabulary.size
        _check("place", place, 0, len(ids) + offset - 1)
        found = self.expected(ids[: max(0, place - offset + 1)], [layer], offset, max(0, place - offset))[layer]
        return found[0] if len(found) else np.full(V, 1 / V)

    def follow(self, text: Text, symbol: int, offset: int = 1, since: int = 0) -> dict[int, np.ndarray]:
        """The probability that each layer gave a symbol at the places from `since` on; NaN where nothing is known."""
        ids = self.ids(text)
        _check("symbol", symbol, 0, self.trained.vocabulary.size - 1)
        _check("since", since, 0, len(ids))
        layers = [layer for layer, own in self.heads.pairs if own == offset] or [self.last]
        known, unknown = ids[: max(0, len(ids) - offset)], max(0, min(len(ids), offset) - since)
        found = self.expected(known, layers, offset, max(0, since - offset), lambda own_MV: own_MV[:, symbol])
        return {layer: np.pad(own, (unknown, 0), constant_values=np.nan) for layer, own in found.items()}

    @torch.inference_mode()
    def expected(
        self, ids: np.ndarray, layers: Sequence[int], offset: int, first: int, measure: Measure = torch.clone
    ) -> dict[int, np.ndarray]:
        """The `measure` of each layer's probabilities, float64 [M, V], after the positions from `first` on."""
        for layer in layers:
            if (layer, offset) not in self.heads.pairs:
                choices = ", ".join(f"{own} in layer {at}" for at, own in self.heads.pairs)
                raise UserError(f"offset={offset}: layer {layer} has no such head; choose {choices}", "offset")
        parts: dict[int, list[Tensor]] = {layer: [torch.zeros(0)] for layer in layers}
        for states in self._windows(ids, layers, first):
            for layer, hidden_1MD in states.items():
                probabilities_MV = in_float64(self.heads(hidden_1MD, layer, [offset])[0, :, 0]).softmax(dim=-1)
                parts[layer].append(measure(probabilities_MV).cpu())
        return {layer: torch.cat(own[len(own) > 1 :]).numpy() for layer, own in parts.items()}

    @torch.inference_mode()
    def _windows(self, ids: np.ndarray, layers: Sequence[int], first: int) -> Iterator[dict[int, Tensor]]:
        """Hidden states after the positions from `first` on, {layer: [1, M, D]}, by plain passes of whole windows."""
        for begin, start, end in self._spans(first, len(ids)):
            self.watch()
            yield self._forward(ids[begin:end], layers, num_last=end - start)

    def _forward(self, ids: np.ndarray, layers: Sequence[int], **how: Any) -> dict[int, Tensor]:
        """Hidden states of one pass through the modules, whose hooks are called, {layer: [1, T, D]}."""
        ids_1T = torch.from_numpy(ids[None]).to(self.trained.device)
        with full_fp32_matmul(self.trained.device, len(ids)):
            return self.trained.transformer(ids_1T, layers, **how)

    def unit(self, text: Text, layer: int, unit: int, since: int = 0) -> np.ndarray:
        """The activation of a unit of a layer's feed-forward sublayer at the places from `since` on, float32."""
        ids = self.ids(text)
        _check("layer", layer, 1, self.last)
        _check("unit", unit, 0, self.config.d_ff - 1)
        _check("since", since, 0, len(ids))
        inner: list[Tensor] = []
        dropout = self.trained.transformer.blocks[layer - 1].feed_forward.dropout  # the module after the activation
        with dropout.register_forward_hook(lambda module, inputs, inner_1TF: inner.append(inner_1TF[0, :, unit])):
            sizes = [states[layer].shape[1] for states in self._windows(ids, [layer], since)]
        values = [own[len(own) - size :].cpu() for own, size in zip(inner, sizes, strict=True)]
        return torch.cat([torch.zeros(0), *values]).numpy()

    @torch.inference_mode()
    def attention(self, text: Text, layer: int, head: int, place: int) -> np.ndarray:
        """The weights that a head gives the places up to its own, float32 [place + 1]; 0 outside of the window."""
        ids, transformer = self.ids(text), self.trained.transformer
        _check("layer", layer, 1, self.last)
        _check("head", head, 0, self.config.num_heads - 1)
        _check("place", place, 0, len(ids) - 1)
        queries: list[Tensor] = []
        cache, window = KVCache(self.config, 1, self.trained.device), ids[self.window(place) : place + 1]
        module = transformer.blocks[layer - 1].attention.query
        with module.register_forward_hook(lambda module, inputs, query_1TD: queries.append(query_1TD[0, -1])):
            self._forward(window, [layer], cache=cache)
        query_H1C = queries[0].view(self.config.num_heads, 1, -1)
        rotation = transformer.rotation(transformer.places(len(window), None))
        query_H1C = query_H1C if rotation is None else rotation.last(1)(query_H1C)
        keys_TC = cache.keys[layer - 1, 0, head, : len(window)]
        weights_T = (keys_TC @ query_H1C[head, 0] * keys_TC.shape[1] ** -0.5).softmax(dim=0)
        return np.pad(weights_T.cpu().numpy(), (place + 1 - len(window), 0))

    @torch.inference_mode()
    def knockouts(self, text: Text, place: int) -> list[Knockout]:
        """The last layer's prediction for a place, each time without the newest n-gram of one length.

        Empty for a model without n-grams, and where nothing is known.
        """
        ids, ngrams = self.ids(text), self.trained.transformer.ngram_embedding
        _check("place", place, 0, len(ids))
        if ngrams is None or place == 0:
            return []
        cache, window = KVCache(self.config, 1, self.trained.device), ids[self.window(place - 1) : place]
        if len(window) > 1:
            self._forward(window[:-1], [self.last], cache=cache)

        def read_last() -> Tensor:
            cache.lengths.fill_(len(window) - 1)
            hidden_11D = self._forward(window[-1:], [self.last], cache=cache)[self.last]
            return in_float64(self.heads(hidden_11D, self.last)[0, 0, 0]).log_softmax(dim=-1)

        whole_V, found = read_last(), []
        for length, table in zip(ngrams.lengths, ngrams.tables, strict=True):
            with table.register_forward_hook(lambda module, inputs, rows: torch.zeros_like(rows)):
                without_V = read_last()
            lost = [float(own) / math.log(2) for own in (whole_V - without_V)[ids[place : place + 1]]] or [None]
            best = int(without_V.argmax())
            found.append(Knockout(length, *lost, best, float(without_V[best].exp())))
        return found

    def generate(self, text: Text, *, drafts: bool = False, **options: Any) -> Iterator[Drawn]:
        """Read a text and what `charlm.generate` writes after it, symbol by symbol; options and errors are its.

        It sees what `read` sees of a text that is longer than the context.
        """
        how = Writing.read(options | {"draft": self.draft if drafts else None})
        reading = self.read(text)
        if not len(reading.ids):
            raise UserError("text: nothing can be written after no text; type a symbol", "text")
        if drafts and self.draft is None:
            raise UserError("drafts=true: the model has no heads to draft with; generate without", "drafts")
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


def _check(option: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise UserError(f"{option}={value}: must lie in [{lowest}, {highest}]", option)
