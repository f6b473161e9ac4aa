"""Sharding of the model over processes: FSDP2, by torch's `fully_shard`.

Unlike accelerate's FSDP, it also runs on CPUs. Parameters stay in fp32 under autocast, so losses
are those of DDP up to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
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
    # Heads and embeddings together: the objective reads them directly.
    fully_shard(objective, ignored_params=set(sparse_tables(objective)))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def sparse_tables(model: nn.Module) -> list[nn.Parameter]:
    """Embeddings with sparse gradients. Every process holds them whole, outside DDP and FSDP2."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [embedding.weight for embedding in embeddings if embedding.sparse]


def wrap(accelerator: Accelerator, objective: Objective, one_backward: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """The objective in autocast and, where that serves, in DDP; and the parameters that need `average_gradients`."""
    tables = sparse_tables(objective)
    for table in tables:
        table.requires_grad_(False)  # DDP does not exchange what it finds frozen
    # DDP cannot follow several backward passes, and waits for a GPU while a head is silent.
    waits = accelerator.device.type != "cpu" and objective.can_fall_silent()
    averages = not is_sharded(objective) and (waits or not one_backward)
    model = accelerator.prepare_model(objective, evaluation_mode=is_sharded(objective) or averages)
    for table in tables:
        table.requires_grad_()
    return model, list(objective.parameters()) if averages else tables


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes. Sparse ones become coalesced or dense."""
    dense = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = _gathered(accelerator, parameter.grad)
        if parameter.grad is not None and not parameter.grad.is_sparse:
            dense.append(parameter.grad)
    if accelerator.num_processes > 1 and dense:
        together = parameters_to_vector(dense)
        dist.all_reduce(together)
        vector_to_parameters(together / accelerator.num_processes, dense)


def _gathered(accelerator: Accelerator, gradient: Tensor) -> Tensor:
    """The mean of few rows over all processes, coalesced; or if it is not cheaper, this process's, dense."""
    if gradient.device.type != "cpu":  # the host would wait for the number of rows
        return gradient.to_dense()
    gradient = gradient.coalesce()
    if accelerator.num_processes == 1:
        return gradient
    rows, values = gradient.indices()[0], gradient.values()
    rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=int(rows[0])))
    if len(rows) >= len(gradient):
        return gradient.to_dense()
    values = accelerator.gather(accelerator.pad_across_processes(values / accelerator.num_processes))
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()


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
