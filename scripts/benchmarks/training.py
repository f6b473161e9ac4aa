"""Training steps: charlm's through its own loop, a peer's through the loop that everybody writes.

Shapes: B windows of a batch, W characters of a window.
"""

import torch

from benchmarks.peers import autocast, build_peer, matrix_parameters
from benchmarks.setups import Job
from benchmarks.shapes import charlm_config, text_config
from benchmarks.timing import Turns
from charlm.data.corpus import load_corpus
from charlm.data.windows import training_windows
from charlm.objective.count import dense_flops, num_parameters
from charlm.process import keep_freed_memory

NUM_BATCHES = 64
"""Batches of a peer, drawn before its first turn and used over and over."""


def train_charlm(job: Job, turns: Turns) -> None:
    """`charlm.train` itself, batches, schedules and logging included."""
    from charlm.report.explain import explain
    from charlm.training import loop

    config = charlm_config(
        job.shape,
        job.text,
        mixed_precision="bf16" if job.contestant.precision == "bf16" else "no",
        auxiliary=job.contestant.auxiliary,
        compile=job.contestant.compile,
        activation_checkpointing=job.contestant.activation_checkpointing,
    )
    explanation = explain(config)

    class CountedTraining(loop.Training):
        def prepare(self) -> None:
            super().prepare()
            turns.ready(
                parameters=explanation.parameters["training"],
                flop_per_step=explanation.flops_per_character["training_start"] * job.shape.characters,
                characters_per_step=job.shape.characters,
            )

        def step(self) -> None:
            super().step()
            turns.done()

    loop.Training = CountedTraining
    keep_freed_memory()
    turns.start()
    loop.train(config)


def train_peer(job: Job, turns: Turns) -> None:
    """The plain loop: batch, loss, backward, step. Batches are on the device already, which costs a peer nothing."""
    contestant, shape = job.contestant, job.shape
    torch.set_float32_matmul_precision(contestant.matmul_precision)
    ids = load_corpus(text_config(job.text), show_progress=False).splits["train"].ids
    batches = [
        torch.from_numpy(
            training_windows(
                ids, seed=job.seed, step=step, batch_size=shape.batch_size, window_length=shape.context_length + 1
            )
        ).to(job.device)
        for step in range(NUM_BATCHES)
    ]
    turns.start()
    model, loss_of = build_peer(contestant, shape)
    model.to(job.device).train()
    # transformers' Trainer takes the fused one by default.
    fused = contestant.tuned or contestant.library.startswith("transformers")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, **({"fused": True} if fused else {}))
    step_loss = torch.compile(loss_of) if contestant.compile else loss_of
    parameters = matrix_parameters(model)
    turns.ready(
        parameters=num_parameters(model),
        flop_per_step=shape.characters * dense_flops(parameters, shape.num_layers, shape.d_model, shape.context_length),
        characters_per_step=shape.characters,
    )
    count = 0

    def step() -> None:
        nonlocal count
        with autocast(job):
            loss = step_loss(batches[count % NUM_BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1

    turns.play(step)
