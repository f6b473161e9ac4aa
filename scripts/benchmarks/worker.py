"""One contestant in a process of its own, with its own settings and environment.

The parent sends a `Job`, then "turn" or "stop"; each message is a line of JSON, through stdin and stdout.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable

import torch

from benchmarks.setups import Job
from benchmarks.timing import Stop, Turns


def main() -> None:
    """Measure what stdin asks for."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    job = Job.from_dict(json.loads(sys.stdin.buffer.readline()))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    turns = Turns(sys.stdin.buffer, replies, warmup=job.warmup, steps=job.steps, device=job.device)
    with contextlib.suppress(Stop, EOFError, BrokenPipeError):  # or the parent is gone
        contestant_of(job)(job, turns)


def contestant_of(job: Job) -> Callable[[Job, Turns], None]:
    """The function that plays this job."""
    from benchmarks import inference, training

    if job.task == "train":
        return training.train_charlm if job.contestant.library == "charlm" else training.train_peer
    if job.task == "evaluate":
        return inference.evaluate_charlm if job.contestant.library == "charlm" else inference.evaluate_plainly
    if job.task == "generate":
        return inference.generate_charlm if job.contestant.library == "charlm" else inference.generate_peer
    if job.task == "drafts":
        return inference.write_with_drafts
    return matrix_products


def matrix_products(job: Job, turns: Turns) -> None:
    """A product of two square matrices of 2048, one contestant per kind of arithmetic."""
    torch.set_float32_matmul_precision(job.contestant.matmul_precision)
    dtype = torch.bfloat16 if job.contestant.precision == "bf16" else torch.float32
    turns.start()
    left, right = (torch.randn(2048, 2048, device=job.device).to(dtype) for _ in range(2))
    turns.ready(flop_per_step=2 * 2048**3)
    with torch.inference_mode():
        turns.play(lambda: torch.mm(left, right))


if __name__ == "__main__":
    main()
