"""A pretended CUDA device, and a meter of the work that a program gives it.

Tensors are torch's fake ones on cuda:0: shapes, dtypes and devices are real, numbers are not. Mixed devices raise, as
on a GPU. Whatever makes the host wait is recorded with the lines of charlm that asked for it, and answered by 1.0, 0
or False. What stays on the CPU is computed for real.

Not known here: numbers, real times, which kernels cuBLAS and SDPA choose, and workspaces of kernels.
"""

import itertools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.pretend.guard import load_guard

load_guard()

import torch
import torch.distributed as dist
import torch.optim.optimizer as optimizer_module
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.pretend.compiled import Operation, Region, compiled, joined

aten = torch.ops.aten

BANDWIDTH = 2.85e12
"""Bytes per second of an H100 SXM that kernels reach."""
PRODUCTS = 600e12
"""FLOP per second of an H100 SXM that products in bf16 with an inner dimension of 512 reach, of its 989."""
ATTENTION = {"_scaled_dot_product_flash_attention": 450e12, "_scaled_dot_product_flash_attention_backward": 320e12}
KERNEL = 2e-6
"""The least seconds of a kernel."""
PAGE = 512
"""Bytes to which torch's allocator rounds."""
MEMORY = 80 * 2**30

NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach", "alias",
    "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_same_size", "_values", "_indices", "values", "indices",
    "_sparse_coo_tensor_unsafe", "_sparse_coo_tensor_with_dims_and_tensors", "record_stream", "is_pinned",
    "is_coalesced", "_is_coalesced", "_coalesced_", "sparse_dim", "dense_dim", "_nnz",
    "device", "dim", "numel", "size", "stride",
}  # fmt: skip
WAITS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal",
    "is_nonzero", "repeat_interleave", "bincount",
}  # fmt: skip
FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
WRITE_ONLY = {"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_"}
LOOKUPS = {"embedding", "gather", "index", "index_select"}
"""These read as much as they write, and the indices."""
KERNELS = {"native_layer_norm_backward": 2, "embedding_dense_backward": 4, "cumsum": 2, "sort": 4}
KERNELS |= {"_scaled_dot_product_flash_attention_backward": 3}
"""Of operations that launch more than one."""
TENSORS_AT_ONCE = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, CHUNKS_AT_ONCE = 65_536, 320
"""torch's multi_tensor_apply: tensors of a launch by the number of lists, elements of a chunk, chunks of a launch."""


@dataclass
class Work:
    """Work that the device was given in one phase."""

    kernels: int = 0
    moved: int = 0
    """Bytes read and written."""
    flops: int = 0
    seconds: float = 0.0
    """By roofline of each kernel."""

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(mine + others for mine, others in pairs))


@dataclass
class Record:
    """Everything that was counted since `Meter.reset`."""

    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    """By phase."""
    operations: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    """By phase and name of operation."""
    waits: Counter = field(default_factory=Counter)
    """Operation, and lines of charlm: the host waits for the device."""
    unpinned: Counter = field(default_factory=Counter)
    """Bytes, and lines of charlm: copies to the device from memory that is not pinned, which may wait, too."""
    peak: int = 0
    """Bytes."""


class Meter(TorchDispatchMode):
    """Counts kernels, bytes, FLOPs, memory and waits of everything below it."""

    def __init__(self, lacking: bool = False):
        super().__init__()
        self.lacking = lacking
        """Whether the device has no float64 and no fused optimizers, as Apple's; nor pinned memory."""
        self.phase = "build"
        self.live = 0
        """Bytes of all storages on the device."""
        self.compiled = 0
        """Functions that torch.compile was asked to compile."""
        self._storages: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._serials: dict[int, int] = {}
        """A number for each storage, whose address may have been another's."""
        self._pinned: set[int] = set()
        self.current: Region | None = None
        """Operations that are compiled together."""
        self.reset()

    def reset(self, phase: str | None = None) -> None:
        """Begin a new record."""
        self.phase = phase or self.phase
        self.record = Record(peak=self.live)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, work counts for `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def pin(self, tensor: Tensor) -> Tensor:
        """Take a tensor on the CPU for one in pinned memory."""
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def compile(self, function: Any) -> Any:
        """Count what torch.compile is asked for, which runs as it is, and its work as if it were compiled."""
        self.compiled += 1
        return function if dist.is_initialized() else compiled(self, function)  # shards have hooks inside

    def region(self) -> AbstractContextManager[None]:
        """Inside, work counts as if it were compiled."""
        return joined(self)

    def commit(self, region: Region) -> None:
        """Count the kernels of a region."""
        alive = {self._serials[key] for key in self._storages}
        for name, work, moved in region.kernels(alive):
            if name == "fused":
                work = Work(1, moved, 0, max(moved / BANDWIDTH, KERNEL))
            self._add(name, work)

    def coalesce(self, tensor: Tensor) -> Tensor:
        """What `Tensor.coalesce` waits for: the number of different rows. Fake sparse tensors have none."""
        self.record.waits[f"coalesce < {_lines()}"] += 1
        return tensor

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come here, too
        kwargs = dict(kwargs or {})
        name = operation._schema.name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if "c10d" in operation.namespace and any(tensor.is_sparse for tensor in tensors):
            raise RuntimeError(f"NCCL has no {name} of sparse tensors")
        on_device = any(tensor.device.type == "cuda" for tensor in tensors)
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        if not on_device and not to_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_cpu(operation, args, kwargs)
        if on_device and name in WAITS:
            self.record.waits[f"{name} < {_lines()}"] += 1
            if name in ("_local_scalar_dense", "item"):
                return _answer(tensors[0].dtype)
            if name == "nonzero":  # all of them
                return tensors[0].new_empty((tensors[0].numel(), tensors[0].ndim), dtype=torch.int64)
        if self.lacking and name.startswith("_fused_"):
            raise NotImplementedError(name)
        if name == "index":
            args = self._indexed(*args)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self._note_copy(name, tensors, kwargs, to_device)
        result = None if name == "_fused_sgd_" else operation(*args, **kwargs)  # it has no fake implementation
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if on_device or any(output.device.type == "cuda" for output in outputs):
            for output in outputs:
                self._hold(output)
                if self.lacking and output.dtype == torch.float64 and output.device.type == "cuda":
                    raise TypeError(f"{name}: the device has no float64")
            if name not in NO_KERNEL and not operation.is_view:
                self._count(operation, name, args, kwargs, tensors, outputs, result)
        return tree_map_only(FakeTensor, _real_if_on_cpu, result)

    def _on_cpu(self, operation, args, kwargs):
        pins = kwargs.pop("pin_memory", False)
        with no_dispatch():
            result = operation(*args, **kwargs)
        return self.pin(result) if pins else result

    def _indexed(self, source: Tensor, indices) -> tuple[Tensor, list]:
        """The arguments, with positions for masks: as many as one on the CPU has, or all where it is on the device."""
        kept = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                kept.append(index)
                if index is not None and index.device.type == "cpu" and source.device.type == "cuda":
                    self.record.unpinned[f"{_size(index)} bytes < {_lines()}"] += 1
                continue
            on_cpu = not isinstance(index, FakeTensor)
            self.record.waits[f"index by a mask on {'the CPU' if on_cpu else 'the device'} < {_lines()}"] += 1
            with no_dispatch():
                count = int(index.count_nonzero()) if on_cpu else index.numel()
            kept += [source.new_empty((count,), dtype=torch.int64)] * index.ndim
        return source, kept

    def _note_copy(self, name: str, tensors: list[Tensor], kwargs: dict, to_device: bool) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        source = tensors[-1]
        target = tensors[0].device.type if name == "copy_" else None
        if source.device.type == "cuda" and "cpu" in (target, str(kwargs.get("device"))):
            self.record.waits[f"copy to the CPU < {_lines()}"] += 1
        if source.device.type == "cpu" and (to_device or target == "cuda"):
            pinned = not isinstance(source, FakeTensor) and source.untyped_storage().data_ptr() in self._pinned
            if not pinned:
                self.record.unpinned[f"{_size(source)} bytes < {_lines()}"] += 1

    def _hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until its storage is gone."""
        if tensor.is_sparse or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._resize(key, 0)), 0
            self._serials[key] = next(self._numbers)
            self._resize(key, storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """`UntypedStorage.resize_`, by which FSDP2 frees and takes memory."""
        _resize(storage, size)
        if storage._cdata in self._storages:
            self._resize(storage._cdata, size)
        return storage

    def _resize(self, key: int, size: int) -> None:
        reference, before = self._storages.pop(key)
        size = -(-size // PAGE) * PAGE
        if reference() is not None:
            self._storages[key] = reference, size
        self.live += size - before
        self.record.peak = max(self.record.peak, self.live)

    def _count(self, operation, name, args, kwargs, tensors, outputs, result) -> None:
        work = Work(_launches(name, args), *_traffic(operation, name, args, kwargs, tensors, outputs))
        if operation._overloadpacket in flop_registry:
            work.flops = flop_registry[operation._overloadpacket](*args, **kwargs, out_val=result)
        rate = ATTENTION.get(name, PRODUCTS)
        work.seconds = max(work.moved / BANDWIDTH, work.flops / rate, work.kernels * KERNEL)
        if self.current is None:
            return self._add(name, work)
        reads, writes = _touched(operation, args, kwargs, outputs)
        sizes = [{self._serial(own): _size(own) for own in some} for some in (reads, writes)]
        self.current.operations.append(Operation(name, work, *sizes))

    def _serial(self, tensor: Tensor) -> int:
        self._hold(tensor)
        return self._serials[tensor.untyped_storage()._cdata]

    def _add(self, name: str, work: Work) -> None:
        record = self.record
        record.work[self.phase] += work
        record.operations[f"{self.phase}: {name}"] += work


def _answer(dtype: torch.dtype) -> bool | int | float:
    """What the host reads: numbers whose logarithm and sum are finite."""
    return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 0


def _real_if_on_cpu(tensor: FakeTensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    with no_dispatch():
        return torch.full(tuple(tensor.shape), _answer(tensor.dtype), dtype=tensor.dtype)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    if tensor.is_sparse:
        return 0
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def _traffic(operation, name, args, kwargs, tensors, outputs) -> tuple[int]:
    """Bytes that an operation reads and writes."""
    if name in LOOKUPS:
        return (2 * sum(map(_size, outputs)) + sum(map(_size, tensors[1:])),)
    if name == "scatter_add_":  # it touches as many elements as there are indices
        return (3 * _size(args[3]) + _size(args[2]),)
    moved = 0
    for number, argument in enumerate(operation._schema.arguments):
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        size = sum(_size(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = name not in FACTORIES and not (written and (argument.is_out or name in WRITE_ONLY))
        moved += size * (is_read + written)
    returns = operation._schema.returns
    fresh = [output for output, kind in zip(outputs, returns, strict=False) if kind.alias_info is None]
    return (moved + sum(map(_size, fresh)),)


def _touched(operation, args, kwargs, outputs) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors on the device that an operation reads and writes."""
    reads, writes = [], list(outputs)
    for number, argument in enumerate(operation._schema.arguments):
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (writes if is_written else reads).extend(tensors)
        if is_written and operation._schema.name.split("::")[-1] not in WRITE_ONLY:
            reads += tensors
    return reads, writes


def _launches(name: str, args) -> int:
    """Kernels of an operation."""
    if not name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return KERNELS.get(name, 1)
    lists = [leaf for leaf in args if isinstance(leaf, list | tuple) and leaf and isinstance(leaf[0], Tensor)]
    if not lists:
        return 1
    at_once = TENSORS_AT_ONCE[min(5, len(lists))]
    chunks = sum(-(-tensor.numel() // CHUNK) for tensor in lists[0])
    return max(-(-len(lists[0]) // at_once), -(-chunks // CHUNKS_AT_ONCE))


def _lines() -> str:
    """The innermost lines of charlm that are being run."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if "/charlm/" in name:
            found.append(f"{name.rpartition('/charlm/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "not charlm"


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What torch's SDPA calls on a GPU: the flash kernel, or with a mask or in fp32 the memory-efficient one."""
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = bias.expand(query.shape[0], query.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


class _Mode(FakeTensorMode):
    avoid_device_init = True  # whatever torch.cuda.is_available() says


def _inference_mode(mode=True):
    return torch.no_grad() if mode else torch.enable_grad()


torch.inference_mode = _inference_mode  # which fake tensors do not know; now, because it decorates functions


class _Nothing:
    """A stream or an event, which has nothing to wait for."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name: str):
        return lambda *_, **__: self


PATCHES = {
    "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.is_initialized": lambda: True,
    "torch.cuda.is_bf16_supported": lambda *_, **__: True,
    "torch.cuda.is_current_stream_capturing": lambda: False,
    "torch.cuda.get_device_name": lambda *_: "pretended H100",
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": lambda *_: None,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.manual_seed": lambda *_: None,
    "torch.cuda.manual_seed_all": lambda *_: None,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.synchronize": lambda *_: None,
    "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "torch.cuda.set_rng_state": lambda *_, **__: None,
    "torch.cuda.max_memory_allocated": lambda *_: 0,
    "torch.cuda.mem_get_info": lambda *_: (MEMORY, MEMORY),
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda.get_device_properties": lambda *_: SimpleNamespace(
        total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, name="pretended H100"
    ),
    "torch._subclasses.fake_tensor.FakeTensor.tolist": lambda tensor: tensor.cpu().tolist(),  # not number by number
    "torch.cuda.Stream": _Nothing,
    "torch.cuda.Event": _Nothing,
    "torch.cuda.current_stream": _Nothing,
    "torch.cuda.default_stream": _Nothing,
    "torch.cuda.stream": lambda *_: nullcontext(),
    "torch.nn.Module.to": lambda self, *_, **__: self,  # it would swap tensors, which fake ones refuse
    "torch.nn.functional.scaled_dot_product_attention": _attention,
}


_resize = torch.UntypedStorage.resize_


@contextmanager
def pretended_gpu(lacking: bool = False) -> Iterator[Meter]:
    """Inside, torch has one GPU, maybe `lacking` as the meter says.

    Build modules under `torch.device("cuda")`, since `.to` does nothing.
    """
    types = [foreach_utils._foreach_supported_types, optimizer_module._foreach_supported_types]
    mode, meter = _Mode(allow_non_fake_inputs=True), Meter(lacking)  # before there seems to be a GPU
    with ExitStack() as stack:
        for supported in {id(own): own for own in types}.values():
            supported.append(FakeTensor)
            stack.callback(supported.remove, FakeTensor)
        for name, replacement in PATCHES.items():
            stack.enter_context(mock.patch(name, replacement))
        if lacking:
            stack.enter_context(mock.patch("charlm.training.gradients.has_pinned_memory", lambda _: False))
        stack.enter_context(mock.patch("torch.compile", lambda function, **_: meter.compile(function)))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", lambda tensor, *_: meter.pin(tensor)))
        stack.enter_context(mock.patch("torch.UntypedStorage.resize_", lambda *given: meter.resize(*given)))
        stack.enter_context(mock.patch("torch.Tensor.coalesce", lambda tensor: meter.coalesce(tensor)))
        stack.enter_context(mode)
        stack.enter_context(meter)
        yield meter
