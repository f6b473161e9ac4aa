"""Training steps: charlm's in its own loop, a peer's in a plain one.

Shapes: B windows of a batch, W characters of a window.
"""

import torch

from benchmarks.peers import autocast, build_peer, matrix_parameters
from benchmarks.setups import Trial
from benchmarks.shapes import charlm_config, text_config
from benchmarks.timing import Timer
from charlm.data.corpus import load_corpus
from charlm.data.windows import training_windows
from charlm.objective.count import dense_flops, num_parameters
from charlm.process import keep_freed_memory

NUM_BATCHES = 64
"""Batches drawn before a peer's first turn, and used over and over."""


def train_charlm(trial: Trial, timer: Timer) -> None:
    """Steps of `charlm.train`, with batches, schedules and logging."""
    from charlm.report.explain import explain
    from charlm.training.loop import Training, train

    config = charlm_config(
        trial.shape,
        trial.text,
        auxiliary=trial.setup.auxiliary,
        mixed_precision=trial.setup.precision,
        compile="yes" if trial.setup.compile else "no",
        activation_checkpointing=trial.setup.activation_checkpointing,
    )
    explanation = explain(config)

    class TimedTraining(Training):
        def prepare(self) -> None:
            super().prepare()
            timer.ready(
                parameters=explanation.parameters["training"],
                flop_per_step=explanation.flops_per_character["training_start"] * trial.shape.characters,
                characters_per_step=trial.shape.characters,
            )

        def step(self) -> None:
            super().step()
            timer.done()

    keep_freed_memory()
    timer.start()
    train(config, TimedTraining)


def train_peer(trial: Trial, timer: Timer) -> None:
    """Steps of a plain loop: loss, backward, update. Its batches are on the device already, so they cost it nothing."""
    setup, shape = trial.setup, trial.shape
    torch.set_float32_matmul_precision(setup.matmul_precision)
    ids = load_corpus(text_config(trial.text), show_progress=False).splits["train"].ids
    batches = [
        torch.from_numpy(
            training_windows(
                [ids], seed=trial.seed, step=step, batch_size=shape.batch_size, window_length=shape.context_length + 1
            )
        ).to(trial.device)
        for step in range(NUM_BATCHES)
    ]
    timer.start()
    model, loss_of = build_peer(setup, shape)
    model.to(trial.device).train()
    # The default of transformers' Trainer is fused.
    fused = setup.tuned or setup.library.startswith("transformers")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, **({"fused": True} if fused else {}))
    step_loss = torch.compile(loss_of) if setup.compile else loss_of
    parameters = matrix_parameters(model)
    timer.ready(
        parameters=num_parameters(model),
        flop_per_step=shape.characters * dense_flops(parameters, shape.num_layers, shape.d_model, shape.context_length),
        characters_per_step=shape.characters,
    )
    count = 0

    def step() -> None:
        nonlocal count
        with autocast(trial):
            loss = step_loss(batches[count % NUM_BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1

    timer.repeat(step)
