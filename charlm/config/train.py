"""Options of the training loop."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from charlm.config.types import (
    BelowOne,
    Count,
    Duration,
    Mark,
    NonNegative,
    Positive,
    Precision,
    Section,
    Unit,
    Whole,
)

AttentionBackend = Literal["auto", "sdpa", "blocks"]
CrossEntropyBackend = Literal["chunked", "reference"]


def steps_of(cadence: float, total_steps: int) -> int:
    """An interval in steps, at least 1; `cadence` below 1 is a fraction of `total_steps`."""
    if 0 < cadence < 1:
        return max(1, round(cadence * total_steps))
    return int(cadence)


class TrainConfig(Section):
    """The training loop. Intervals, warm-up and decay below 1 are fractions of `steps`."""

    steps: Annotated[Count, Mark.MAY_CHANGE] = 100_000
    """Number of optimizer steps."""
    time: Duration | None = None
    """Train for this time, such as 1h or 90m, in place of `steps`: as many as fit."""
    steps_before: tuple[tuple[Count, Count], ...] = ()
    """Changes of `steps` by `time` on the way, [[s, n], ...]: up to step s, progress is that of n steps."""
    batch_size: Count = 16
    """Windows per optimizer step, over all processes and micro-batches."""
    micro_batch_size: Annotated[Count | Literal["auto"] | None, Mark.MAY_CHANGE] = None
    """Windows that a process holds at once, at most; gradients of several such are accumulated. null:
    no limit. auto: about as many as fit into the memory of a GPU."""
    context_divisor: Count = 1
    """Divides the windows' length and multiplies their number until full_context_from (Press et al. 2021)."""
    full_context_from: Unit = 0.0
    """Progress from which windows have their full length."""
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """sgd: the paper's. muon: orthogonal updates of hidden matrices (Jordan et al. 2024), else AdamW."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """After the warm-up: keep the peak, or decay along a cosine or a line to final_lr. wsd: keep the
    peak, and decay over the last decay_steps (Hu et al. 2024, MiniCPM, section 4)."""
    warmup: NonNegative = 0.0
    """Length of the learning rate's linear warm-up."""
    decay_steps: Annotated[NonNegative, Mark.MAY_CHANGE] = 0.2
    """Length of the decay of lr_schedule=wsd; 0 keeps the peak to the end."""
    decay_type: Annotated[Literal["linear", "1-sqrt"], Mark.MAY_CHANGE] = "1-sqrt"
    """Shape of wsd's decay: a line, or 1 minus the root of its completed fraction (Hägele et al. 2024)."""
    final_lr: Annotated[Unit, Mark.MAY_CHANGE] = 0.0
    """Learning rate at the end of a decay, as a fraction of the peak."""
    momentum: BelowOne = 0.99
    """Momentum of sgd."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    """Betas of adamw."""
    weight_decay: NonNegative = 0.0
    """Weight decay of all matrices but embeddings, their projections and position tables."""
    muon_learning_rate: Positive = 0.02
    """Peak learning rate of the hidden matrices with muon; learning_rate is for the rest."""
    muon_momentum: BelowOne = 0.95
    """Nesterov momentum of the hidden matrices with muon."""
    ngram_learning_rate: Positive = 0.04
    """Peak learning rate of the n-gram tables, which a row-wise RMSprop trains with any optimizer."""
    clip_norm: NonNegative = 0.0
    """Maximum norm of the gradient, without n-gram tables; 0 turns clipping off."""
    average: Literal["no", "ema", "tail"] = "no"
    """Weights to validate and to use later, unless --weights=raw: an exponential moving average (ema; Polyak
    and Juditsky 1992), or the mean over the end of training (tail; Izmailov et al. 2018, SWA)."""
    average_decay: BelowOne = 0.999
    """Decay of ema per step; at most (1 + t) / (10 + t) after t steps, as in TensorFlow."""
    average_tail: Positive = 0.2
    """Length of the end that tail is the mean of. Before it, the weights are raw."""
    average_every: Positive = 20
    """Interval at which weights enter the average."""
    max_skipped: Annotated[Count, Mark.MAY_CHANGE] = 20
    """Updates with a loss or gradient that is not finite are skipped; so many in a row stop the run."""
    spike_threshold: NonNegative = 0.0
    """Also skip an update whose loss is more than so many robust standard deviations (1.4826 times the
    median absolute deviation) above the median of the last 128 losses; 0 turns this off."""
    mixed_precision: Annotated[Precision | Literal["auto"], Mark.MAY_CHANGE] = "auto"
    """auto: the launcher's, or without one bf16 if the hardware has it. `no` is fp32."""
    matmul_precision: Annotated[Literal["highest", "high", "medium"], Mark.MAY_CHANGE] = "medium"
    """See torch.set_float32_matmul_precision. On a CPU without AMX, medium stays fp32 but is faster."""
    attention: Annotated[AttentionBackend, Mark.MAY_CHANGE] = "auto"
    """sdpa: torch's scaled_dot_product_attention. blocks: blocks of queries, which skip the masked half
    of the keys. auto: blocks on a CPU. Training with attention_dropout always uses sdpa."""
    cross_entropy: Annotated[CrossEntropyBackend, Mark.MAY_CHANGE] = "chunked"
    """chunked: logits of a few hundred positions at a time, none kept. reference: all at once."""
    activation_checkpointing: Annotated[bool, Mark.MAY_CHANGE] = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: Annotated[Literal["auto", "yes", "no"], Mark.MAY_CHANGE] = "auto"
    """Compile blocks and losses with torch.compile. auto: on CUDA, or if accelerate has a dynamo backend."""
    sharding: Annotated[Literal["auto", "no", "fsdp2"], Mark.MAY_CHANGE] = "auto"
    """fsdp2: sharded parameters and optimizer state. no: DDP. auto: as the launcher says."""
    deterministic: Annotated[bool, Mark.MAY_CHANGE] = False
    """Use deterministic kernels only, for bit-exact runs on a GPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] = 0
    """Seed for initialisation, window sampling and dropout."""
    log_every: Annotated[Positive, Mark.MAY_CHANGE] = 0.001
    """Interval of rows in metrics.jsonl."""
    valid_every: Annotated[Positive, Mark.MAY_CHANGE] = 0.05
    """Interval of validation, which also writes a checkpoint."""
    checkpoint_every: Annotated[NonNegative, Mark.MAY_CHANGE, Mark.NO_EFFECT] = 0.0
    """Interval of further checkpoints between validations; 0 turns them off."""
    valid_symbols: Annotated[Count, Mark.MAY_CHANGE] = 200_000
    """Symbols to validate on, from the start of the validation split."""
    keep_checkpoints: Annotated[Count, Mark.MAY_CHANGE, Mark.NO_EFFECT] = 2
    """Newest checkpoints to keep, besides the best."""
    diagnose_every: Annotated[NonNegative, Mark.MAY_CHANGE] = 0.0
    """Interval of `diagnostics` rows (bits of each head, gradients of each layer); 0 turns them off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.time is not None and self.steps != type(self).model_fields["steps"].default:
            raise self.mistake("time", f"comes in place of train.steps={self.steps}; leave one out", "steps")
        ends = [*(step for step, _ in self.steps_before), self.steps]
        if ends != sorted(set(ends)) or any(step >= steps for step, steps in self.steps_before):
            raise self.mistake("steps_before", f"should rise, below n and train.steps={self.steps}", "steps")
        warmup, decay = steps_of(self.warmup, self.planned), steps_of(self.decay_steps, self.planned)
        if self.lr_schedule == "wsd" and warmup + decay > self.planned:
            text = f"does not fit with warmup={self.warmup} into train.steps={self.steps}; lower one"
            raise self.mistake("decay_steps", text, "warmup", "steps")
        return self

    @property
    def planned(self) -> int:
        """The steps of the first plan."""
        return self.steps_before[0][1] if self.steps_before else self.steps

    def planned_step(self, step: float) -> float:
        """The step of the first plan with the progress of `step`."""
        at, begin = 0.0, 0
        for change, steps in (*self.steps_before, (step, self.steps)):
            end = min(step, change)
            at += (self.planned - at) * (end - begin) / (steps - begin)
            begin = end
        return at

    def progress(self, step: float) -> float:
        """The completed share of the run after `step` steps, in [0, 1]."""
        return min(1.0, self.planned_step(step) / self.planned)
