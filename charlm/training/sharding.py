"""The model in shards over the processes: FSDP2, by torch's own `fully_shard`.

accelerate puts CPU processes under DDP whatever is asked, so that its FSDP2 cannot be tested without GPUs. This is one
path for both. Parameters stay in fp32 and mixed precision stays autocast's: the losses are DDP's but for rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from charlm.config import Config, TrainConfig, UserError
from charlm.objective.objective import Objective

NOT_OURS = {
    "FSDP_OFFLOAD_PARAMS": "parameters stay on their device",
    "FSDP_ACTIVATION_CHECKPOINTING": "use --train.activation_checkpointing=true",
}
"""What accelerate's launcher can ask of FSDP by an environment variable and charlm does not do, and the way out."""


def wants_shards(train: TrainConfig) -> bool:
    """Whether to shard: train.sharding, else whether the launcher was told so (`accelerate launch --use_fsdp`).

    Raises:
        UserError: the launcher asks for FSDP1, or for a part of FSDP that there is not.
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
    """Give each process its part of every parameter, if that is wanted and there are several of them.

    Comes before the optimizers, which own the parameters that are there. The blocks are gathered one by one as they
    are computed; heads and embeddings, which the objective reads directly, belong to the objective as a whole.

    Raises:
        UserError: what the config asks for cannot be computed in shards.
    """
    if not wants_shards(config.train) or num_processes == 1:
        return
    _check_shardable(config, num_processes)
    for block in objective.transformer.blocks:
        fully_shard(block)
    fully_shard(objective)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` did anything."""
    return isinstance(model, FSDPModule)


def prepare(accelerator: Accelerator, objective: Objective, one_backward: bool = True) -> nn.Module:
    """The objective as the loop uses it: under autocast, and DDP unless it is sharded.

    Without `one_backward`, nor under DDP: what several backward passes make of one forward pass its reducer would not
    see, and `average` exchanges it.
    """
    return accelerator.prepare_model(objective, evaluation_mode=is_sharded(objective) or not one_backward)


def average(accelerator: Accelerator, gradients: Iterable[Tensor]) -> None:
    """Replace gradients by their means over all processes, which have the same ones in the same order."""
    if accelerator.num_processes == 1:
        return
    dense = []
    for gradient in gradients:
        if gradient.is_sparse:
            dist.all_reduce(gradient.div_(accelerator.num_processes))
        else:
            dense.append(gradient)
    together = torch.cat([gradient.flatten() for gradient in dense])
    dist.all_reduce(together)
    together /= accelerator.num_processes
    for gradient, mean in zip(dense, together.split([gradient.numel() for gradient in dense]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def no_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Gradients of a backward pass inside are added up, and exchanged by the next one outside."""
    return _unreduced(model) if is_sharded(model) else accelerator.no_sync(model)


@contextmanager
def unsharded(objective: Objective) -> Iterator[None]:
    """Inside, transformer and heads can be called without the objective; blocks gather themselves as ever."""
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
        raise UserError("train.micro_batch_size=auto: cannot be found in shards; give a number")
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
