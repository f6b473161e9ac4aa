"""The training loop."""

from typing import Annotated, Literal

from pydantic import Field

from charlm.config.types import BelowOne, Count, Mark, NonNegative, Positive, Precision, Section, Unit, Whole

AttentionBackend = Literal["auto", "sdpa", "blocks"]
CrossEntropyBackend = Literal["chunked", "reference"]


def steps_of(cadence: float, total_steps: int) -> int:
    """The steps that a cadence stands for: below 1 a fraction of `total_steps` (at least one step), else steps."""
    return max(1, round(cadence * total_steps)) if 0 < cadence < 1 else int(cadence)


class TrainConfig(Section):
    """The training loop. Cadences and warm-up: below 1 a fraction of `steps`, from 1 on a number of steps."""

    steps: Annotated[Count, Mark.MAY_CHANGE] = 100_000
    """Optimizer steps of the whole run."""
    batch_size: Count = 16
    """Windows per optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: Annotated[Count | Literal["auto"] | None, Mark.MAY_CHANGE] = None
    """The most windows that one process holds at once; fewer means gradient accumulation. null: no accumulation. auto:
    about as many as fit into the memory of a GPU, found to within about a tenth."""
    context_divisor: Count = 1
    """Start with windows this many times shorter than model.context_length, and this many times more of them per step
    (Press et al. 2021, Shortformer, "staged training")."""
    full_context_from: Unit = 0.0
    """Progress at which windows get their full length."""
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """sgd is the paper's. muon orthogonalises the updates of the hidden matrices (Jordan et al. 2024) and leaves
    everything else to AdamW."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: hold the peak, or decay along a cosine or a line to final_lr at the last step."""
    warmup: NonNegative = 0.0
    """Length of the linear warm-up of the learning rate."""
    final_lr: Unit = 0.0
    """Learning rate at the end of a decay, as a fraction of the peak."""
    momentum: BelowOne = 0.99
    """Momentum of sgd."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    """Betas of adamw, as a YAML list."""
    weight_decay: NonNegative = 0.0
    """Weight decay of matrices; biases, norms, embeddings and position tables have none."""
    muon_learning_rate: Positive = 0.02
    """Peak learning rate of the hidden matrices under optimizer=muon; learning_rate is for the rest."""
    muon_momentum: BelowOne = 0.95
    """Nesterov momentum of the hidden matrices under optimizer=muon."""
    ngram_learning_rate: Positive = 0.04
    """Peak learning rate of the n-gram tables, which torch.optim.SparseAdam trains whatever the optimizer of the rest.
    It updates only the rows that a batch reads, and each once, without momentum; hence the high rate."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the gradient, n-gram tables apart; 0 does not clip."""
    max_skipped: Annotated[Count, Mark.MAY_CHANGE] = 20
    """An update is skipped if its loss or gradient is not finite; the run stops after this many in a row."""
    spike_threshold: NonNegative = 0.0
    """Also skip an update if its loss is more than this many robust standard deviations (1.4826 times the median
    absolute deviation) above the median of the last 128 losses; 0 never does."""
    mixed_precision: Annotated[Precision | Literal["auto"], Mark.MAY_CHANGE] = "auto"
    """Precision of training. auto takes the launcher's setting; without a launcher, bf16 if the hardware has it. `no`,
    accelerate's word for fp32, is understood, too."""
    matmul_precision: Annotated[Literal["highest", "high", "medium"], Mark.MAY_CHANGE] = "medium"
    """Precision of fp32 matrix products in training, as in torch.set_float32_matmul_precision. On a CPU without AMX,
    medium stays fp32 and is faster."""
    attention: Annotated[AttentionBackend, Mark.MAY_CHANGE] = "auto"
    """sdpa: torch's scaled_dot_product_attention. blocks: blocks of queries, each over the keys up to its end, which
    skips the masked half. auto: blocks on a CPU, where sdpa does not skip it, unless attention weights have
    dropout."""
    cross_entropy: Annotated[CrossEntropyBackend, Mark.MAY_CHANGE] = "chunked"
    """chunked: holds the logits of a few hundred positions at a time, and none for the backward pass. reference: the
    plain way. They differ by rounding only."""
    activation_checkpointing: Annotated[bool, Mark.MAY_CHANGE] = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: Annotated[Literal["auto", "yes", "no"], Mark.MAY_CHANGE] = "auto"
    """Compile each block. auto does so if accelerate's launcher was given a dynamo backend."""
    sharding: Annotated[Literal["auto", "no", "fsdp2"], Mark.MAY_CHANGE] = "auto"
    """fsdp2: each process keeps its part of the parameters and of the optimizer state; otherwise each keeps all of
    them (DDP). auto uses fsdp2 if accelerate's launcher was told to."""
    deterministic: Annotated[bool, Mark.MAY_CHANGE] = False
    """Use deterministic kernels only (needed for bit-exact runs on a GPU)."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] = 0
    """Seed for initialisation, window sampling and dropout."""
    log_every: Annotated[Positive, Mark.MAY_CHANGE] = 0.001
    """Cadence of rows in metrics.jsonl."""
    valid_every: Annotated[Positive, Mark.MAY_CHANGE] = 0.05
    """Cadence of validation, and of the checkpoint that goes with it."""
    checkpoint_every: Annotated[NonNegative, Mark.MAY_CHANGE, Mark.NO_EFFECT] = 0.0
    """Cadence of further checkpoints between validations; 0 writes none."""
    valid_symbols: Annotated[Count, Mark.MAY_CHANGE] = 200_000
    """Number of symbols to validate on, from the start of the validation split."""
    keep_checkpoints: Annotated[Count, Mark.MAY_CHANGE, Mark.NO_EFFECT] = 2
    """Number of newest checkpoints to keep, beside the best."""
    diagnose_every: Annotated[NonNegative, Mark.MAY_CHANGE] = 0.0
    """Cadence of `diagnostics` rows in metrics.jsonl: bits per character of every head, and the gradients that reach
    every layer; 0 writes none."""
