"""The optimizer of n-gram tables: it moves the rows that a batch has read, with little state for them.

Shapes: N rows of a table, R of them read, W columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

ROW_STATE = "mean_square"
"""Key of its state, which has one number for each row."""


class RowwiseRMS(Optimizer):
    """Moves the rows with a gradient, each by its gradient over the root of a mean square, one number a row.

    That is row-wise AdaGrad (Naumov et al. 2019), but with the running mean of RMSprop, which begins with
    the first gradient of the row. Of a dense gradient these are the rows that are not zero, at most
    `most_rows`; then the host never waits for a GPU. Makes no step if `found_inf`, a number on the device, is 1.
    """

    def __init__(self, groups: list[dict[str, Any]], most_rows: int | None = None, beta: float = 0.9):
        super().__init__(groups, {"beta": beta, "eps": 1e-8, "most_rows": most_rows, "fused": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, group)

    def _move(self, table: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if ROW_STATE not in state:
            state.clear()  # runs of earlier versions have Adam's moments here
            state[ROW_STATE] = torch.zeros_like(table[:, :1])
        rows_R, gradients_RW, moves_R1 = _rows_read(table.grad, group["most_rows"])
        moves_R1 = moves_R1 & (getattr(self, "found_inf", 0) == 0)
        old_R1 = state[ROW_STATE].index_select(0, rows_R)
        squares_R1 = gradients_RW.square().mean(dim=1, keepdim=True)
        squares_R1 = torch.where(old_R1 == 0, squares_R1, old_R1.lerp(squares_R1, 1 - group["beta"]))
        state[ROW_STATE].index_copy_(0, rows_R, torch.where(moves_R1, squares_R1, old_R1))
        moves_RW = gradients_RW * (-group["lr"] / (squares_R1.sqrt() + group["eps"]))
        table.index_add_(0, rows_R, torch.where(moves_R1, moves_RW, 0.0))


def _rows_read(gradient: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a table without repetition, [R], their gradients, [R, W], and whether they were read, [R, 1]."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        (rows_R,) = gradient.indices()
        return rows_R, gradient.values(), torch.ones_like(rows_R, dtype=torch.bool)[:, None]
    read_N, rows_N = gradient.any(dim=1).byte().sort(descending=True)
    rows_R = rows_N[:most]
    return rows_R, gradient[rows_R], read_N[:most, None].bool()
