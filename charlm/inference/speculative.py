"""Writing several symbols per pass of the model: cheap drafts, which the whole model verifies at once.

The drafts come from the model itself: from the last layer's heads for the symbols after the next (Gloeckle et al. 2024,
"Better & Faster Large Language Models via Multi-token Prediction", after Stern et al. 2018, blockwise parallel
decoding), or from an exit, that is the layers up to it and its head (Elhoushi et al. 2024, LayerSkip).

Shapes: P positions of a pass, K drafts, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from charlm.config import UserError
from charlm.inference.sampling import Sampling, draw
from charlm.inference.stepping import logits_after, read
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import exact_matmul
from charlm.runs.trained import TrainedModel

Draft = Literal["offsets"] | int
"""Source of drafts: the last layer's heads for offsets 2, 3, ..., or the exit at this layer."""
EXIT_DRAFT_TOKENS = 5
NEAR_TIE = 2e-6
"""Per layer. Two logits that differ by less than this share of the largest may change places when a symbol is read
together with others, because products of other shapes add in another order. In a trained model of 6 layers a logit
moves by at most 2e-7 of the largest per layer, and about one symbol in 8,000 is too close to call."""


@dataclass
class DraftStatistics:
    """How useful the drafts were; counted while a text is written."""

    num_draft_tokens: int = 0
    """The most symbols that were drafted before a pass."""
    characters: int = 0
    """Symbols written."""
    passes: int = 0
    """Passes of the whole model, including the one over the prompt. Plain generation takes one per symbol."""
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted symbols that were accepted."""
        return self.accepted / max(1, self.drafted)

    @property
    def characters_per_pass(self) -> float:
        return self.characters / max(1, self.passes)


class Proposal(NamedTuple):
    """Drafts, and the whole model's hidden states at the positions that verify them."""

    symbols: list[int]
    """K drafts."""
    chances_KV: Tensor | None
    """The distributions that they were drawn from; None where the likeliest were taken."""
    hidden_1PD: Tensor
    """The last layer's at the newest symbol and the drafts: P is K + 1, or K if the last draft was not read."""


class OffsetDrafter:
    """Drafts from the last layer's heads for offsets 2, 3, ..., which predicted these symbols one symbol ago."""

    def __init__(self, trained: TrainedModel, num_draft_tokens: int, sampling: Sampling, generator: torch.Generator):
        self.trained, self.sampling, self.generator = trained, sampling, generator
        self.num_draft_tokens, self.num_positions = num_draft_tokens, num_draft_tokens + 1

    def __call__(self, hidden_11D: Tensor, newest: int, num_positions: int, cache: KVCache) -> Proposal:
        """Draft the symbols after `newest`, which the cache lacks, and read `num_positions` of them into the cache.

        Args:
            hidden_11D: the last layer's at the symbol before `newest`.
            num_positions: `newest` is the first of them; at most `self.num_positions`.
        """
        last = self.trained.config.model.num_layers
        logits_KV = self.trained.heads(hidden_11D, last, range(2, self.num_positions + 1))[0, 0]
        symbols, chances_KV = self.sampling.choose(logits_KV[: num_positions - 1].cpu(), self.generator)
        return Proposal(symbols, chances_KV, read(self.trained, [[newest, *symbols]], cache))


class ExitDrafter:
    """Drafts from the layers up to an exit, symbol by symbol; the layers above then read all positions at once."""

    def __init__(
        self,
        trained: TrainedModel,
        layer: int,
        num_draft_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        self.trained, self.layer, self.sampling, self.generator = trained, layer, sampling, generator
        self.num_draft_tokens = self.num_positions = num_draft_tokens

    def __call__(self, hidden_11D: Tensor, newest: int, num_positions: int, cache: KVCache) -> Proposal:
        """As `OffsetDrafter`."""
        symbols, chances, states = [newest], [], []
        for _ in range(num_positions):
            states.append(read(self.trained, [symbols[-1:]], cache, layer=self.layer))
            logits_1V = self.trained.heads(states[-1], self.layer)[0, :, 0].cpu()
            (symbol,), chances_1V = self.sampling.choose(logits_1V, self.generator)
            symbols.append(symbol)
            chances.append(chances_1V)
        cache.lengths -= num_positions
        with exact_matmul(self.trained.device, num_positions):
            hidden_1PD = self.trained.transformer.resume(torch.cat(states, dim=1), self.layer, cache)
        return Proposal(symbols[1:], None if chances[0] is None else torch.cat(chances), hidden_1PD)


Drafter = OffsetDrafter | ExitDrafter


def build_drafter(
    trained: TrainedModel, draft: Draft, num_draft_tokens: int | None, sampling: Sampling, generator: torch.Generator
) -> Drafter:
    """The drafter for a source.

    Raises:
        UserError: the model lacks the heads, or `num_draft_tokens` is out of range.
    """
    last = trained.config.model.num_layers
    exits = [layer for layer, offset in trained.heads.pairs if offset == 1 and layer < last]
    num_extra = sum(layer == last and offset > 1 for layer, offset in trained.heads.pairs)
    sources = ", ".join([*(["offsets"] if num_extra else []), *map(str, exits)])
    way_out = f"draft from {sources}" if sources else "it has none to draft from; generate without drafts"
    if draft == "offsets" and not num_extra:
        raise UserError(
            "draft=offsets: the run trained no head for symbols after the next (aux.targets.num_targets of 2 or more); "
            f"{way_out}"
        )
    if draft != "offsets" and draft not in exits:
        raise UserError(f"draft={draft}: this run has no exit at such a layer; {way_out}")
    most = num_extra if draft == "offsets" else trained.config.model.context_length
    if num_draft_tokens is None:
        num_draft_tokens = most if draft == "offsets" else min(EXIT_DRAFT_TOKENS, most)
    elif not 1 <= num_draft_tokens <= most:
        limit = "the run's heads" if draft == "offsets" else "the context"
        raise UserError(f"num_draft_tokens={num_draft_tokens}: must lie between 1 and {most} ({limit})")
    if draft == "offsets":
        return OffsetDrafter(trained, num_draft_tokens, sampling, generator)
    return ExitDrafter(trained, draft, num_draft_tokens, sampling, generator)


def accept(
    probabilities_PV: Tensor, drafts: list[int], chances_KV: Tensor, generator: torch.Generator | None = None
) -> list[int]:
    """The symbols that a pass adds: the accepted drafts, and one drawn from the model if it predicts one more.

    A draft that was drawn with chance q and has probability p is accepted with chance min(1, p / q). In place of the
    first rejected one, a symbol is drawn from the positive part of p - q, normalised. So all symbols follow p exactly,
    however good the drafts (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et
    al. 2023).

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
        weights_V = rest_V if rest_V.any() else weights_V  # p and q can differ by rounding alone
    return [*drafts[:kept], int(draw(weights_V, generator))]


def accept_likeliest(logits_PV: Tensor, drafts: list[int], near_tie: float) -> tuple[list[int], int | None]:
    """`accept` for the case that the likeliest symbol is always taken.

    Also returns the index of the first symbol that is too close to call, whose two likeliest logits differ by no more
    than the share `near_tie` of the largest logit; None if there is none.
    """
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
    """A text that is being written with drafts.

    Where the likeliest symbol is always taken, the text equals that of plain generation. Symbols read together have
    logits that differ in the last bits from those of symbols read alone, so when the top two are too close to call, the
    symbols since the last exact position are read again one at a time; none is read again more than once.
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
        self.near_tie = NEAR_TIE * trained.config.model.num_layers
        self.context = list(prompt)
        """All symbols that the model sees; the older half is forgotten when it exceeds the context."""
        self.cache = KVCache(trained.config.model, 1, trained.device)
        """Holds all of `context` but its newest symbol."""
        self.hidden_11D: Tensor | None = None
        """The last layer's at the newest position in the cache; None before anything was read."""
        self.num_exact = 0
        """Positions from the beginning of the cache that were read one at a time, or with the prompt."""

    @torch.inference_mode()
    def advance(self, limit: int) -> list[int]:
        """The next symbols, at least one and at most `limit`, from one pass, or more if one is too close to call."""
        context_length = self.trained.config.model.context_length
        if self.hidden_11D is None or len(self.context) > context_length:
            symbols = self._fill(context_length)
        else:
            symbols = self._speculate(min(self.drafter.num_positions, context_length + 1 - len(self.context), limit))
        self.context += symbols
        self.statistics.characters += len(symbols)
        return symbols

    def _fill(self, context_length: int) -> list[int]:
        """Read the prompt, or the newest half of a full context again."""
        if len(self.context) > context_length:
            self.context = self.context[-max(1, context_length // 2) :]
        self.cache.reset()
        self.num_exact = len(self.context)
        return [self._read_plainly(self.context)]

    def _read_plainly(self, ids: list[int]) -> int:
        """Read `ids` in one pass as plain generation does; returns the symbol that follows."""
        self.hidden_11D = read(self.trained, [ids], self.cache, num_last=1)
        self.statistics.passes += 1
        (symbol,), _ = self.sampling.choose(logits_after(self.trained, self.hidden_11D)[0], self.generator)
        return symbol

    def _speculate(self, num_positions: int) -> list[int]:
        start = len(self.context) - 1
        proposal = self.drafter(self.hidden_11D, self.context[-1], num_positions, self.cache)
        logits_PV = logits_after(self.trained, proposal.hidden_1PD)[0]
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
            self.cache.lengths.fill_(start + len(symbols))  # forget what was rejected
            self.hidden_11D = proposal.hidden_1PD[:, len(symbols) - 1 : len(symbols)]
        self.statistics.drafted += len(proposal.symbols)
        kept = [draft == symbol for draft, symbol in zip(proposal.symbols, symbols, strict=False)]
        self.statistics.accepted += (*kept, False).index(False)
        return symbols

    def _reread(self, ids: list[int]) -> int:
        """The symbol after `ids`, as plain generation decides it."""
        self.cache.lengths.fill_(self.num_exact)
        for symbol_id in ids[self.num_exact :]:
            symbol = self._read_plainly([symbol_id])
        self.num_exact = len(ids)
        return symbol
