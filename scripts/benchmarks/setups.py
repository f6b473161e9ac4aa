"""Who is measured: charlm and its peers, each as it comes and with every trick that applies. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from benchmarks.shapes import Shape
from charlm.config import UserError

Task = Literal["train", "evaluate", "generate", "drafts", "matrix product"]
Dtype = Literal["fp32", "bf16"]
MODULES = {
    "x-transformers": "x_transformers",
    "transformers GPT-2": "transformers",
    "transformers Llama": "transformers",
    "torch TransformerEncoder": "torch",
}
"""Peers by the module that must be installed."""
AS_IT_COMES, TUNED, COMPILED, TUNED_MEDIUM = "as it comes", "tuned", "tuned, compiled", "tuned, medium"
ALL_LOSSES, MAIN_LOSS, CHECKPOINTED = "all losses", "main loss alone", "all losses, checkpointed"
CHARLM_COMPILED = "all losses, compiled"
PLAIN = "no drafts"
ALLOCATOR = {
    "cpu": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)},
    "cuda": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}
"""Memory that is kept for the next step (glibc's malloc; torch's own on a GPU)."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A library with its settings."""

    library: str
    setup: str
    precision: Dtype
    """bf16 is autocast."""
    matmul_precision: Literal["highest", "medium"] = "highest"
    """Of a peer's fp32 matrix products; charlm chooses its own."""
    tuned: bool = False
    """Every public setting of the library that makes it faster, fused AdamW, and `ALLOCATOR`."""
    compile: bool = False
    auxiliary: bool = False
    activation_checkpointing: bool = False
    draft: Literal["offsets"] | int | None = None
    """drafts: what charlm drafts from."""

    @property
    def name(self) -> str:
        return f"{self.library}, {self.setup}"

    def environment(self, device: str) -> dict[str, str]:
        """Variables that its process is started with."""
        return ALLOCATOR[device] if self.tuned else {}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker process measures."""

    task: Task
    contestant: Contestant
    shape: Shape
    text: Path
    """File of the characters, in a folder where a contestant may write."""
    device: Literal["cpu", "cuda"]
    warmup: int
    """Steps of a turn that are not timed. On a GPU charlm logs, which waits for the device, only every `steps` steps:
    there it must be as many in training."""
    steps: int
    """Steps of a turn that are."""
    threads: int | None = None
    stride: int = 1
    """evaluate: symbols from one window to the next."""
    windows: int = 64
    """evaluate: windows of a step."""
    prompts: int = 1
    """generate: texts that are written at once; drafts: one after the other."""
    length: int = 128
    """generate, drafts: characters of a step and text."""
    run: Path | None = None
    """drafts: the trained run that writes."""
    temperature: float = 1.0
    """drafts: of sampling."""
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, for `from_dict`."""
        return asdict(self) | {"text": str(self.text), "run": str(self.run) if self.run else None}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Job":
        """The job that `to_dict` described."""
        parts = {
            "contestant": Contestant(**record["contestant"]),
            "shape": Shape(**record["shape"]),
            "text": Path(record["text"]),
            "run": Path(record["run"]) if record["run"] else None,
        }
        return cls(**record | parts)


def charlm(precision: Dtype, setup: str = ALL_LOSSES) -> Contestant:
    """charlm as it comes, in one of its set-ups."""
    return Contestant(
        library="charlm",
        setup=setup,
        precision=precision,
        auxiliary=setup != MAIN_LOSS,
        compile=setup == CHARLM_COMPILED,
        activation_checkpointing=setup == CHECKPOINTED,
    )


def training_lineup(precision: Dtype, compile: bool, peers: Sequence[str]) -> list[Contestant]:
    """charlm with and without its auxiliary losses, and each peer: as it comes, tuned, and compiled if asked."""
    own = [ALL_LOSSES, *([CHARLM_COMPILED] if compile else []), MAIN_LOSS]
    contestants = [charlm(precision, setup) for setup in own]
    for peer in peers:
        tuned = {"library": peer, "precision": precision, "matmul_precision": "medium", "tuned": True}
        contestants.append(Contestant(library=peer, setup=AS_IT_COMES, precision="fp32"))
        contestants.append(Contestant(setup=TUNED, **tuned))
        contestants += [Contestant(setup=COMPILED, compile=True, **tuned)] if compile else []
    return contestants


def evaluation_lineup(precision: Dtype) -> list[Contestant]:
    """charlm's evaluation, and a plain loop over the same model."""
    plain = {"library": "plain loop", "precision": precision}
    return [
        charlm(precision, "as it comes"),
        Contestant(setup=AS_IT_COMES, **plain),
        Contestant(setup=TUNED, matmul_precision="medium", tuned=True, **plain),
    ]


def generation_lineup(compile: bool, peers: Sequence[str]) -> list[Contestant]:
    """charlm's generation and that of each peer that has a cache, all in fp32."""
    contestants = [charlm("fp32", "as it comes")]
    for peer in peers:
        if peer != "torch TransformerEncoder":  # which has no cache
            plain = {"library": peer, "precision": "fp32"}
            contestants.append(Contestant(setup=AS_IT_COMES, **plain))
            contestants.append(Contestant(setup=TUNED, tuned=True, **plain))
            # Which of the two is faster depends on the processor and the number of prompts.
            contestants.append(Contestant(setup=TUNED_MEDIUM, tuned=True, matmul_precision="medium", **plain))
            if compile and peer != "x-transformers":  # whose cache grows: every character would compile anew
                contestants.append(Contestant(setup=COMPILED, tuned=True, compile=True, **plain))
    return contestants


def drafts_lineup(pairs: Iterable[tuple[int, int]], num_layers: int) -> list[Contestant]:
    """A run's plain generation and its ways to drafts: all its extra targets, and each exit in the lower half.

    `pairs`: the layers and offsets that it has heads for.
    """
    exits = [layer for layer, offset in pairs if offset == 1 and layer <= num_layers / 2]
    extra = ["offsets"] if any(layer == num_layers and offset > 1 for layer, offset in pairs) else []
    common = {"library": "charlm", "precision": "fp32", "auxiliary": True}
    return [
        Contestant(setup=PLAIN, **common),
        *(Contestant(setup=f"drafts from {way}", draft=way, **common) for way in extra),
        *(Contestant(setup=f"drafts from layer {way}", draft=way, **common) for way in exits),
    ]


def installed_peers(only: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """The peers to measure (`only` these, if any are named), and a line about each that is not installed.

    Raises:
        UserError: `only` names no peer.
    """
    only = list(only)
    for name in only:
        if name not in MODULES:
            raise UserError(f"peers={name}: must be some of {', '.join(MODULES)}")
    wanted = [name for name in MODULES if name in only or not only]
    missing = [name for name in wanted if find_spec(MODULES[name]) is None]
    lines = [f"{name} is not installed and left out: pip install -r requirements-benchmark.txt" for name in missing]
    return [name for name in wanted if name not in missing], lines
