"""Runs one trial in a process of its own: python -m benchmarks.worker

The parent sends a `Trial` as a line of JSON, then "turn" or "stop". Replies are lines of JSON on stdout.
"""

import contextlib
import os
import sys
from collections.abc import Callable

import torch
from pydantic import TypeAdapter

from benchmarks.setups import Trial
from benchmarks.timing import Stop, Timer


def main() -> None:
    """Measure the trial that stdin describes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what libraries print out of the replies
    trial = TypeAdapter(Trial).validate_json(sys.stdin.buffer.readline())
    if trial.threads is not None:
        torch.set_num_threads(trial.threads)
    torch.manual_seed(trial.seed)
    timer = Timer(sys.stdin.buffer, replies, warmup=trial.warmup, steps=trial.steps, device=trial.device)
    with contextlib.suppress(Stop, BrokenPipeError):  # BrokenPipeError: the parent is gone
        measurement_of(trial)(trial, timer)


def measurement_of(trial: Trial) -> Callable[[Trial, Timer], None]:
    """The function that measures a trial."""
    from benchmarks import inference, quality, training

    charlms, others = {
        "train": (training.train_charlm, training.train_peer),
        "evaluate": (inference.evaluate_charlm, inference.evaluate_plainly),
        "generate": (inference.generate_charlm, inference.generate_peer),
        "drafts": (inference.generate_with_drafts, None),
        "quality": (quality.train_charlm, quality.train_peer),
        "matrix product": (None, multiply_matrices),
    }[trial.task]
    return charlms if trial.setup.library == "charlm" else others


def multiply_matrices(trial: Trial, timer: Timer) -> None:
    """The product of two square matrices of 2048, on a GPU of 8192, in the set-up's arithmetic."""
    size = 2048 if trial.device == "cpu" else 8192  # smaller ones do not fill a GPU
    torch.set_float32_matmul_precision(trial.setup.matmul_precision)
    dtype = torch.bfloat16 if trial.setup.precision == "bf16" else torch.float32
    timer.start()
    left, right = (torch.randn(size, size, device=trial.device).to(dtype) for _ in range(2))
    timer.ready(flop_per_step=2 * size**3)
    with torch.inference_mode():
        timer.repeat(lambda: torch.mm(left, right))


if __name__ == "__main__":
    main()
