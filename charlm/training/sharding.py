"""Sharding of the model over processes: FSDP2, by torch's `fully_shard`.

accelerate always uses DDP on CPUs, so its FSDP2 cannot be tested without GPUs. This code is the same for both.
Parameters stay in fp32 under autocast, so losses are those of DDP up to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from charlm.config import Config, TrainConfig, UserError
from charlm.objective.objective import Objective

NOT_OURS = {
    "FSDP_OFFLOAD_PARAMS": "parameters stay on their device",
    "FSDP_ACTIVATION_CHECKPOINTING": "use --train.activation_checkpointing=true",
}
"""FSDP settings of accelerate's launcher that charlm does not support, by environment variable, and the way out."""


def wants_shards(train: TrainConfig) -> bool:
    """Whether to shard: train.sharding decides, or else the launcher (`accelerate launch --use_fsdp`).

    Raises:
        UserError: the launcher asks for FSDP1, or for an unsupported setting of FSDP.
    """
    if train.sharding != "auto":
        return train.sharding == "fsdp2"
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")  # accelerate's own default
    if version != "2":
        raise UserError(f"accelerate's fsdp_version={version}: only FSDP2 is supported; set fsdp_version to 2")
    for name, way_out in NOT_OURS.items():
        if _is_set(name):
            raise UserError(f"accelerate's {name.lower()}=true: {way_out}; set it to false")
    return True


def shard(config: Config, objective: Objective, num_processes: int) -> None:
    """Shard the parameters over the processes, if the config or launcher wants it and there are several processes.

    Call it before building the optimizers, which must own the sharded parameters. Each block is gathered when it is
    computed; heads and embeddings are gathered together with the objective, which reads them directly.

    Raises:
        UserError: the config has an option that cannot be sharded.
    """
    if not wants_shards(config.train) or num_processes == 1:
        return
    _check_shardable(config, num_processes)
    for block in objective.transformer.blocks:
        fully_shard(block)
    fully_shard(objective)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has sharded the model."""
    return isinstance(model, FSDPModule)


def prepare(accelerator: Accelerator, objective: Objective, one_backward: bool = True) -> nn.Module:
    """Wrap the objective in autocast, and in DDP unless it is sharded.

    Without `one_backward` there is no DDP: its reducer cannot follow several backward passes after one forward pass,
    and `average` replaces it.
    """
    return accelerator.prepare_model(objective, evaluation_mode=is_sharded(objective) or not one_backward)


def average(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of the parameters by their means over all processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    dense = [gradient for gradient in gradients if not gradient.is_sparse]
    for gradient in gradients:
        if gradient.is_sparse:
            dist.all_reduce(gradient.div_(accelerator.num_processes))
    together = torch.cat([gradient.flatten() for gradient in dense])
    dist.all_reduce(together)
    together /= accelerator.num_processes
    for gradient, mean in zip(dense, together.split([gradient.numel() for gradient in dense]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def no_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward passes add up gradients; the next one outside exchanges them."""
    return _unreduced(model) if is_sharded(model) else accelerator.no_sync(model)


@contextmanager
def unsharded(objective: Objective) -> Iterator[None]:
    """Inside, transformer and heads can be called directly, without the objective."""
    if not is_sharded(objective):
        yield
        return
    objective.unshard()
    try:
        yield
    finally:
        objective.reshard()


@contextmanager
def _unreduced(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _check_shardable(config: Config, num_processes: int) -> None:
    if config.model.ngrams:
        raise UserError(
            f"model.ngrams={list(config.model.ngrams)}: their sparse gradients cannot be sharded; "
            "use --train.sharding=no, or train without them (--model.ngrams=[])"
        )
    train = config.train
    if train.micro_batch_size == "auto":
        raise UserError("train.micro_batch_size=auto: the search does not support sharding; give a number")
    for divisor in {1, train.context_divisor}:
        windows = train.batch_size * divisor
        most, fewest = -(-windows // num_processes), windows // num_processes
        micro_batch = (train.micro_batch_size or most) * divisor
        if -(-most // micro_batch) != -(-fewest // micro_batch):
            raise UserError(
                f"train.batch_size={train.batch_size} in micro-batches of {train.micro_batch_size}: the "
                f"{num_processes} processes would take different numbers of them, and wait for each other's shards "
                f"forever; choose a batch that is a multiple of {num_processes}"
            )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
