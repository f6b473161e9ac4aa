"""The set-ups that are measured: charlm and its peers, each as it comes and tuned. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from benchmarks.shapes import Shape
from charlm.config import UserError

Task = Literal["train", "evaluate", "generate", "drafts", "quality", "matrix product"]
Dtype = Literal["fp32", "bf16"]
MODULES = {
    "x-transformers": "x_transformers",
    "transformers GPT-2": "transformers",
    "transformers Llama": "transformers",
    "torch TransformerEncoder": "torch",
}
"""The module that each peer needs."""
AS_IT_COMES, TUNED, COMPILED, TUNED_MEDIUM = "as it comes", "tuned", "tuned, compiled", "tuned, medium"
ALL_LOSSES, MAIN_LOSS, CHECKPOINTED = "all losses", "main loss alone", "all losses, checkpointed"
CHARLM_COMPILED = "all losses, compiled"
PLAIN = "no drafts"
DRAFT_FACTS = ("num_draft_tokens", "acceptance_rate", "characters_per_pass")
ALLOCATOR = {
    "cpu": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)},
    "cuda": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}
"""Environment variables that keep freed memory for the next step (glibc's malloc; torch's allocator on a GPU)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A library with its settings."""

    library: str
    label: str
    """The property that tells the set-ups of a library apart."""
    precision: Dtype
    """bf16 means autocast."""
    matmul_precision: Literal["highest", "medium"] = "highest"
    """Precision of a peer's fp32 matrix products. charlm chooses its own."""
    tuned: bool = False
    """Use every public setting of the library that makes it faster, fused AdamW, and `ALLOCATOR`."""
    compile: bool = False
    auxiliary: bool = False
    activation_checkpointing: bool = False
    draft: Literal["offsets"] | int | None = None
    """drafts: what charlm drafts from."""

    @property
    def name(self) -> str:
        return f"{self.library}, {self.label}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The measurement of one worker process."""

    task: Task
    setup: Setup
    shape: Shape
    text: Path
    """File of the characters to read, for quality charlm's config; its folder may be written to."""
    device: Literal["cpu", "cuda"]
    warmup: int
    """Untimed steps of a turn. In training on a GPU it must equal `steps`, because charlm waits for the device only
    when it logs, every `steps` steps."""
    steps: int
    """Timed steps of a turn."""
    threads: int | None = None
    stride: int = 1
    """evaluate: symbols from one window to the next."""
    windows: int = 64
    """evaluate: windows of a step."""
    prompts: int = 1
    """generate: texts written together; drafts: texts written one after the other."""
    length: int = 128
    """generate, drafts: characters written to each text in a step."""
    run: Path | None = None
    """drafts: the trained run."""
    temperature: float = 1.0
    """drafts: sampling temperature."""
    learning_rate: float | None = None
    """quality: a peer's."""
    seed: int = 0


def charlm(precision: Dtype, label: str = ALL_LOSSES) -> Setup:
    """One of charlm's set-ups."""
    return Setup(
        library="charlm",
        label=label,
        precision=precision,
        auxiliary=label != MAIN_LOSS,
        compile=label == CHARLM_COMPILED,
        activation_checkpointing=label == CHECKPOINTED,
    )


def training_lineup(precision: Dtype, compile: bool, peers: Sequence[str]) -> list[Setup]:
    """charlm with and without its auxiliary losses, and each peer: as it comes, tuned, and compiled if asked."""
    own = [ALL_LOSSES, *([CHARLM_COMPILED] if compile else []), MAIN_LOSS]
    setups = [charlm(precision, label) for label in own]
    for peer in peers:
        tuned = {"library": peer, "precision": precision, "matmul_precision": "medium", "tuned": True}
        setups.append(Setup(library=peer, label=AS_IT_COMES, precision="fp32"))
        setups.append(Setup(label=TUNED, **tuned))
        setups += [Setup(label=COMPILED, compile=True, **tuned)] if compile else []
    return setups


def evaluation_lineup(precision: Dtype) -> list[Setup]:
    """charlm's evaluation, and a plain loop over the same model."""
    plain = {"library": "plain loop", "precision": precision}
    return [
        charlm(precision, "as it comes"),
        Setup(label=AS_IT_COMES, **plain),
        Setup(label=TUNED, matmul_precision="medium", tuned=True, **plain),
    ]


def generation_lineup(compile: bool, peers: Sequence[str]) -> list[Setup]:
    """charlm's generation, and that of each peer with a cache, all in fp32."""
    setups = [charlm("fp32", "as it comes")]
    for peer in peers:
        if peer != "torch TransformerEncoder":  # which has no cache
            plain = {"library": peer, "precision": "fp32"}
            setups.append(Setup(label=AS_IT_COMES, **plain))
            setups.append(Setup(label=TUNED, tuned=True, **plain))
            # Which of the two is faster depends on the processor and the number of prompts.
            setups.append(Setup(label=TUNED_MEDIUM, tuned=True, matmul_precision="medium", **plain))
            if compile and peer != "x-transformers":  # whose cache grows: every character would compile anew
                setups.append(Setup(label=COMPILED, tuned=True, compile=True, **plain))
    return setups


def drafts_lineup(pairs: Iterable[tuple[int, int]], num_layers: int) -> list[Setup]:
    """A run's plain generation, drafts from all its extra targets, and drafts from each exit in the lower half.

    `pairs` are the (layer, offset) pairs of its heads.
    """
    exits = [layer for layer, offset in pairs if offset == 1 and layer <= num_layers / 2]
    has_extra = any(layer == num_layers and offset > 1 for layer, offset in pairs)
    ways = {PLAIN: None} | ({"drafts from offsets": "offsets"} if has_extra else {})
    ways |= {f"drafts from layer {layer}": layer for layer in exits}
    common = {"library": "charlm", "precision": "fp32", "auxiliary": True}
    return [Setup(label=label, draft=way, **common) for label, way in ways.items()]


def installed_peers(only: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The installed peers (of `only`, if any are named), and a line about each that is missing.

    Raises:
        UserError: `only` names no peer.
    """
    for name in only:
        if name not in MODULES:
            raise UserError(f"peers={name}: must be some of {', '.join(MODULES)}")
    wanted = [name for name in MODULES if name in only or not only]
    missing = [name for name in wanted if find_spec(MODULES[name]) is None]
    lines = [f"{name} is not installed and left out: pip install -r requirements-benchmark.txt" for name in missing]
    return [name for name in wanted if name not in missing], lines
