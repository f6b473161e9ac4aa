"""What a run's model makes of held-out text: bits by layer and by position, a passage, samples.

What is scored is of the validation split, as choices are made by looking at pages; of the test split there is a passage
to read, and no figure.

Shapes: B batch, T positions, V vocabulary, N windows, M predictions of a batch.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import Vocabulary
from charlm.inference.evaluation import Score, bits_per_character
from charlm.inference.generation import generate
from charlm.inference.scoring import BATCH_SYMBOLS, nats, visit_predictions
from charlm.model.kernels_cpu import exact_matmul
from charlm.report.page.passage import Piece, pieces_of
from charlm.runs.checkpoints import FOLDER, checkpoint_folders, find_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import TrainedModel, load

CHARACTERS = 20_000
"""Of the validation split, that bits by layer and by position are taken of."""
PASSAGE = 1_200
"""Symbols of the passage that is shown."""
LIKELIEST = 5
PROMPT, SAMPLE = 60, 400
"""Symbols that a sample begins with, and that the model writes."""
TEMPERATURE = 0.8
MOST_SAMPLES = 4
MOST_BINS = 24


@dataclass(frozen=True)
class Bin:
    """A range of positions in the context, and what a character costs there."""

    first: int
    """Symbols of context that the first position of the range has, from 1."""
    last: int
    bits_per_character: float
    standard_error: float | None
    """Over windows; None where there is but one."""


@dataclass(frozen=True)
class Sample:
    """What a checkpoint writes after the prompt."""

    step: int
    names: tuple[str, ...]
    """What the run calls the checkpoint: best, last, both or none."""
    text: str


@dataclass
class Measured:
    """What there is of a run; `missing` says of each other part why it is not there."""

    score: Score | None = None
    """Of each layer that has a head, and of the first characters of the validation split."""
    bins: list[Bin] = field(default_factory=list)
    num_windows: int = 0
    passage: list[Piece] = field(default_factory=list)
    passage_start: int = 0
    """Place of the passage's first symbol in the test split."""
    prompt: str = ""
    samples: list[Sample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def measure(run: Run, corpus: Corpus | UserError, *, characters: int = CHARACTERS, progress: bool = True) -> Measured:
    """Measure a run's best checkpoint, and let those that are kept write.

    Args:
        corpus: or why it is not at hand; then there are samples alone.
        characters: of the validation split, for bits by layer and by position.
        progress: show a bar on stderr if that is a terminal.
    """
    measured = Measured()
    try:
        trained = load(run.path)
    except UserError as error:
        measured.missing = dict.fromkeys(("score", "passage", "samples"), str(error))
        return measured
    prompt = _any_prompt(trained)
    try:
        if isinstance(corpus, UserError):
            raise corpus
        valid, ids = corpus.splits["valid"], corpus.splits["test"].ids
        symbols = symbols_of(characters, valid.ids, corpus.vocabulary)
        measured.score = bits_per_character(
            trained, corpus, split="valid", limit=symbols, all_layers=True, show_progress=progress
        )
        measured.num_windows = max(1, symbols // trained.config.model.context_length)
        nats_NT = nats_by_position(trained, valid.ids, measured.num_windows)
        measured.bins = bins_of(nats_NT, valid.symbols / valid.characters)
        measured.passage_start = start_of_passage(trained, ids)
        measured.passage = read_passage(trained, ids, measured.passage_start, PASSAGE)
        prompt = _prompt_before(trained, ids, measured.passage_start) or prompt
    except UserError as error:
        measured.missing |= dict.fromkeys(("score", "passage"), str(error))
    measured.prompt = prompt.decode(errors="replace")
    try:
        measured.samples = write_samples(run, prompt)
    except UserError as error:  # a checkpoint that went meanwhile, of a run that goes on
        measured.missing["samples"] = str(error)
    return measured


def symbols_of(characters: int, ids: np.ndarray, vocabulary: Vocabulary) -> int:
    """The symbols that spell the first so many characters of a text: the same text whatever the vocabulary."""
    most = min(len(ids), 4 * characters)  # no character of UTF-8 has more bytes
    return bisect_right(range(1, most + 1), characters, key=lambda count: vocabulary.count_characters(ids[:count]))


@torch.no_grad()
def nats_by_position(trained: TrainedModel, ids: np.ndarray, num_windows: int) -> np.ndarray:
    """What the symbols of windows spread evenly over a text cost, float64 [N, T].

    Column t is of the symbols that are predicted from t + 1 symbols, the first of the window and those after it.
    """
    length = min(trained.config.model.context_length, len(ids) - 1)
    if length < 1:
        raise UserError(f"a text of {len(ids)} symbols: too short to predict anything")
    starts = np.linspace(0, len(ids) - length - 1, num_windows).astype(np.int64)
    batch_size = max(1, BATCH_SYMBOLS.get(trained.device.type, BATCH_SYMBOLS["cpu"]) // length)
    layer, rows = trained.config.model.num_layers, []
    with exact_matmul(trained.device):
        for batch in np.array_split(starts, math.ceil(num_windows / batch_size)):
            windows_BW = torch.from_numpy(ids[batch[:, None] + np.arange(length + 1)].astype(np.int64))
            windows_BW = windows_BW.to(trained.device)
            hidden_BTD = trained.transformer(windows_BW[:, :-1])[layer]
            for hidden_TD, window_W in zip(hidden_BTD, windows_BW, strict=True):  # float64 logits of one at a time
                logits_TV = trained.heads(hidden_TD[None], layer)[0, :, 0].double()
                rows.append(nats(logits_TV.log_softmax(-1), window_W[1:])[0].cpu().numpy())
    return np.stack(rows)


def bins_of(nats_NT: np.ndarray, symbols_per_character: float) -> list[Bin]:
    """Bits per character by position, in bins that grow by a constant factor: late positions hardly differ."""
    num_windows, length = nats_NT.shape
    edges = np.unique(np.geomspace(1, length + 1, MOST_BINS + 1).round().astype(int))
    factor = symbols_per_character / math.log(2)
    bins = []
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        means_N = nats_NT[:, first - 1 : end - 1].mean(axis=1) * factor
        error = float(means_N.std(ddof=1)) / math.sqrt(num_windows) if num_windows > 1 else None
        bins.append(Bin(first, end - 1, float(means_N.mean()), error))
    return bins


def start_of_passage(trained: TrainedModel, ids: np.ndarray) -> int:
    """The middle of the text, or the beginning of a line soon after it."""
    middle = max(0, len(ids) // 2 - PASSAGE // 2) if len(ids) < 4 * PASSAGE else len(ids) // 2
    for place in range(middle, min(middle + 500, len(ids) - 1)):
        if trained.vocabulary.decode(ids[place : place + 1]) == b"\n":
            return place + 1
    return middle


def read_passage(trained: TrainedModel, ids: np.ndarray, start: int, count: int) -> list[Piece]:
    """What the model makes of `count` symbols of a text from `start` on.

    Every symbol is predicted from at least three quarters of a context, as far as the text reaches back.
    """
    context_length = trained.config.model.context_length
    before = min(start, context_length)
    text = ids[start - before : start + count]
    width = min(LIKELIEST, trained.vocabulary.size)
    found_NK = np.zeros((len(text), 1 + 2 * width))

    def measure_likeliest(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
        values, symbols = log_probabilities_MV.topk(width, dim=-1)
        return torch.cat([nats(log_probabilities_MV, targets_M), values.exp().T, symbols.double().T])

    def keep(symbols_M: Tensor, measured: dict[int, Tensor]) -> None:
        (found_KM,) = measured.values()
        found_NK[symbols_M.numpy()] = found_KM.T.numpy()

    with exact_matmul(trained.device):
        visit_predictions(
            trained.transformer,
            trained.heads,
            text,
            keep,
            stride=max(1, context_length // 4),
            layers=[trained.config.model.num_layers],
            measure=measure_likeliest,
        )
    found_NK = found_NK[before:]
    return pieces_of(
        trained.vocabulary,
        text[before:],
        found_NK[:, 0] / math.log(2),
        found_NK[:, 1 : 1 + width],
        found_NK[:, 1 + width :].astype(np.int64),
    )


def write_samples(run: Run, prompt: bytes) -> list[Sample]:
    """What the checkpoints that are kept write, oldest first: at most four, the first and the last among them."""
    steps = [int(FOLDER.fullmatch(path.name)[2]) for path in checkpoint_folders(run)]
    places = np.unique(np.linspace(0, len(steps) - 1, min(MOST_SAMPLES, len(steps))).round().astype(int))
    named = {which: find_checkpoint(run, which).step for which in ("best", "last")}
    chosen = sorted({steps[place] for place in places} | {step for step in named.values() if step in steps})
    return [
        Sample(
            step,
            tuple(which for which, own in named.items() if own == step),
            generate(load(run.path, step), prompt, length=SAMPLE, temperature=TEMPERATURE),
        )
        for step in chosen
    ]


def _prompt_before(trained: TrainedModel, ids: np.ndarray, start: int) -> bytes:
    """The text that stands before a passage."""
    first = max(0, start - min(PROMPT, trained.config.model.context_length))
    text = trained.vocabulary.decode(ids[first:start])
    return text.decode(errors="ignore").encode()  # characters that were cut in two are left out


def _any_prompt(trained: TrainedModel) -> bytes:
    """Something to begin with where there is no text: what the vocabulary has."""
    for prompt in (b"The ", b"the ", b" "):
        try:
            if 1 <= len(trained.vocabulary.encode(prompt)) <= trained.config.model.context_length:
                return prompt
        except UserError:
            continue
    return trained.vocabulary.decode(np.array([0]))
