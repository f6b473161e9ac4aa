"""Evaluation and generation by charlm, by a plain loop, and by peers.

Shapes: B batch, T positions, D d_model, K offsets, V vocabulary, W = T + 1 characters of a window.
"""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import autocast, build_peer
from benchmarks.pretend.runs import untrained
from benchmarks.setups import DRAFT_FACTS, Trial
from benchmarks.shapes import charlm_config, text_config
from benchmarks.timing import Timer
from charlm.data.corpus import load_corpus
from charlm.objective.build import build_objective
from charlm.objective.count import num_parameters
from charlm.process import keep_freed_memory
from charlm.runs.load import load
from charlm.runs.trained import TrainedModel

PLAIN_BATCH = 32
"""Windows in a batch of the plain loop."""


def untrained_model(trial: Trial) -> TrainedModel:
    """charlm's model at the shape, the same in every process, with the one head that a finished run keeps."""
    config = charlm_config(trial.shape, trial.text, mixed_precision="fp32", auxiliary=False)
    corpus = load_corpus(config.data, show_progress=False)
    objective = build_objective(config, corpus.vocabulary.size).to(trial.device).eval()
    return untrained(config, objective, corpus)


def evaluate_charlm(trial: Trial, timer: Timer) -> None:
    """`bits_per_character` of as much text as `trial.windows` windows score."""
    from charlm.inference.evaluation import bits_per_character

    corpus = load_corpus(text_config(trial.text), show_progress=False)
    keep_freed_memory()
    timer.start()
    trained = untrained_model(trial)
    timer.ready(**_evaluation_facts(trial, trained))
    limit = trial.shape.context_length + 1 + (trial.windows - 1) * trial.stride
    options = {"split": "train", "stride": trial.stride, "limit": limit, "precision": trial.setup.precision}
    timer.repeat(lambda: bits_per_character(trained, corpus, **options, show_progress=False))


def evaluate_plainly(trial: Trial, timer: Timer) -> None:
    """A plain loop: batches of windows through the whole model; the last `stride` characters of each are scored."""
    torch.set_float32_matmul_precision(trial.setup.matmul_precision)
    ids = load_corpus(text_config(trial.text), show_progress=False).splits["train"].ids
    T, last = trial.shape.context_length, trial.shape.num_layers
    timer.start()
    trained = untrained_model(trial)
    starts = np.arange(trial.windows) * trial.stride
    timer.ready(**_evaluation_facts(trial, trained))

    @torch.no_grad()
    def step() -> float:
        nats = 0.0
        for first in range(0, len(starts), PLAIN_BATCH):
            windows = ids[starts[first : first + PLAIN_BATCH, None] + np.arange(T + 1)].astype(np.int64)
            windows_BW = torch.from_numpy(windows).to(trial.device)
            with autocast(trial):
                hidden_BTD = trained.transformer(windows_BW[:, :-1])[last]
                logits_BTV = trained.heads(hidden_BTD, last)[:, :, 0]
            targets_BT = windows_BW[:, 1:]
            nats += _cost(logits_BTV[:, -trial.stride :], targets_BT[:, -trial.stride :])
            if first == 0:  # the first window scores all of its characters
                nats += _cost(logits_BTV[:1, : -trial.stride], targets_BT[:1, : -trial.stride])
        return nats

    timer.repeat(step)


def _cost(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> float:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum").item()


def _evaluation_facts(trial: Trial, trained: TrainedModel) -> dict[str, int]:
    """Each window counts as `stride` characters, although the first scores all of its own."""
    parameters = num_parameters(trained.transformer, trained.heads)
    return {"parameters": parameters, "characters_per_step": trial.windows * trial.stride}


def generate_charlm(trial: Trial, timer: Timer) -> None:
    """`generate` at temperature 1, after prompts of half a context."""
    from charlm.inference.generation import generate

    timer.start()
    trained = untrained_model(trial)
    prompts = [row.tobytes() for row in _prompts(trial)]
    timer.ready(**_writing_facts(trial, trained.transformer, trained.heads))
    timer.repeat(lambda: generate(trained, prompts, length=trial.length, seed=trial.seed))


def generate_with_drafts(trial: Trial, timer: Timer) -> None:
    """A trained run continues pieces of its own validation split, one after the other."""
    from charlm.inference.generation import generate
    from charlm.inference.speculative import DraftStatistics

    timer.start()
    trained = load(trial.run)
    ids = load_corpus(trained.config.data, show_progress=False).splits["valid"].ids
    half = trained.config.model.context_length // 2
    starts = np.linspace(0, len(ids) - half, trial.prompts, dtype=np.int64)
    prompts = [trained.vocabulary.decode(ids[start : start + half]) for start in starts]

    options = {"length": trial.length, "temperature": trial.temperature, "seed": trial.seed, "draft": trial.setup.draft}

    def write(statistics: DraftStatistics | None = None) -> None:
        for prompt in prompts:
            generate(trained, prompt, statistics=statistics, **options)

    statistics = DraftStatistics()
    write(statistics)
    drafted = {name: getattr(statistics, name) for name in DRAFT_FACTS if trial.setup.draft is not None}
    timer.ready(**_writing_facts(trial, trained.transformer, trained.heads), **drafted)
    timer.repeat(write)


def generate_peer(trial: Trial, timer: Timer) -> None:
    """The peer's own `generate` with its cache, at temperature 1, from all symbols."""
    setup = trial.setup
    torch.set_float32_matmul_precision(setup.matmul_precision)
    prompts_BT = torch.from_numpy(_prompts(trial).astype(np.int64)).to(trial.device)
    timer.start()
    model, _ = build_peer(setup, trial.shape)
    model.to(trial.device).eval()
    timer.ready(**_writing_facts(trial, model))
    if setup.library == "x-transformers":
        options = {"temperature": 1.0, "cache_kv": True, "filter_logits_fn": lambda logits: logits}
        timer.repeat(lambda: model.generate(prompts_BT, trial.length, **options))
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True}
    if setup.compile:
        options["cache_implementation"] = "static"  # transformers compiles the decoding step by itself
    mask_BT = torch.ones_like(prompts_BT)
    timer.repeat(lambda: model.generate(prompts_BT, attention_mask=mask_BT, max_new_tokens=trial.length, **options))


def _prompts(trial: Trial) -> np.ndarray:
    """Consecutive pieces of the text: uint8 [prompts, T / 2]."""
    ids = load_corpus(text_config(trial.text), show_progress=False).splits["train"].ids
    half = trial.shape.context_length // 2
    return np.asarray(ids[: trial.prompts * half]).reshape(trial.prompts, half).astype(np.uint8)


def _writing_facts(trial: Trial, *modules: torch.nn.Module) -> dict[str, int]:
    return {"parameters": num_parameters(*modules), "characters_per_step": trial.prompts * trial.length}
