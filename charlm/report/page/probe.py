"""A run's model on validation text, except for a passage of the test split.

Shapes: V vocabulary, N symbols, M predictions, K likeliest, W windows, T positions, B bins.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import Vocabulary
from charlm.inference.evaluation import Score, bits_per_character
from charlm.inference.generation import generate
from charlm.inference.scoring import measure_text, nats, negative_log_likelihoods
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.checkpoints import checkpoint_folders, find_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.trained import TrainedModel, any_prompt
from charlm.text import visible

CHARACTERS = 20_000  # of the validation split that are scored by default
PASSAGE, PROMPT, SAMPLE = 1_200, 60, 400
"""Symbols of the passage, of the prompt of a sample, and of its text."""
LIKELIEST, MOST_SAMPLES, MOST_BINS = 5, 4, 24
TEMPERATURE = 0.8
Lines = tuple[np.ndarray, np.ndarray, np.ndarray]


class Piece(NamedTuple):
    """A character of the passage. page.js reads the fields in this order."""

    text: str
    bits: float
    num_symbols: int  # that spell it, and cost `bits` together
    likeliest: list[tuple[str, float]]
    """The likeliest symbols in place of its first, with their probabilities."""


class Sample(NamedTuple):
    """The text that a checkpoint writes after the prompt."""

    step: int
    names: list[str]  # of the checkpoint: best, last
    text: str


@dataclass
class Probe:
    """The findings about a run's model."""

    score: Score | None = None  # for every layer with a head
    by_position: Lines | None = None
    """Symbols of context, bits per character, and standard errors, float64 [B]."""
    passage: list[Piece] = field(default_factory=list)
    passage_start: int = 0  # in the test split
    prompt: str = ""
    samples: list[Sample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # why a part is left out

    @classmethod
    def without(cls, reason: str) -> "Probe":
        return cls(missing=dict.fromkeys(("score", "passage", "samples"), reason))


def measure(
    run: Run,
    corpus: Corpus | UserError,
    *,
    characters: int = CHARACTERS,
    show_progress: bool = True,
) -> Probe:
    """Score a run's best checkpoint, and let its checkpoints write samples.

    Instead of the corpus there may be the reason why there is none.
    """
    try:
        trained = load(run.path)
    except UserError as error:
        return Probe.without(str(error))
    probe, prompt = Probe(), any_prompt(trained)
    try:
        if isinstance(corpus, UserError):
            raise corpus
        valid, ids = corpus.splits["valid"], corpus.splits["test"].ids
        limit = symbols_of(characters, valid.ids, corpus.vocabulary)
        how = {"split": "valid", "limit": limit, "show_progress": show_progress}
        probe.score = bits_per_character(trained, corpus, all_layers=True, **how)
        num_windows = max(1, limit // trained.config.model.context_length)
        nats_WT = nats_by_position(trained, valid.ids, num_windows)
        probe.by_position = binned(nats_WT, valid.symbols / valid.characters)
        probe.passage_start = start_of_passage(trained, ids)
        probe.passage = read_passage(trained, ids, probe.passage_start, PASSAGE)
        before = ids[: probe.passage_start][-min(PROMPT, trained.config.model.context_length) :]
        # without characters that are cut in two
        prompt = trained.vocabulary.decode(before).decode(errors="ignore").encode() or prompt
    except UserError as error:
        probe.missing |= dict.fromkeys(("score", "passage"), str(error))
    probe.prompt = prompt.decode(errors="replace")
    try:
        probe.samples = write_samples(run, prompt)
    except UserError as error:  # a run that goes on may delete checkpoints
        probe.missing["samples"] = str(error)
    return probe


def symbols_of(characters: int, ids: np.ndarray, vocabulary: Vocabulary) -> int:
    """The number of symbols that spell the first characters."""
    most = min(len(ids), 4 * characters)  # a character of UTF-8 has at most 4 bytes
    count = vocabulary.count_characters
    return bisect_right(range(1, most + 1), characters, key=lambda end: count(ids[:end]))


def nats_by_position(trained: TrainedModel, ids: np.ndarray, num_windows: int) -> np.ndarray:
    """Nats in spread windows, float64 [W, T]; column t has t + 1 symbols of context."""
    models = (trained.transformer, trained.heads)
    length = min(trained.config.model.context_length, len(ids) - 1)
    found = []
    with full_fp32_matmul(trained.device):
        for start in np.linspace(0, len(ids) - length - 1, num_windows).astype(int):
            window = ids[start : start + length + 1]
            (nats_N,) = negative_log_likelihoods(*models, window, stride=length).values()
            found.append(nats_N[1:])
    return np.stack(found)


def binned(nats_WT: np.ndarray, symbols_per_character: float) -> Lines:
    """`Probe.by_position`, in bins that grow by a factor."""
    num_windows, length = nats_WT.shape
    edges = np.unique(np.geomspace(1, length + 1, MOST_BINS + 1).round().astype(int))
    means = [nats_WT[:, first - 1 : end - 1].mean(axis=1) for first, end in pairwise(edges)]
    bits_WB = np.stack(means, axis=1) * (symbols_per_character / math.log(2))
    errors = bits_WB.std(axis=0, ddof=min(1, num_windows - 1)) / math.sqrt(num_windows)
    return np.sqrt(edges[:-1] * (edges[1:] - 1)), bits_WB.mean(axis=0), errors


def start_of_passage(trained: TrainedModel, ids: np.ndarray) -> int:
    """The middle of the text, or the beginning of a line soon after it."""
    middle = max(0, (len(ids) - PASSAGE) // 2)
    for place in range(middle, min(middle + 500, len(ids) - 1)):
        if trained.vocabulary.decode(ids[place : place + 1]) == b"\n":
            return place + 1
    return middle


def read_passage(trained: TrainedModel, ids: np.ndarray, start: int, count: int) -> list[Piece]:
    """`count` symbols, predicted from at least three quarters of a context."""
    context_length = trained.config.model.context_length
    before = min(start, context_length)
    text = ids[start - before : start + count]
    width = min(LIKELIEST, trained.vocabulary.size)

    def likeliest(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
        values, symbols = log_probabilities_MV.topk(width, dim=-1)
        nats_1M = nats(log_probabilities_MV, targets_M)
        return torch.cat([nats_1M, values.exp().T, symbols.double().T])

    with full_fp32_matmul(trained.device):
        (found_KN,) = measure_text(
            trained.transformer,
            trained.heads,
            text,
            stride=max(1, context_length // 4),
            layers=[trained.config.model.num_layers],
            measure=likeliest,
        )
    bits_N = found_KN[0, before:] / math.log(2)
    probabilities_NK, symbols_NK = np.split(found_KN[1:, before:].T, 2, axis=1)
    found = (text[before:], bits_N, probabilities_NK, symbols_NK.astype(np.int64))
    return pieces_of(trained.vocabulary, *found)


def pieces_of(
    vocabulary: Vocabulary,
    ids_N: np.ndarray,
    bits_N: np.ndarray,
    probabilities_NK: np.ndarray,
    symbols_NK: np.ndarray,
) -> list[Piece]:
    """A piece for each symbol that begins a character, with those that continue it."""
    pieces = []
    for first, end in pairwise([*vocabulary.begins(ids_N).tolist(), len(ids_N)]):
        candidates = [visible(vocabulary.decode(symbol)) for symbol in symbols_NK[first][:, None]]
        probabilities = probabilities_NK[first].round(6).tolist()
        likeliest = list(zip(candidates, probabilities, strict=True))
        text = visible(vocabulary.decode(ids_N[first:end]))
        bits = round(bits_N[first:end].sum().item(), 4)
        pieces.append(Piece(text, bits, end - first, likeliest))
    return pieces


def write_samples(run: Run, prompt: bytes) -> list[Sample]:
    """Samples of four checkpoints over the run, and of the best."""
    named = {which: find_checkpoint(run, which).step for which in ("best", "last")}
    steps = list(checkpoint_folders(run))
    places = np.linspace(0, len(steps) - 1, MOST_SAMPLES).round().astype(int)
    samples = []
    for step in sorted({steps[place] for place in places} | set(named.values())):
        names = [which for which, own in named.items() if own == step]
        text = generate(load(run.path, step), prompt, length=SAMPLE, temperature=TEMPERATURE)
        samples.append(Sample(step, names, text))
    return samples
