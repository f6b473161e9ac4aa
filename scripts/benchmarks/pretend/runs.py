"""The real training loop on a corpus of noise, without folder, log or launcher."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from charlm.config import Config
from charlm.data.corpus import Corpus, Split
from charlm.data.vocabulary import ByteVocabulary
from charlm.objective.objective import Objective
from charlm.runs.trained import TrainedModel
from charlm.training.device import build_accelerator, torch_settings
from charlm.training.loop import Training, build
from charlm.training.start import TrainState

SYMBOLS = 1_000_000


def any_corpus() -> Corpus:
    """A corpus of noise."""
    ids = np.random.default_rng(0).integers(0, 256, SYMBOLS).astype(np.uint8)
    split = Split(ids=ids, symbols=SYMBOLS, characters=SYMBOLS, bytes=SYMBOLS)
    splits = dict.fromkeys(("train", "valid", "test"), split)
    return Corpus(name="noise", source="drawn", sha256="0", vocabulary=ByteVocabulary(), splits=splits)


def untrained(config: Config, objective: Objective, corpus: Corpus) -> TrainedModel:
    """A model as if a run had ended before its first step."""
    return TrainedModel(
        config=config,
        transformer=objective.transformer,
        heads=objective.heads,
        vocabulary=corpus.vocabulary,
        checkpoint="step-00000000",
        step=0,
        corpus={"name": corpus.name, "sha256": corpus.sha256},
        device=objective.transformer.embedding.weight.device,
    )


@contextmanager
def opened(config: Config, corpus: Corpus) -> Iterator[Training]:
    """The run of a config, about to make its first step."""
    with torch_settings(config):
        accelerator, _ = build_accelerator(config.train)
        torch.manual_seed(config.train.seed)
        with torch.device(accelerator.device):
            objective, route, average = build(config, corpus, accelerator)
        tracker = mock.MagicMock(seconds=0.0)
        stop = SimpleNamespace(check=lambda: None)
        parts = config, corpus, accelerator, objective, route, average, TrainState(), tracker, mock.MagicMock(), stop
        run = Training(*parts)
        run.prepare()
        yield run
