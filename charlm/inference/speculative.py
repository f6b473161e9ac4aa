"""Writing several symbols per pass: cheap drafts, which the whole model verifies at once.

They come from the last layer's heads for later symbols (Stern et al. 2018; Gloeckle et al. 2024), or
from an exit's layers and head (Elhoushi et al. 2024, LayerSkip).

Shapes: P positions of a pass, K drafts, V vocabulary. P is K + 1, or K: the last draft was not read.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import eq
from typing import Literal

import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.windows import default_stride
from charlm.inference.sampling import Sampling, draw
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache

Draft = Literal["offsets"] | int
"""Source of drafts: the last layer's heads for offsets 2, 3, ..., or the exit at this layer."""
EXIT_DRAFT_TOKENS = 5
NEAR_TIE = 2e-6
"""Logits that differ by less than this share of the largest, per layer, are too close to call."""


@dataclass
class DraftStatistics:
    """How useful the drafts were, or where symbols left the model, counted during writing."""

    num_draft_tokens: int = 0
    """The most symbols that were drafted before a pass."""
    characters: int = 0
    passes: int = 0
    """Passes of the whole model, with the prompt's. Plain generation takes one per symbol."""
    drafted: int = 0
    accepted: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    """With early exit in place of drafts: the symbols that each layer predicted."""

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / max(1, self.drafted)

    @property
    def characters_per_pass(self) -> float:
        return self.characters / max(1, self.passes)


@dataclass
class Speculation:
    """A text that is being written with drafts.

    Greedy text equals that of plain generation: when two logits are too close to call, symbols since
    the last exact position are read again, one by one.
    """

    reader: Reader
    draft: Draft
    num_drafts: int
    sampling: Sampling
    generator: torch.Generator
    statistics: DraftStatistics
    context: list[int]
    """All symbols that the model sees, at first the prompt."""
    hidden_11D: Tensor | None = None
    """At the newest position in the cache; None before anything was read."""
    num_exact: int = 0
    """Positions that were read one at a time, or with the prompt."""

    def __post_init__(self):
        self.near_tie = NEAR_TIE * self.reader.config.num_layers
        self.cache = KVCache(self.reader.config, 1, self.reader.device)
        """Holds all of `context` but its newest symbol."""

    def write(self, length: int) -> Iterator[list[int]]:
        """The symbols that each pass adds."""
        while length:
            symbols = self.advance(length)
            length -= len(symbols)
            yield symbols

    @torch.inference_mode()
    def advance(self, limit: int) -> list[int]:
        """The next symbols, at least one and at most `limit`."""
        room = self.reader.config.context_length + 1 - len(self.context)
        if self.hidden_11D is None or room < 1:
            symbols = [self._fill()]
        else:
            most = self.num_drafts + 1 if self.draft == "offsets" else self.num_drafts
            symbols = self._speculate(min(most, room, limit))
        self.context += symbols
        self.statistics.characters += len(symbols)
        return symbols

    def _fill(self) -> int:
        """Read the prompt, or the newer half of a full context again."""
        context_length = self.reader.config.context_length
        if len(self.context) > context_length:
            self.context = self.context[-default_stride(context_length) :]
        self.cache.lengths.zero_()
        self.num_exact = len(self.context)
        return self._read_plainly(self.context)

    def _read_plainly(self, ids: list[int]) -> int:
        """Read `ids` in one pass as plain generation does; returns the symbol that follows."""
        self.hidden_11D = self.reader.read([ids], self.cache, num_last=1)
        self.statistics.passes += 1
        logits_1V = self.reader.logits(self.hidden_11D)[0, :, 0]
        (symbol,), _ = self.sampling.choose(logits_1V, self.generator)
        return symbol

    def _speculate(self, num_positions: int) -> list[int]:
        start = len(self.context) - 1
        draft = self._draft_by_offsets if self.draft == "offsets" else self._draft_by_exit
        drafts, chances_KV, hidden_1PD = draft(num_positions)
        logits_PV = self.reader.logits(hidden_1PD)[0, :, 0]
        if self.sampling.is_greedy:
            symbols, num_certain = accept_likeliest(logits_PV, drafts, self.near_tie)
        else:
            symbols = accept(self.sampling.distribution(logits_PV), drafts, chances_KV, self.generator)
            num_certain = len(symbols)
        self.statistics.passes += 1
        if num_certain < len(symbols):
            symbols = symbols[:num_certain]
            symbols.append(self._reread([*self.context, *symbols]))
        else:
            self.cache.lengths.fill_(start + len(symbols))  # forget what was rejected
            self.hidden_11D = hidden_1PD[:, len(symbols) - 1 : len(symbols)]
        self.statistics.drafted += len(drafts)
        self.statistics.accepted += _num_leading(map(eq, drafts, symbols))
        return symbols

    def _draft_by_offsets(self, num_positions: int) -> tuple[list[int], Tensor | None, Tensor]:
        """Drafts, their distributions [K, V] if they were drawn, and hidden states."""
        offsets = range(2, self.num_drafts + 2)  # from one symbol before the newest
        logits_KV = self.reader.logits(self.hidden_11D, offsets=offsets)[0, 0]
        logits_KV = logits_KV[: num_positions - 1]
        drafts, chances_KV = self.sampling.choose(logits_KV, self.generator)
        hidden_1PD = self.reader.read([[self.context[-1], *drafts]], self.cache)
        return drafts, chances_KV, hidden_1PD

    def _draft_by_exit(self, num_positions: int) -> tuple[list[int], Tensor | None, Tensor]:
        """As `_draft_by_offsets`; the layers above the exit read all drafts at once."""
        symbols = [self.context[-1]]
        chances, states = [], []
        for _ in range(num_positions):
            states.append(self.reader.read([symbols[-1:]], self.cache, layer=self.draft))
            logits_1V = self.reader.logits(states[-1], self.draft)[0, :, 0]
            (symbol,), chances_1V = self.sampling.choose(logits_1V, self.generator)
            symbols.append(symbol)
            chances.append(chances_1V)
        self.cache.lengths -= num_positions
        hidden_1PD = self.reader.run_from(torch.cat(states, dim=1), self.draft, self.cache)
        chances_KV = None if chances[0] is None else torch.cat(chances)
        return symbols[1:], chances_KV, hidden_1PD

    def _reread(self, ids: list[int]) -> int:
        """The symbol after `ids`, as plain generation decides it."""
        self.cache.lengths.fill_(self.num_exact)
        for symbol_id in ids[self.num_exact :]:
            symbol = self._read_plainly([symbol_id])
        self.num_exact = len(ids)
        return symbol


def choose_num_drafts(reader: Reader, draft: Draft, num_draft_tokens: int | None) -> int:
    """`num_draft_tokens`, or a default; UserError if it is too large, or heads are lacking."""
    last = reader.config.num_layers
    most: dict[Draft, int] = {}
    if num_extra := sum(layer == last and offset > 1 for layer, offset in reader.heads.pairs):
        most["offsets"] = num_extra
    for layer, offset in reader.heads.pairs:
        if offset == 1 and layer < last:
            most[layer] = reader.config.context_length
    if draft not in most:
        sources = ", ".join(map(str, most))
        way_out = f"draft from {sources}" if most else "generate without drafts"
        raise UserError(f"draft={draft}: the model has no such head; {way_out}", "draft")
    if num_draft_tokens is None:
        return num_extra if draft == "offsets" else min(EXIT_DRAFT_TOKENS, most[draft])
    if num_draft_tokens > most[draft]:
        problem = f"num_draft_tokens={num_draft_tokens}: must be at most {most[draft]}"
        raise UserError(f"{problem} from this source", "num_draft_tokens")
    return num_draft_tokens


def accept(
    probabilities_PV: Tensor, drafts: list[int], chances_KV: Tensor, generator: torch.Generator | None = None
) -> list[int]:
    """The symbols that a pass adds: the accepted drafts, and one more if it is predicted.

    A draft drawn with chance q whose probability is p is accepted with chance min(1, p / q), and the first
    rejected one replaced by a draw from the positive part of p - q: all follow p (Leviathan et al. 2023).

    Args:
        probabilities_PV: the model's, from the symbol before the first draft on.
        chances_KV: the distributions that the drafts were drawn from.
    """
    drafts_K1 = torch.tensor(drafts, dtype=torch.long)[:, None]
    uniform_K = torch.rand((len(drafts),), dtype=torch.float64, generator=generator)
    own_K = probabilities_PV[: len(drafts)].gather(1, drafts_K1)[:, 0]
    chances_K = chances_KV.gather(1, drafts_K1)[:, 0]
    kept = _num_leading((uniform_K * chances_K < own_K).tolist())
    if kept == len(probabilities_PV):
        return drafts
    weights_V = probabilities_PV[kept]
    if kept < len(drafts):
        rest_V = (weights_V - chances_KV[kept]).clamp_(min=0)
        if rest_V.any():  # p and q can differ by rounding alone
            weights_V = rest_V
    return [*drafts[:kept], int(draw(weights_V, generator))]


def accept_likeliest(logits_PV: Tensor, drafts: list[int], near_tie: float) -> tuple[list[int], int]:
    """`accept` for greedy text, and how many symbols come before the first near tie."""
    best_P2, symbols_P2 = logits_PV.topk(min(2, logits_PV.shape[-1]))
    symbols = symbols_P2[:, 0].tolist()
    symbols = symbols[: _num_leading(map(eq, drafts, symbols)) + 1]
    gaps_P = best_P2[:, 0] - best_P2[:, -1]
    bound = near_tie * float(logits_PV.abs().max())
    return symbols, _num_leading(gap > bound for gap in gaps_P.tolist()[: len(symbols)])


def _num_leading(flags: Iterable[bool]) -> int:
    """The number of flags before the first that is false."""
    return (*flags, False).index(False)
