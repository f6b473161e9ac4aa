"""The loop."""

from dataclasses import dataclass
from typing import Literal

from charlm.config.errors import require

AttentionBackend = Literal["auto", "sdpa", "blocks"]
CrossEntropyBackend = Literal["chunked", "reference"]
Precision = Literal["no", "bf16", "fp16", "auto"]


def steps_of(cadence: float, total_steps: int) -> int:
    """The steps that a cadence stands for: below 1 a fraction of `total_steps` (at least one step), else steps."""
    return max(1, round(cadence * total_steps)) if 0 < cadence < 1 else int(cadence)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Cadences and warm-up: a value below 1 is a fraction of `steps`, from 1 on a number of steps."""

    steps: int = 100_000
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Windows per optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Most windows that one process holds at once; fewer means gradient accumulation. null: no accumulation; auto: as
    many as fit into the memory of a GPU."""
    context_divisor: int = 1
    """To begin with, windows this many times shorter than model.context_length, and this many times more of them per
    step (Press et al. 2021, Shortformer, "staged training")."""
    full_context_from: float = 0.0
    """Progress from which the windows are full."""
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """sgd is the paper's; muon orthogonalises the updates of the hidden matrices (Jordan et al. 2024) and
    leaves everything else to AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: hold, or decay along a cosine or a line to final_lr at the last step."""
    warmup: float = 0.0
    """Linear warm-up of the learning rate."""
    final_lr: float = 0.0
    """Where a decay ends, as a fraction of the peak."""
    momentum: float = 0.99
    """Of sgd."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Of adamw, as a YAML list."""
    weight_decay: float = 0.0
    """Of matrices only: no decay on biases, norms, embeddings and position tables."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the hidden matrices under optimizer=muon; learning_rate is that of the rest."""
    muon_momentum: float = 0.95
    """Nesterov momentum of the hidden matrices under optimizer=muon."""
    ngram_learning_rate: float = 0.04
    """Peak learning rate of the n-gram tables, whatever the optimizer of the rest: torch.optim.SparseAdam moves only
    the rows that a batch reads, and those once, where momentum would carry them on; hence the high rate."""
    clip_norm: float = 0.0
    """Largest norm of the gradient, n-gram tables apart; 0 leaves it alone."""
    max_skipped: int = 20
    """An update whose loss or gradient is not finite is skipped; after so many in a row the run stops."""
    spike_threshold: float = 0.0
    """Skip an update, too, whose loss lies so many robust standard deviations (1.4826 times the median absolute
    deviation) above the median of the last 128; 0 never does."""
    mixed_precision: Precision = "auto"
    """auto takes what accelerate's launcher was told, and without a launcher bf16 where the hardware has it."""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """Of fp32 matrix products in training, as torch.set_float32_matmul_precision takes it. medium stays fp32 on a
    CPU without AMX, and is faster there."""
    attention: AttentionBackend = "auto"
    """sdpa: torch's scaled_dot_product_attention; blocks: blocks of queries, each over the keys up to its end, which
    leaves out the masked half. auto takes blocks on a CPU, where sdpa does not leave it out, unless there is dropout
    on attention weights."""
    cross_entropy: CrossEntropyBackend = "chunked"
    """chunked never holds the logits of more than some hundred positions, nor any for the backward pass; reference
    is the plain way. They agree but for rounding."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass rather than keep its activations."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile each block; auto does so if accelerate's launcher was given a dynamo backend."""
    sharding: Literal["auto", "no", "fsdp2"] = "auto"
    """fsdp2: each of several processes keeps its part of parameters and optimizer state rather than all of them (DDP);
    auto does so if accelerate's launcher was told to."""
    deterministic: bool = False
    """Only deterministic kernels (needed for bit-exact runs on a GPU)."""
    seed: int = 0
    """Of initialisation, windows and dropout."""
    log_every: float = 0.001
    """Cadence of metrics.jsonl."""
    valid_every: float = 0.05
    """Cadence of validation, and of the checkpoint that goes with it."""
    checkpoint_every: float = 0.0
    """Cadence of further checkpoints between validations; 0 writes none."""
    valid_symbols: int = 200_000
    """Validation scores the first so many symbols of the validation split."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best."""
    diagnose_every: float = 0.0
    """Cadence of `diagnostics` in metrics.jsonl: bits per character of every head, and what gradients reach every
    layer; 0 never does it."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "context_divisor", "max_skipped", "valid_symbols", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        require(
            self.micro_batch_size in (None, "auto") or self.micro_batch_size >= 1,
            "train.micro_batch_size",
            self.micro_batch_size,
            "must be at least 1, or auto",
        )
        for name in ("learning_rate", "muon_learning_rate", "ngram_learning_rate"):
            require(
                0 < getattr(self, name) < float("inf"),
                f"train.{name}",
                getattr(self, name),
                "must be positive and finite",
            )
        for name in ("momentum", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must lie in [0, 1)")
        require(
            len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas),
            "train.adam_betas",
            self.adam_betas,
            "must be two numbers in [0, 1)",
        )
        for name in ("weight_decay", "clip_norm", "spike_threshold", "warmup", "checkpoint_every", "diagnose_every"):
            require(
                0 <= getattr(self, name) < float("inf"),
                f"train.{name}",
                getattr(self, name),
                "must be finite and at least 0",
            )
        for name in ("full_context_from", "final_lr"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "must lie in [0, 1]")
        for name in ("log_every", "valid_every"):
            cadence = getattr(self, name)
            require(0 < cadence < float("inf"), f"train.{name}", cadence, "must be positive and finite")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "must lie in [0, 2^63)")
