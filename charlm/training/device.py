"""Choices that depend on machine and launcher: device, precision, kernels."""

import atexit
import gc
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, is_bf16_available, parse_flag_from_env, patch_environment
from torch.nn.attention import SDPBackend

from charlm.config import Config, TrainConfig, UserError
from charlm.config.errors import first_line
from charlm.hardware import default_device, has_fused, has_pinned_memory, in_float64
from charlm.inference.scoring import AUTOCAST_DTYPES
from charlm.model.attention import attends_in_blocks
from charlm.objective.routes import ROUTES

PATIENCE = timedelta(minutes=10)  # with a process that hangs
OF_LAUNCHERS = "(ACCELERATE|FORK|FSDP|GROUP|MASTER|MV2|OMPI|PMI|TORCH(ELASTIC|INDUCTOR))_.*|(LOCAL_)?(RANK|WORLD_SIZE)"


@contextmanager
def launch_explained() -> Iterator[None]:
    """Inside, variables of a launcher that cannot work raise a UserError."""
    names = filter(re.compile(OF_LAUNCHERS).fullmatch, sorted(os.environ))
    found = {name: os.environ[name] for name in names}
    try:
        size = int(found.get("WORLD_SIZE", "1"))
        rank = int(found.get("RANK", "0" if size == 1 else "-1"))
        if not 0 <= rank < size or int(found.get("LOCAL_RANK", "0")) < 0:
            raise ValueError("RANK must be below WORLD_SIZE, and no rank negative")
        if size > 1:  # torch would try for minutes to find the first process
            socket.getaddrinfo(found.get("MASTER_ADDR", "localhost"), None)
        DynamoBackend(found.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper())
        torch.ones(1, device=found.get("ACCELERATE_TORCH_DEVICE", "cpu")).item()
        yield
    except Exception as error:  # torch and accelerate have no type for these
        if isinstance(error, UserError) or not found:
            raise
        shown = " ".join(map("=".join, found.items()))
        fault = f"cannot start with {shown}: {first_line(error)}"
        raise UserError(f"{fault}; unset what no launcher set") from error


@launch_explained()
def build_accelerator(train: TrainConfig) -> tuple[Accelerator, str]:
    """The Accelerator of this run, and the reason for its precision.

    Raises UserError for variables of a launcher that cannot work, and fp16 on a CPU.
    """
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        fault = f"accelerate's gradient_accumulation_steps={steps}"
        raise UserError(f"{fault}: use --train.micro_batch_size instead")
    precision, reason = choose_precision(train)
    _rejoin_group()
    # There is no public way to forget the precision of an earlier run.
    AcceleratorState._reset_state()
    with patch_environment(accelerate_use_fsdp="false"):  # `charlm.training.sharding` does that
        accelerator = Accelerator(
            # Without it processes on CPUs would not find each other.
            cpu=on_cpu(),
            mixed_precision=precision,
            dynamo_backend="no",  # blocks are compiled one by one
            kwargs_handlers=[
                # Silent heads take no part in the backward pass.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    atexit.register(leave_group)
    return accelerator, reason


def leave_group() -> None:
    """End the process group, and with its last reference its threads.

    A gloo thread that frees a tensor while Python shuts down aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        # Private caches of DTensor hold the mesh, and it holds the group.
        for mesh in [thing for thing in gc.get_objects() if type(thing) is dist.DeviceMesh]:
            vars(mesh).clear()
        gc.collect()


def _rejoin_group() -> None:
    """Build the process group if a launcher of one machine has restarted its processes.

    torch would find the earlier processes in the launcher's store, and wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if attempt == "0" or not one_machine or dist.is_initialized():
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = dist.get_default_backend_for_device("cpu" if on_cpu() else default_device())
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


@launch_explained()
def on_cpu() -> bool:
    """Whether training will run on the CPU."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"


def choose_precision(train: TrainConfig) -> tuple[str, str]:
    """Mixed precision in accelerate's words, and its reason."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    option = "train.mixed_precision"
    if train.mixed_precision != "auto":
        precision, reason = train.mixed_precision, "as configured"
    elif launcher:
        precision, reason = launcher, "as accelerate was told"
    elif has_fast_bf16():
        precision, reason = "bf16", "native here"
    else:
        precision, reason = "no", "no native bf16 here"
    if precision not in ("no", "fp32", "bf16", "fp16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION={launcher}: must be no, bf16 or fp16", option)
    if precision == "fp16" and on_cpu():
        raise UserError(f"{option}=fp16: not available on a CPU; use bf16 or fp32", option)
    return {"fp32": "no"}.get(precision, precision), reason


def has_fast_bf16() -> bool:
    """Whether matrix products in bf16 run in hardware."""
    if not on_cpu():
        asks = getattr(torch.get_device_module(default_device()), "is_bf16_supported", lambda **_: is_bf16_available())
        return asks(including_emulation=False)
    # The oldest supported torch lacks the function.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_compile(train: TrainConfig, device: torch.device) -> bool:
    """Whether to compile: by the config, or else on a CUDA device and if the launcher says so."""
    if train.compile != "auto":
        return train.compile == "yes"
    return device.type == "cuda" or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def describe_attention(config: Config, device: torch.device, precision: str) -> str:
    """How attention is computed: by the kernel that torch chooses in accelerate's `precision`."""
    model, dropout = config.model, config.model.attention_dropout
    if not dropout and attends_in_blocks(config.train.attention, device.type):
        return "attention in blocks"
    shape = 1, model.num_heads, model.context_length, model.d_model // model.num_heads
    dtype = AUTOCAST_DTYPES.get(precision) or torch.float32
    query = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    try:  # no public name tells which kernel it will be
        chosen = SDPBackend(torch._fused_sdp_choice(query, query, query, None, dropout, True))
    except NotImplementedError:
        return f"attention as torch does it on {device.type}"
    kind = "unfused" if chosen == SDPBackend.MATH else "fused"
    reasons = {"cpu": "the CPU's fused kernel has no dropout"} if dropout else {}
    reasons["cuda"] = "flash needs bf16 or fp16, and on consumer GPUs heads up to 192 wide or attention_dropout=0"
    if chosen in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION) and device.type in reasons:
        return f"attention {kind}, not by the flash kernel ({reasons[device.type]})"
    return f"attention {kind}"


def describe_lacks(device: torch.device) -> list[str]:
    """A line on what an accelerator lacks, and what charlm does instead; none if it lacks nothing."""
    wide = in_float64(torch.ones(1, device=device))
    there = {
        "float64 (sums of scores are taken on the CPU)": wide.device.type == device.type,
        "pinned memory (copies wait)": has_pinned_memory(device),
        "fused optimizers (skipped updates are undone)": has_fused(torch.optim.AdamW, device),
    }
    lacking = [name for name, found in there.items() if not found and device.type != "cpu"]
    return [f"{device.type} has no {', no '.join(lacking)}"] if lacking else []


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Inside, torch's process-wide settings are those of the run."""
    # Several backward passes share buffers. torch advises this private name.
    from torch._functorch import config as functorch

    matmul = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    with launch_explained():  # makes TORCHINDUCTOR_CACHE_DIR
        torch.use_deterministic_algorithms(config.train.deterministic or deterministic)
    try:
        with functorch.patch(donated_buffer=ROUTES[config.aux.route].one_backward):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(deterministic)
