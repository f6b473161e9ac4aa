"""Evaluation and generation: charlm's, a plain loop's, a peer's.

Shapes: B batch, T positions, D d_model, K offsets, V vocabulary, W = T + 1 characters of a window.
"""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import autocast, build_peer
from benchmarks.setups import Job
from benchmarks.shapes import charlm_config, text_config
from benchmarks.timing import Turns
from charlm.data.corpus import load_corpus
from charlm.objective.build import build_objective
from charlm.objective.count import num_parameters
from charlm.process import keep_freed_memory
from charlm.runs.load import TrainedModel, load

PLAIN_BATCH = 32
"""Windows that the plain loop runs at once."""


def untrained_model(job: Job) -> TrainedModel:
    """charlm's model of the shape, the same in every process, with the one head that a finished run keeps."""
    config = charlm_config(job.shape, job.text, mixed_precision="no", auxiliary=False)
    corpus = load_corpus(config.data, show_progress=False)
    objective = build_objective(config, corpus.vocabulary.size).to(job.device).eval()
    return TrainedModel(
        config=config,
        transformer=objective.transformer,
        heads=objective.heads,
        vocabulary=corpus.vocabulary,
        checkpoint="step-00000000",
        step=0,
        corpus={"name": corpus.name, "sha256": corpus.sha256},
        device=torch.device(job.device),
    )


def evaluate_charlm(job: Job, turns: Turns) -> None:
    """`bits_per_character` over as much text as `job.windows` windows score."""
    from charlm.inference.evaluation import bits_per_character

    corpus = load_corpus(text_config(job.text), show_progress=False)
    keep_freed_memory()
    turns.start()
    trained = untrained_model(job)
    turns.ready(**_evaluation_facts(job, trained))
    limit = job.shape.context_length + 1 + (job.windows - 1) * job.stride
    turns.play(
        lambda: bits_per_character(
            trained,
            corpus,
            split="train",
            stride=job.stride,
            limit=limit,
            precision=job.contestant.precision,
            show_progress=False,
        )
    )


def evaluate_plainly(job: Job, turns: Turns) -> None:
    """The loop that everybody writes: batches of windows through the whole model, then their last `stride` costs."""
    torch.set_float32_matmul_precision(job.contestant.matmul_precision)
    ids = load_corpus(text_config(job.text), show_progress=False).splits["train"].ids
    T, last = job.shape.context_length, job.shape.num_layers
    turns.start()
    trained = untrained_model(job)
    starts = np.arange(job.windows) * job.stride
    turns.ready(**_evaluation_facts(job, trained))

    @torch.no_grad()
    def step() -> float:
        nats = 0.0
        for first in range(0, len(starts), PLAIN_BATCH):
            windows = ids[starts[first : first + PLAIN_BATCH, None] + np.arange(T + 1)].astype(np.int64)
            windows_BW = torch.from_numpy(windows).to(job.device)
            with autocast(job):
                hidden_BTD = trained.transformer(windows_BW[:, :-1])[last]
                logits_BTV = trained.heads(hidden_BTD, last)[:, :, 0]
            targets_BT = windows_BW[:, 1:]
            nats += _cost(logits_BTV[:, -job.stride :], targets_BT[:, -job.stride :])
            if first == 0:  # the first window scores all of its characters
                nats += _cost(logits_BTV[:1, : -job.stride], targets_BT[:1, : -job.stride])
        return nats

    turns.play(step)


def _cost(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> float:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum").item()


def _evaluation_facts(job: Job, trained: TrainedModel) -> dict[str, int]:
    """A window stands for `stride` characters: that the first one scores all of its own is not counted."""
    parameters = num_parameters(trained.transformer, trained.heads)
    return {"parameters": parameters, "characters_per_step": job.windows * job.stride}


def generate_charlm(job: Job, turns: Turns) -> None:
    """`generate`, sampling at temperature 1, after prompts of half a context."""
    from charlm.inference.generation import generate

    turns.start()
    trained = untrained_model(job)
    prompts = [row.tobytes() for row in _prompts(job)]
    turns.ready(parameters=num_parameters(trained.transformer, trained.heads), **_writing_facts(job))
    turns.play(lambda: generate(trained, prompts, length=job.length, seed=job.seed))


def write_with_drafts(job: Job, turns: Turns) -> None:
    """A trained run writes a text after each of some stretches of its own corpus."""
    from charlm.inference.generation import generate
    from charlm.inference.speculative import DraftStatistics

    turns.start()
    trained = load(job.run)
    ids = load_corpus(trained.config.data, show_progress=False).splits["valid"].ids
    half = trained.config.model.context_length // 2
    starts = np.linspace(0, len(ids) - half, job.prompts, dtype=np.int64)
    prompts = [trained.vocabulary.decode(ids[start : start + half]) for start in starts]

    def write(statistics: DraftStatistics | None = None) -> None:
        for prompt in prompts:
            generate(
                trained,
                prompt,
                length=job.length,
                temperature=job.temperature,
                seed=job.seed,
                draft=job.contestant.draft,
                statistics=statistics,
            )

    statistics = DraftStatistics()
    write(statistics)
    drafted = {
        "num_draft_tokens": statistics.num_draft_tokens,
        "acceptance_rate": statistics.acceptance_rate,
        "characters_per_pass": statistics.characters_per_pass,
    }
    turns.ready(
        parameters=num_parameters(trained.transformer, trained.heads),
        **_writing_facts(job),
        **(drafted if job.contestant.draft is not None else {}),
    )
    turns.play(write)


def generate_peer(job: Job, turns: Turns) -> None:
    """The peer's own `generate` with its cache, sampling at temperature 1 from all symbols."""
    contestant = job.contestant
    torch.set_float32_matmul_precision(contestant.matmul_precision)
    prompts_BT = torch.from_numpy(_prompts(job).astype(np.int64)).to(job.device)
    turns.start()
    model, _ = build_peer(contestant, job.shape)
    model.to(job.device).eval()
    turns.ready(parameters=num_parameters(model), **_writing_facts(job))
    if contestant.library == "x-transformers":
        turns.play(
            lambda: model.generate(
                prompts_BT, job.length, temperature=1.0, cache_kv=True, filter_logits_fn=lambda logits: logits
            )
        )
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True}
    if contestant.compile:
        options["cache_implementation"] = "static"  # transformers compiles the decoding step by itself
    turns.play(
        lambda: model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=job.length,
            **options,
        )
    )


def _prompts(job: Job) -> np.ndarray:
    """Pieces of the text, half a context each: uint8 [prompts, T / 2]."""
    ids = load_corpus(text_config(job.text), show_progress=False).splits["train"].ids
    half = job.shape.context_length // 2
    return np.asarray(ids[: job.prompts * half]).reshape(job.prompts, half).astype(np.uint8)


def _writing_facts(job: Job) -> dict[str, int]:
    return {"characters_per_step": job.prompts * job.length}
