"""Text written several symbols at a time: cheap drafts, which the whole model verifies in one pass.

The drafts come from the model itself: from the last layer's heads for the symbols after the next (Gloeckle et al. 2024,
"Better & Faster Large Language Models via Multi-token Prediction", after Stern et al. 2018, blockwise parallel
decoding), or from an exit, the layers up to it and its head (Elhoushi et al. 2024, LayerSkip).

Shapes: P positions of a pass, K drafts, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from charlm.config import UserError
from charlm.inference.cached import logits_after, read, read_last
from charlm.inference.sampling import Sampling, draw
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import exact_matmul
from charlm.runs.load import TrainedModel

Draft = Literal["offsets"] | int
"""Where drafts come from: the last layer's heads for offsets 2, 3, ..., or the exit at this layer."""
EXIT_DRAFT_TOKENS = 5
NEAR_TIE = 2e-6
"""Per layer: two logits that differ by less than this share of the largest may change places when a symbol is read
together with others, as products of other shapes add in another order. On a trained model of 6 layers a logit moves by
2e-7 of the largest per layer at most, and about one symbol in 8,000 is in doubt."""


@dataclass
class DraftStatistics:
    """What drafts were good for; counted while a text is written."""

    num_draft_tokens: int = 0
    """The most that were drafted before a pass."""
    characters: int = 0
    """Symbols written."""
    passes: int = 0
    """Passes of the whole model that it took, that over the prompt among them. Plain generation takes one a symbol."""
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted symbols that stayed."""
        return self.accepted / max(1, self.drafted)

    @property
    def characters_per_pass(self) -> float:
        return self.characters / max(1, self.passes)


class Proposal(NamedTuple):
    """Drafts, and what the whole model makes of the positions before them."""

    symbols: list[int]
    """K of them."""
    chances_KV: Tensor | None
    """The distributions that they were drawn from; None where the likeliest were taken."""
    hidden_1PD: Tensor
    """The last layer's hidden states at the newest symbol and the drafts: P is K + 1, or K if the last was not read."""


class Drafter(Protocol):
    """A way to drafts."""

    num_draft_tokens: int
    """The most symbols drafted before a pass."""
    num_positions: int
    """The most positions of a pass."""

    def __call__(self, hidden_11D: Tensor, newest: int, num_positions: int, cache: KVCache) -> Proposal:
        """Draft what follows `newest`, the one symbol that the cache lacks, and read `num_positions` into the cache,
        `newest` first. `hidden_11D` is the last layer's at the symbol before `newest`."""


class OffsetDrafts:
    """The heads that, one symbol ago, predicted what follows the newest."""

    def __init__(self, trained: TrainedModel, num_draft_tokens: int, chooser: "Chooser"):
        self.trained, self.chooser = trained, chooser
        self.num_draft_tokens, self.num_positions = num_draft_tokens, num_draft_tokens + 1
        self.layer = trained.config.model.num_layers

    def __call__(self, hidden_11D: Tensor, newest: int, num_positions: int, cache: KVCache) -> Proposal:
        logits_KV = self.trained.heads(hidden_11D, self.layer, range(2, self.num_positions + 1))[0, 0]
        symbols, chances_KV = self.chooser(logits_KV[: num_positions - 1].cpu())
        return Proposal(symbols, chances_KV, read(self.trained, [[newest, *symbols]], cache, layer=self.layer))


class ExitDrafts:
    """The model up to a layer, symbol by symbol; the layers above then take all positions at once."""

    def __init__(self, trained: TrainedModel, layer: int, num_draft_tokens: int, chooser: "Chooser"):
        self.trained, self.chooser, self.layer = trained, chooser, layer
        self.num_draft_tokens = self.num_positions = num_draft_tokens

    def __call__(self, hidden_11D: Tensor, newest: int, num_positions: int, cache: KVCache) -> Proposal:
        symbols, chances, states = [newest], [], []
        for _ in range(num_positions):
            states.append(read(self.trained, [symbols[-1:]], cache, layer=self.layer))
            logits_1V = self.trained.heads(states[-1], self.layer)[0, :, 0].cpu()
            (symbol,), chances_1V = self.chooser(logits_1V)
            symbols.append(symbol)
            chances.append(chances_1V)
        cache.lengths -= num_positions
        with exact_matmul(self.trained.device, num_positions):
            hidden_1PD = self.trained.transformer.resume(torch.cat(states, dim=1), self.layer, cache)
        return Proposal(symbols[1:], None if chances[0] is None else torch.cat(chances), hidden_1PD)


@dataclass(frozen=True)
class Chooser:
    """Draws drafts."""

    sampling: Sampling
    generator: torch.Generator

    def __call__(self, logits_KV: Tensor) -> tuple[list[int], Tensor | None]:
        """A symbol of each row, and the distributions they were drawn from, if they were."""
        if self.sampling.is_greedy:
            return logits_KV.argmax(dim=-1).tolist(), None
        chances_KV = self.sampling.distribution(logits_KV)
        return draw(chances_KV, self.generator).tolist(), chances_KV


def build_drafter(
    trained: TrainedModel, draft: Draft, num_draft_tokens: int | None, sampling: Sampling, generator: torch.Generator
) -> Drafter:
    """The way to drafts that `draft` names.

    Raises:
        UserError: the model lacks the heads, or `num_draft_tokens` is out of range.
    """
    chooser = Chooser(sampling, generator)
    last = trained.config.model.num_layers
    exits = [layer for layer, offset in trained.heads.pairs if offset == 1 and layer < last]
    num_extra = sum(layer == last and offset > 1 for layer, offset in trained.heads.pairs)
    if draft == "offsets":
        if not num_extra:
            raise UserError(
                "draft=offsets: the run trained no head for symbols after the next (aux.targets.num_targets of 2 or "
                f"more); {_ways(exits)}"
            )
        return OffsetDrafts(trained, _checked(num_draft_tokens, num_extra, num_extra, "the run's heads"), chooser)
    if draft not in exits:
        raise UserError(f"draft={draft}: this run has no exit at such a layer; {_ways(exits, num_extra)}")
    most = trained.config.model.context_length
    default = min(EXIT_DRAFT_TOKENS, most)
    return ExitDrafts(trained, draft, _checked(num_draft_tokens, default, most, "the context"), chooser)


def _ways(exits: Sequence[int], num_extra: int = 0) -> str:
    ways = [*(["offsets"] if num_extra else []), *map(str, exits)]
    return f"draft from {', '.join(ways)}" if ways else "it can draft from nothing; write without drafts"


def _checked(num_draft_tokens: int | None, default: int, most: int, limit: str) -> int:
    if num_draft_tokens is not None and not 1 <= num_draft_tokens <= most:
        raise UserError(f"num_draft_tokens={num_draft_tokens}: must lie between 1 and {most} ({limit})")
    return num_draft_tokens or default


def accept(
    probabilities_PV: Tensor, drafts: list[int], chances_KV: Tensor, generator: torch.Generator | None = None
) -> list[int]:
    """The symbols that a pass adds: those drafts that stay, and a last one of the model's own if it knows one.

    A draft that was drawn with chance q and has probability p stays with chance min(1, p / q). In place of the first
    that does not, one is drawn from the positive part of p - q, normalised. So all follow p exactly, however good the
    drafts (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023).

    Args:
        probabilities_PV: the model's, at the symbol before the first draft and at the drafts: K or K + 1 rows.
        drafts: K symbols.
        chances_KV: the distributions that they were drawn from.
    """
    drafts_K1 = torch.tensor(drafts, dtype=torch.long)[:, None]
    uniform_K = torch.rand((len(drafts),), dtype=torch.float64, generator=generator)
    own_K = probabilities_PV[: len(drafts)].gather(1, drafts_K1)[:, 0]
    stays = (uniform_K * chances_KV.gather(1, drafts_K1)[:, 0] < own_K).tolist()
    kept = (*stays, False).index(False)
    if kept == len(probabilities_PV):
        return drafts
    weights_V = probabilities_PV[kept]
    if kept < len(drafts):
        rest_V = (weights_V - chances_KV[kept]).clamp_(min=0)
        weights_V = rest_V if rest_V.any() else weights_V  # p and q can be the same but for rounding
    return [*drafts[:kept], int(draw(weights_V, generator))]


def accept_likeliest(logits_PV: Tensor, drafts: list[int], near_tie: float) -> tuple[list[int], int | None]:
    """As `accept` where the likeliest symbol is always taken, and the place of the first that is in doubt: the two
    likeliest logits are no further apart than this share of the largest."""
    best_P2, symbols_P2 = logits_PV.topk(min(2, logits_PV.shape[-1]))
    symbols = symbols_P2[:, 0].tolist()
    kept = 0
    while kept < min(len(drafts), len(symbols)) and drafts[kept] == symbols[kept]:
        kept += 1
    symbols = symbols[: kept + 1]
    gaps_P, bound = best_P2[:, 0] - best_P2[:, -1], near_tie * float(logits_PV.abs().max())
    certain = [gap > bound for gap in gaps_P.tolist()[: len(symbols)]]
    return symbols, None if all(certain) else certain.index(False)


class Speculation:
    """One text that is being written with drafts.

    Where the likeliest symbol is always taken, the text is that of plain generation to the last symbol. That takes
    care: symbols that are read together have logits a few units in the last place from those that each has alone.
    Wherever the two likeliest are too close to tell in spite of that, the symbols since the last that was read as plain
    generation reads it are read again in its way, one at a time, and so none more than once.
    """

    def __init__(
        self,
        trained: TrainedModel,
        prompt: Sequence[int],
        drafter: Drafter,
        sampling: Sampling,
        generator: torch.Generator,
        statistics: DraftStatistics,
    ):
        self.trained, self.drafter, self.sampling = trained, drafter, sampling
        self.generator, self.statistics = generator, statistics
        self.chooser = Chooser(sampling, generator)
        self.near_tie = NEAR_TIE * trained.config.model.num_layers
        self.context = list(prompt)
        """What the model sees: all symbols, or those since the older half was last forgotten."""
        self.cache = KVCache(trained.config.model, 1, trained.device)
        """Holds all of `context` but its newest symbol."""
        self.hidden_11D: Tensor | None = None
        """The last layer's at the newest position in the cache; None before anything was read."""
        self.num_exact = 0
        """Positions at the beginning of the cache that were read as plain generation reads them."""

    @torch.inference_mode()
    def advance(self, limit: int) -> list[int]:
        """The next symbols, at least one and at most `limit`, from one pass (and more where one is in doubt)."""
        context_length = self.trained.config.model.context_length
        if self.hidden_11D is None or len(self.context) > context_length:
            symbols = self._fill(context_length)
        else:
            symbols = self._speculate(min(self.drafter.num_positions, context_length + 1 - len(self.context), limit))
        self.context += symbols
        self.statistics.characters += len(symbols)
        return symbols

    def _fill(self, context_length: int) -> list[int]:
        """Read the prompt, or again the newest half of a full context."""
        if len(self.context) > context_length:
            self.context = self.context[-max(1, context_length // 2) :]
        self.cache.reset()
        self.num_exact = len(self.context)
        return [self._read_plainly(self.context)]

    def _read_plainly(self, ids: list[int]) -> int:
        """Read `ids` in one pass as plain generation does; the symbol that follows."""
        self.hidden_11D = read_last(self.trained, [ids], self.cache)
        self.statistics.passes += 1
        (symbol,), _ = self.chooser(logits_after(self.trained, self.hidden_11D))
        return symbol

    def _speculate(self, num_positions: int) -> list[int]:
        start = len(self.context) - 1
        proposal = self.drafter(self.hidden_11D, self.context[-1], num_positions, self.cache)
        logits_PV = self.trained.heads(proposal.hidden_1PD, self.trained.config.model.num_layers)[0, :, 0].cpu()
        doubtful = None
        if self.sampling.is_greedy:
            symbols, doubtful = accept_likeliest(logits_PV, proposal.symbols, self.near_tie)
        else:
            probabilities_PV = self.sampling.distribution(logits_PV)
            symbols = accept(probabilities_PV, proposal.symbols, proposal.chances_KV, self.generator)
        self.statistics.passes += 1
        if doubtful is not None:
            symbols = [*symbols[:doubtful], self._reread([*self.context, *symbols[:doubtful]])]
        else:
            self.cache.lengths.fill_(start + len(symbols))  # what the model did not accept is forgotten
            self.hidden_11D = proposal.hidden_1PD[:, len(symbols) - 1 : len(symbols)]
        self.statistics.drafted += len(proposal.symbols)
        kept = [draft == symbol for draft, symbol in zip(proposal.symbols, symbols, strict=False)]
        self.statistics.accepted += (*kept, False).index(False)
        return symbols

    def _reread(self, ids: list[int]) -> int:
        """The symbol after `ids`, beyond doubt."""
        self.cache.lengths.fill_(self.num_exact)
        for symbol_id in ids[self.num_exact :]:
            symbol = self._read_plainly([symbol_id])
        self.num_exact = len(ids)
        return symbol
