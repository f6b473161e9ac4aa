"""Every option of charlm: frozen dataclasses, one docstring per field.

`Config` is what YAML files and command-line flags fill (see `charlm.cli`) and what a run keeps as `config.yaml`.
A value that cannot work raises `ConfigError` here, before anything heavy is imported: this module imports nothing
of ours and no torch.

Progress, in every schedule, is the number of completed optimizer steps divided by `train.steps`: a float in [0, 1].
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CorpusName = Literal["enwik8", "text8", "lm1b", "file", "hub", "python-stdlib"]
AttentionBackend = Literal["auto", "sdpa", "blocks"]
CrossEntropyBackend = Literal["chunked", "reference"]
Precision = Literal["no", "bf16", "fp16", "auto"]
SplitName = Literal["train", "valid", "test"]
TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


class UserError(Exception):
    """Something the user can mend: shown as one message without a traceback; scripts exit with code 2."""


class Stopped(BaseException):
    """The process was asked to stop, and has saved what there was to save: scripts exit with code 0.

    Like KeyboardInterrupt no Exception, so that whoever trains several runs in a row stops, too.
    """


class ConfigError(UserError):
    """An option whose value cannot work. The message names the field, the value and the way out."""


def _require(condition: bool, name: str, value: object, way_out: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value}: {way_out}")


def steps_of(cadence: float, total_steps: int) -> int:
    """The steps that a cadence stands for: below 1 a fraction of `total_steps` (at least one step), else steps."""
    return max(1, round(cadence * total_steps)) if 0 < cadence < 1 else int(cadence)


def _duration(text: str) -> float | None:
    """The seconds of "3h50m"; None if it is no duration, or none at all."""
    match = re.fullmatch(r"(?:(\d{1,5})d)?(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,9})s)?", text)
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    return sum(part * seconds for part, seconds in zip(parts, (86400, 3600, 60, 1), strict=False)) or None


def flatten(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    """The leaves of nested dicts by their path: {"a": {"b": 1}} becomes {"a.b": 1}."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{name}{separator}{path}": leaf for path, leaf in flatten(value, separator).items()}
        else:
            leaves[name] = value
    return leaves


_DATASETS = ("lm1b", "hub")
_READ_BY = {
    "path": ("enwik8", "text8", "file"),
    **dict.fromkeys(("hub_id", "hub_config", "hub_revision", "text_column", "separator"), _DATASETS),
    **dict.fromkeys(("train_split", "valid_split", "test_split"), _DATASETS),
    **dict.fromkeys(("valid_fraction", "test_fraction"), (*_DATASETS, "file", "python-stdlib")),
}
"""Options of some corpora only. Set for another one, they would be ignored without a word."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes ids."""

    corpus: CorpusName = "enwik8"
    """enwik8 and text8 are downloaded once and verified; file is data.path; hub is data.hub_id; lm1b is a dataset of
    the hub, too; python-stdlib needs no network."""
    path: Path | None = None
    """A local copy of enwik8 or text8 (raw, .zip, .gz, .xz), or the file or folder of corpus=file."""
    cache_dir: Path = field(default_factory=lambda: Path(os.environ.get("CHARLM_CACHE") or "~/.cache/charlm"))
    """Where prepared corpora are kept. The environment variable CHARLM_CACHE changes the default."""
    vocabulary: Literal["bytes", "characters", "sentencepiece"] = "bytes"
    """How text becomes ids: bytes has always 256 symbols; characters has those of the training split, which the other
    splits must not exceed; sentencepiece has its common characters, and spells the others in bytes."""
    character_coverage: float = 0.9995
    """Share of the training split that the characters of vocabulary=sentencepiece make up, in [0.98, 1]."""
    hub_id: str | None = None
    """The dataset of corpus=hub, OWNER/NAME, or a local folder of parquet files. For lm1b: another copy of it."""
    hub_config: str | None = None
    """Which of the dataset's configurations, where it has several."""
    hub_revision: str | None = None
    """Branch, tag or commit of the dataset; default its main branch at the time of preparation."""
    text_column: str = "text"
    """The dataset's column that holds the documents."""
    train_split: str = "train"
    """The dataset's split to train on."""
    valid_split: str | None = None
    """Its split for validation; by default validation if there is one, else the end of the training split."""
    test_split: str | None = None
    """Its split for testing; by default test if there is one, else the end of the training split."""
    separator: str = "\n"
    """What is put between two documents of a dataset."""
    valid_fraction: float = 0.05
    """Share of the text that is held out for validation, where a corpus has no such split of its own."""
    test_fraction: float = 0.05
    """Share of the text that is held out for testing, at the end, where a corpus has no such split of its own."""

    def __post_init__(self):
        for name in ("valid_fraction", "test_fraction"):
            _require(0 < getattr(self, name) < 1, f"data.{name}", getattr(self, name), "must lie between 0 and 1")
        total = self.valid_fraction + self.test_fraction
        _require(total < 1, "data.valid_fraction + data.test_fraction", total, "leaves no training text; lower one")
        _require(
            self.corpus != "file" or self.path is not None, "data.corpus", "file", "needs --data.path=FILE_OR_FOLDER"
        )
        _require(self.corpus != "hub" or self.hub_id, "data.corpus", "hub", "needs --data.hub_id=OWNER/NAME_OR_FOLDER")
        _require(
            0.98 <= self.character_coverage <= 1,
            "data.character_coverage",
            self.character_coverage,
            "must lie in [0.98, 1]",
        )
        splits = [name for name in (self.train_split, self.valid_split, self.test_split) if name is not None]
        _require(
            len(set(splits)) == len(splits),
            "data.train_split, valid_split, test_split",
            ", ".join(splits),
            "a split is named twice; name another, or none to hold out the end of the training split",
        )
        for name, corpora in _READ_BY.items():
            _require(
                self.corpus in corpora or getattr(self, name) == getattr(DataConfig, name),
                f"data.{name}",
                getattr(self, name),
                f"corpus={self.corpus} has no use for it; leave it out, or choose --data.corpus={' or '.join(corpora)}",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The deep character Transformer. Defaults are T12 of Al-Rfou et al. 2018 without its dropout."""

    num_layers: int = 12
    """L, the number of layers."""
    num_heads: int = 2
    """H, attention heads per layer; must divide d_model."""
    d_model: int = 512
    """D, the width of the hidden states."""
    d_ff: int = 2048
    """Width of the feed-forward layer."""
    context_length: int = 512
    """T, the most characters that a prediction can look back on."""
    positions: Literal["per_layer", "input", "rotary"] = "per_layer"
    """per_layer: a learned table is added to the input of every layer (the paper); input: to the first layer's
    only; rotary: queries and keys are rotated (Su et al. 2021)."""
    ngrams: tuple[int, ...] = ()
    """Lengths of n-grams whose embeddings are added to the character's, from hashed tables (Pagnoni et al. 2024, Byte
    Latent Transformer, section 3.2.1), as a YAML list: [2, 3, 4]. They cost memory and hardly any arithmetic."""
    ngram_buckets: int = 32_768
    """Rows of each n-gram table."""
    ngram_width: int = 64
    """Columns of each n-gram table; a matrix takes the rows of all tables together to d_model."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sublayer (pre) or after its residual sum (post). The paper does not say."""
    activation: Literal["relu", "gelu", "relu_squared"] = "relu"
    """Of the feed-forward layer. relu_squared is So et al. 2021 (Primer)."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """How the matrices that write to the residual stream start: scaled by 1 / sqrt(2L) (Radford et al. 2019), or at
    zero, so that every sublayer starts by adding nothing (Zhang et al. 2019, Fixup)."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights."""
    activation_dropout: float = 0.0
    """Dropout after the feed-forward activation."""
    residual_dropout: float = 0.0
    """Dropout on what each sublayer adds to the residual stream."""

    def __post_init__(self):
        for name in (
            "num_layers",
            "num_heads",
            "d_model",
            "d_ff",
            "context_length",
            "ngram_buckets",
            "ngram_width",
        ):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        # Deeper than any, and shallow enough for the table of terms to be counted.
        _require(self.num_layers <= 10_000, "model.num_layers", self.num_layers, "must be at most 10,000")
        _require(
            self.d_model % self.num_heads == 0,
            "model.d_model",
            self.d_model,
            f"must be divisible by model.num_heads={self.num_heads}",
        )
        _require(
            self.positions != "rotary" or self.d_model // self.num_heads % 2 == 0,
            "model.positions",
            "rotary",
            f"needs an even head size; d_model / num_heads is {self.d_model // self.num_heads}",
        )
        _require(
            all(2 <= n <= 64 for n in self.ngrams) and len(set(self.ngrams)) == len(self.ngrams),
            "model.ngrams",
            list(self.ngrams),
            "must be different lengths from 2 to 64",
        )
        for name in ("attention_dropout", "activation_dropout", "residual_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """What every auxiliary loss has: a switch and a schedule, whose clock runs from 0 at `start` to 1 at `end`."""

    enabled: bool = True
    """false removes exactly this loss's rows from the table of terms."""
    start: float = 0.0
    """Progress at which the schedule's clock starts; before it the weight is full."""
    end: float = 1.0
    """Progress at which the schedule's clock has run out."""

    _section = "aux"

    def __post_init__(self):
        _require(0 <= self.start <= 1, f"{self._section}.start", self.start, "must lie in [0, 1]")
        _require(0 <= self.end <= 1, f"{self._section}.end", self.end, "must lie in [0, 1]")
        _require(self.start <= self.end, f"{self._section}.start", self.start, f"must not exceed end={self.end}")


Decay = Literal["constant", "linear", "cosine", "cutoff"]


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(AuxLossConfig):
    """Prediction at all positions of a window, not only at the last (Al-Rfou et al. 2018, "Multiple Positions")."""

    schedule: Decay = "constant"
    """The share w of the loss that all positions carry; the last position alone carries the rest, 1 - w.
    constant: w stays 1; linear, cosine: w falls to 0; cutoff: w is 1 until the clock runs out, then 0."""

    _section = "aux.positions"


@dataclass(frozen=True, kw_only=True)
class LayersConfig(AuxLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal["staggered", "linear", "cosine", "constant", "cutoff"] = "staggered"
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper); the others act on all layers alike."""
    every: int = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[int, ...] | None = None
    """Heads on these layers (1 = the lowest) in place of every k-th, as a YAML list: [3, 6, 9]."""
    weight: float = 1.0
    """Weight of each intermediate layer's loss against the last layer's."""

    _section = "aux.layers"

    def __post_init__(self):
        super().__post_init__()
        _require(self.every >= 1, "aux.layers.every", self.every, "must be at least 1")
        _require(0 <= self.weight < float("inf"), "aux.layers.weight", self.weight, "must be finite and at least 0")
        _require(self.at is None or len(set(self.at)) == len(self.at), "aux.layers.at", self.at, "names a layer twice")


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(AuxLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Decay = "constant"
    """How the extra targets' weight decays."""
    num_targets: int = 2
    """Characters predicted at each position: the next one and num_targets - 1 after it."""
    weight: float = 0.5
    """Weight of each extra target, multiplied into its layer's loss."""

    _section = "aux.targets"

    def __post_init__(self):
        super().__post_init__()
        _require(1 <= self.num_targets <= 1000, "aux.targets.num_targets", self.num_targets, "must lie in [1, 1000]")
        _require(0 <= self.weight < float("inf"), "aux.targets.weight", self.weight, "must be finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class AuxConfig:
    """The auxiliary losses; `scripts/explain.py` prints the table of terms that they make."""

    positions: PositionsConfig = field(default_factory=PositionsConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    reduction: Literal["sum", "mean"] = "sum"
    """Add the losses of the active layers, or average them. The paper does not say."""
    main_weight: float = 1.0
    """Weight of the last layer's loss."""

    def __post_init__(self):
        _require(
            0 <= self.main_weight < float("inf"), "aux.main_weight", self.main_weight, "must be finite and at least 0"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Cadences and warm-up: a value below 1 is a fraction of `steps`, from 1 on a number of steps."""

    steps: int = 100_000
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Windows per optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Most windows that one process holds at once; fewer means gradient accumulation. None: no accumulation; auto: as
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

    def __post_init__(self):
        for name in ("steps", "batch_size", "context_divisor", "max_skipped", "valid_symbols", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        _require(
            self.micro_batch_size in (None, "auto") or self.micro_batch_size >= 1,
            "train.micro_batch_size",
            self.micro_batch_size,
            "must be at least 1, or auto",
        )
        for name in ("learning_rate", "muon_learning_rate", "ngram_learning_rate"):
            _require(
                0 < getattr(self, name) < float("inf"),
                f"train.{name}",
                getattr(self, name),
                "must be positive and finite",
            )
        for name in ("momentum", "muon_momentum"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must lie in [0, 1)")
        _require(
            len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas),
            "train.adam_betas",
            self.adam_betas,
            "must be two numbers in [0, 1)",
        )
        for name in ("weight_decay", "clip_norm", "spike_threshold", "warmup", "checkpoint_every"):
            _require(
                0 <= getattr(self, name) < float("inf"),
                f"train.{name}",
                getattr(self, name),
                "must be finite and at least 0",
            )
        for name in ("full_context_from", "final_lr"):
            _require(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "must lie in [0, 1]")
        for name in ("log_every", "valid_every"):
            cadence = getattr(self, name)
            _require(0 < cadence < float("inf"), f"train.{name}", cadence, "must be positive and finite")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "must lie in [0, 2^63)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives on disk."""

    dir: Path = Path("runs/charlm")
    """The run's folder. It must not hold a run already, unless that run is resumed."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    resume_from: int | None = None
    """Continue the run from the checkpoint of this step."""
    auto_resume: bool = False
    """Continue the run if there is one, else begin it: what a queue that starts a job again needs."""
    max_time: str | None = None
    """Checkpoint and stop when the process has run for so long, before a queue's limit: 3h50m, 90m, 1d12h."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers that get every number of metrics.jsonl too, each a package of its own to be installed:
    tensorboard, or a list, [tensorboard, wandb]."""
    project: str = "charlm"
    """What trackers that group runs by project or experiment call this one."""

    def __post_init__(self):
        _require(
            self.resume_from is None or self.resume_from >= 0,
            "run.resume_from",
            self.resume_from,
            "must be the step of a checkpoint",
        )
        _require(
            self.resume_from is None or not self.auto_resume,
            "run.resume_from",
            self.resume_from,
            "would go back to that step whenever a queue starts the command again; not with run.auto_resume",
        )
        _require(
            self.max_time is None or _duration(self.max_time) is not None,
            "run.max_time",
            self.max_time,
            "must be a time like 3h50m, of days (d), hours, minutes and seconds",
        )
        _require(len(set(self.tracker)) == len(self.tracker), "run.tracker", self.tracker, "names a tracker twice")

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else _duration(self.max_time)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: what a YAML file and flags describe, and what `RUN/config.yaml` records."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    aux: AuxConfig = field(default_factory=AuxConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        for layer in self.aux.layers.at or ():
            _require(
                1 <= layer <= self.model.num_layers,
                "aux.layers.at",
                list(self.aux.layers.at),
                f"names layer {layer}; layers run from 1 to model.num_layers={self.model.num_layers}",
            )
