"""Sharding of the model over processes: FSDP2, by torch's `fully_shard`.

Unlike accelerate's FSDP, it also runs on CPUs. Parameters stay in fp32 under autocast, so losses
are those of DDP up to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from charlm.config import TrainConfig, UserError
from charlm.objective.objective import Objective
from charlm.training.device import launch_explained


@launch_explained()
def wants_shards(train: TrainConfig, num_processes: int) -> bool:
    """Whether to shard: train.sharding decides, or else `accelerate launch --use_fsdp`.

    Raises UserError if the launcher asks for what is not supported.
    """
    if train.sharding != "auto" or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return train.sharding == "fsdp2" and num_processes > 1
    version = os.environ.get("FSDP_VERSION", "1")  # accelerate's default
    if version != "2":
        raise UserError(f"accelerate's fsdp_version={version}: only FSDP2 is supported; set it to 2")
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if parse_flag_from_env(name):
            way_out = "set it to false, and use --train.activation_checkpointing=true"
            raise UserError(f"accelerate's {name.lower()}=true: {way_out}")
    return num_processes > 1


def shard(objective: Objective) -> None:
    """Shard the parameters. Build optimizers afterwards: they must own the shards."""
    for block in objective.transformer.blocks:
        fully_shard(block)
    fully_shard(objective)  # heads and embeddings together: the objective reads them directly


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def average(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        if gradient.is_sparse:
            dist.all_reduce(gradient.div_(accelerator.num_processes))
    dense = [gradient for gradient in gradients if not gradient.is_sparse]
    together = parameters_to_vector(dense)
    dist.all_reduce(together)
    vector_to_parameters(together / accelerator.num_processes, dense)


@contextmanager
def unsharded(objective: Objective) -> Iterator[None]:
    """Inside, transformer and heads can be called directly."""
    if is_sharded(objective):
        objective.unshard()
    try:
        yield
    finally:
        if is_sharded(objective):
            objective.reshard()
