"""Choices that depend on machine and launcher: device, precision, kernels. Each comes with its reason."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from charlm.config import Config, TrainConfig, UserError
from charlm.model.attention import attends_in_blocks
from charlm.objective.routes import ROUTES

PATIENCE = timedelta(minutes=10)
"""How long processes wait for one that hangs. If one dies, the others end at once."""


def build_accelerator(train: TrainConfig) -> tuple[Accelerator, str]:
    """The Accelerator of this run, and the reason for its precision.

    Raises:
        UserError: fp16 on a CPU, or the launcher sets gradient accumulation.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"accelerate's gradient_accumulation_steps={accumulation}: use --train.micro_batch_size, "
            "which keeps the global batch, and leave accelerate's at 1"
        )
    precision, reason = choose_precision(train)
    _rejoin_group()
    # accelerate has no public way to forget the precision of an earlier run of this process.
    AcceleratorState._reset_state()
    with patch_environment(accelerate_use_fsdp="false"):  # `charlm.training.sharding` does that
        accelerator = Accelerator(
            mixed_precision=precision,
            dynamo_backend="no",  # blocks are compiled one by one, see `choose_compile`
            kwargs_handlers=[
                # Silent heads take no part in the backward pass; the reducer must expect that.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    atexit.unregister(leave_group)  # once is enough, however many runs this process makes
    atexit.register(leave_group)
    return accelerator, reason


def leave_group() -> None:
    """End the process group and its threads; called as the process exits, after its last run.

    A gloo thread that frees a tensor after Python has begun to shut down asks for the GIL, and the process aborts
    ("terminate called without an active exception"). A group's threads end with the last reference to it.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for thing in gc.get_objects():
        # FSDP2's mesh knows the group, torch's caches of DTensor operations know the mesh, and nothing public empties
        # them.
        if type(thing) is dist.DeviceMesh:
            vars(thing).clear()
    gc.collect()


def _rejoin_group() -> None:
    """Build the process group after a launcher of one machine has restarted its processes.

    The launcher keeps its store, in which torch would find the addresses of the earlier processes and wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, num_processes = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "gloo" if on_cpu() else "nccl",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=num_processes,
        timeout=PATIENCE,
    )


def on_cpu() -> bool:
    """Whether training will run on the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()


def choose_precision(train: TrainConfig) -> tuple[str, str]:
    """Mixed precision and its reason: train.mixed_precision, or else the launcher's, or else the hardware's best.

    Raises:
        UserError: fp16 on a CPU, which accelerate would silently run in fp32.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if train.mixed_precision != "auto":
        precision = {"fp32": "no"}.get(train.mixed_precision, train.mixed_precision)  # accelerate's word
        reason = "as configured"
    elif launcher:
        precision, reason = launcher, "as accelerate was told"
    elif has_fast_bf16():
        precision, reason = "bf16", "native here"
    else:
        precision, reason = "no", "no native bf16 here"
    if precision == "fp16" and on_cpu():
        raise UserError("train.mixed_precision=fp16: not available on a CPU; use bf16 or fp32", "train.mixed_precision")
    return precision, reason


def has_fast_bf16() -> bool:
    """Whether matrix products in bf16 run in hardware."""
    if not on_cpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest torch supported
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_compile(train: TrainConfig) -> bool:
    """Whether to compile: train.compile decides, or else whether the launcher was given a dynamo backend."""
    if train.compile != "auto":
        return train.compile == "yes"
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def describe_attention(config: Config) -> str:
    """How attention is computed, and the reason if no fused kernel does it."""
    if on_cpu() and config.model.attention_dropout > 0:
        return "attention unfused (the CPU's fused kernel has no dropout; model.attention_dropout=0 is faster)"
    if attends_in_blocks(config.train.attention, "cpu" if on_cpu() else "cuda"):
        return "attention in blocks (without the masked half, which the fused kernel computes)"
    return "attention fused"


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Process-wide settings of a run inside, restored after."""
    train = config.train
    matmul, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(train.matmul_precision)
    torch.use_deterministic_algorithms(train.deterministic or deterministic)
    # The first of several backward passes must not give its buffers away. There is no public option for it: torch's own
    # error message advises this one.
    keep_buffers = choose_compile(train) and not ROUTES[config.aux.route].one_backward
    from torch._functorch import config as functorch

    try:
        with functorch.patch(donated_buffer=False) if keep_buffers else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(deterministic)
