"""The loss of a batch of windows, from the table of terms.

Shapes: B batch, T positions, D d_model, K offsets, W characters of a window (T + the largest offset).
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from charlm.config import CrossEntropyBackend
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.cross_entropy import linear_cross_entropy, loss_chain
from charlm.objective.hedge import Hedge
from charlm.objective.schedules import intervals
from charlm.objective.tasks import named_in_errors
from charlm.objective.terms import Rows, Term, active_by_layer


class LossReport(NamedTuple):
    """The losses of one batch, in nats per character."""

    total: Tensor
    """The weighted sum of the active terms, which training minimises."""
    parts: dict[str, Tensor]
    """Each active term's own loss by name, unweighted and detached."""
    by_layer: dict[int, Tensor]
    """Each layer's share of the total, differentiable like it."""


def head_pairs(terms: Sequence[Term], num_layers: int) -> set[tuple[int, int]]:
    """The (layer, offset) pairs that need a head, with the one that predicts after training."""
    trained = {(term.layer, term.offset) for term in terms if term.task is None}
    return trained | {(num_layers, 1)}


class Objective(nn.Module):
    """The transformer, its heads and the table of terms: from windows to their loss."""

    def __init__(
        self,
        transformer: CharTransformer,
        heads: Heads,
        terms: Sequence[Term],
        *,
        hedge: Hedge | None = None,
        tasks: nn.ModuleDict | None = None,
        cross_entropy: CrossEntropyBackend = "chunked",
    ):
        """`hedge` weighs the losses of its layers' heads; `tasks` are the user's own, by name."""
        super().__init__()
        self.transformer = transformer
        self.heads = heads
        self.terms = tuple(terms)
        self.hedge = hedge
        self.tasks = tasks
        self.cross_entropy = cross_entropy
        self.loss_chain = loss_chain
        self.longest_offset = max(offset for _, offset in heads.pairs)
        self.window_length = transformer.config.context_length + self.longest_offset

    def forward(self, windows_BW: Tensor, progress: float, layers: Collection[int] | None = None) -> LossReport:
        """The loss of `windows_BW` at `progress`, of all layers or only of `layers`.

        The first T characters of a window are the input; position t (0-based) predicts character
        t + offset: with T = 4 "abcdef" is read as "abcd", with the targets "bcde" at offset 1 and
        "cdef" at offset 2. Inactive rows and layers cost nothing.

        Raises ValueError for no input, more than `window_length`, or no active term.
        """
        width = windows_BW.shape[1]
        T = width - self.longest_offset
        if not 1 <= T <= self.transformer.config.context_length:
            raise ValueError(f"windows have {width} characters, not {self.window_length} or fewer")
        rows = self.active_rows(progress, layers)
        return self.losses(self.transformer(windows_BW[:, :T], rows), windows_BW, rows)

    def active_rows(self, progress: float, layers: Collection[int] | None = None) -> dict[int, Rows]:
        """The active terms by layer. Raises ValueError if there are none."""
        rows = active_by_layer(self.terms, progress)
        if layers is not None:
            rows = {layer: rows[layer] for layer in rows if layer in layers}
        if not rows:
            raise ValueError(f"every term has weight zero at progress {progress}")
        return rows

    def losses(self, hidden_states: Mapping[int, Tensor], windows_BW: Tensor, rows: Mapping[int, Rows]) -> LossReport:
        """The loss of `rows`, given the states of their layers, [B, T, D] each."""
        by_layer, parts = {}, {}
        for layer, layer_rows in rows.items():
            shares = []
            if predictions := [row for row in layer_rows if row[0].task is None]:
                share, losses = self._layer_losses(hidden_states[layer], windows_BW, predictions)
                shares.append(share if self.hedge is None else share * self.hedge.weight(layer))
                parts |= losses
            for term, weight in layer_rows:
                if term.task is not None:
                    with named_in_errors(term.task):
                        losses = self.tasks[term.task](hidden_states[layer], windows_BW)
                        loss = torch.as_tensor(losses).float().mean()
                    shares.append(weight * loss)
                    parts[term.name] = loss.detach()
            by_layer[layer] = reduce(torch.add, shares)
        return LossReport(torch.stack(list(by_layer.values())).sum(), parts, by_layer)

    def can_fall_silent(self) -> bool:
        """Whether some head learns nothing in some part of training."""
        middles = [(left + right) / 2 for left, right in intervals(*(term.weight for term in self.terms))]
        trained = {(term.layer, term.offset) for term in self.terms}
        silent = any(not term.weight(middle) for term in self.terms for middle in middles)
        return silent or not trained.issuperset(self.heads.pairs)

    def compile(self) -> None:
        """Compile each block for each shape, and the chain from logits to their gradient."""
        for block in self.transformer.blocks:
            block.compile(dynamic=False)
        self.loss_chain = torch.compile(loss_chain)

    def adapt(self, parts: Mapping[str, Tensor], skip: Tensor | None = None) -> None:
        """Adapt the hedge to an update's losses, means over all processes, unless `skip` is true.

        A layer is judged by its loss of the next character, at all positions if it has one.
        """
        losses: dict[int, Tensor] = {}
        for positions in ("last", "all"):  # the later wins
            rows = [term for term in self.terms if (term.offset, term.positions) == (1, positions)]
            losses |= {term.layer: parts[term.name] for term in rows if term.name in parts}
        self.hedge.adapt(losses, skip)

    def _layer_losses(self, hidden_BTD: Tensor, windows_BW: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        layer, hinge = rows[0][0].layer, rows[0][0].hinge
        offsets = sorted({term.offset for term, _ in rows})
        T = hidden_BTD.shape[1]
        first = 0 if any(term.positions == "all" for term, _ in rows) else T - 1
        by_offset = [windows_BW[:, first + offset : T + offset] for offset in offsets]
        targets_BTK = torch.stack(by_offset, dim=-1)
        places = [(0 if term.positions == "all" else -1, offsets.index(term.offset)) for term, _ in rows]
        weighed = tuple((*place, weight) for place, (_, weight) in zip(places, rows, strict=True))
        weights_BTK = _loss_weights(weighed, targets_BTK.shape, hidden_BTD.device)
        hidden, weight, bias = self.heads.classifiers(hidden_BTD[:, first:], layer, offsets)
        total, losses_NK = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            bias,
            targets_BTK.flatten(0, 1),
            weights_BTK.flatten(0, 1),
            self.cross_entropy,
            hinge,
            self.loss_chain,
        )
        losses_BTK = losses_NK.view_as(targets_BTK)
        named = zip((term.name for term, _ in rows), places, strict=True)
        return total, {name: losses_BTK[:, first:, index].mean() for name, (first, index) in named}


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training needs them, whoever asked first
def _loss_weights(rows: tuple[tuple[int, int, float], ...], shape: torch.Size, device: torch.device) -> Tensor:
    """The weight of each prediction, [B, T, K], by rows of first position, index of the offset, and weight."""
    weights_BTK = torch.zeros(shape, device=device)
    for first, index, weight in rows:
        share = weights_BTK[:, first:, index]
        share += weight / share.numel()
    return weights_BTK
