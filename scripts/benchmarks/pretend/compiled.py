"""What a function would ask of a device if it were compiled.

Between products and attention, operations on the same tensors become one kernel. It reads what others made once, and
writes only what others read or what is still alive at the end, as for the backward pass. Sums over positions stay as
they are; those of a layer norm's backward pass read its inputs once more. Compilers keep less for the backward pass
than is counted here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._functorch import config as functorch
from torch.utils._pytree import tree_flatten, tree_unflatten

ALONE = ("mm", "attention", "embedding", "sum", "index")
"""Parts of names of operations that join no other."""


@dataclass
class Operation:
    """One of a region, with the storages that it reads and writes, by serial number, and their bytes."""

    name: str
    work: Any
    reads: dict[int, int]
    writes: dict[int, int]

    @property
    def is_alone(self) -> bool:
        return any(part in self.name for part in ALONE)


@dataclass
class Region:
    """Operations that are compiled together."""

    operations: list[Operation] = field(default_factory=list)

    def kernels(self, alive: set[int]) -> Iterator[tuple[str, Any, int]]:
        """Name, work and bytes moved of each kernel, in order."""
        readers = Counter(key for operation in self.operations for key in operation.reads)
        run: list[list[Operation]] = []
        for operation in [*self.operations, None]:
            if operation is None or operation.is_alone:
                for group in run:
                    yield self._fused(group, readers, alive)
                run = []
                if operation is not None:
                    yield operation.name, operation.work, operation.work.moved
                continue
            own = operation.reads.keys() | operation.writes.keys()
            touched = [group for group in run if any(own & (o.reads.keys() | o.writes.keys()) for o in group)]
            run = [group for group in run if group not in touched]
            run.append([*(o for group in touched for o in group), operation])
            if "layer_norm_backward" in operation.name:
                yield "fused", operation.work, sum(operation.reads.values())

    @staticmethod
    def _fused(group: list[Operation], readers: Counter, alive: set[int]) -> tuple[str, Any, int]:
        inside = Counter(key for operation in group for key in operation.reads)
        made: dict[int, int] = {}
        moved = 0
        read: dict[int, int] = {}
        for operation in group:
            for key, size in operation.reads.items():
                if key not in made:
                    read[key] = max(size, read.get(key, 0))
            made |= operation.writes
        moved = sum(read.values())
        moved += sum(size for key, size in made.items() if key in alive or readers[key] > inside[key])
        return "fused", group[0].work, moved


class _Compiled(torch.autograd.Function):
    """Runs a function with a graph of its own, so that its backward pass is a region, too."""

    @staticmethod
    def forward(ctx, meter: Any, call: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.meter, ctx.retains = meter, not functorch.donated_buffer
        ctx.inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad(), meter.region():
            outputs = call(*ctx.inputs)
        ctx.edges = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]  # outputs may be freed
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for tensor in ctx.inputs:
            tensor.grad = None
        with ctx.meter.region():
            torch.autograd.backward(ctx.edges, gradients, retain_graph=ctx.retains)
        found = [tensor.grad for tensor in ctx.inputs]
        for tensor in ctx.inputs:
            tensor.grad = None
        if not ctx.retains:
            ctx.edges = ctx.inputs = None
        return None, None, *found


def compiled(meter: Any, function: Callable) -> Callable:
    """`function`, whose work is counted as if it were compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            with meter.region():
                return function(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        where = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

        def inner(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for number, tensor in zip(where, inputs, strict=True):
                leaves[number] = tensor
            arguments, options = tree_unflatten(leaves, spec)
            return (function(*arguments, **options),)

        return _Compiled.apply(meter, inner, *(leaves[number] for number in where))[0]

    return call


@contextmanager
def joined(meter: Any) -> Iterator[None]:
    """Inside, operations count as one region."""
    before, meter.current = meter.current, Region()
    try:
        yield
    finally:
        region, meter.current = meter.current, before
        meter.commit(region)
