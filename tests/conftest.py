"""Fixtures for all tests: tiny models whose every parameter matters, and corpora to score them on."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from charlm.config import Config, DataConfig, RunConfig
from charlm.data.corpus import Corpus, Split, load_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.model import kernels_cpu
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import take_snapshot
from charlm.runs.trained import TrainedModel
from tiny import run_script, small_model

torch.set_num_threads(1)  # more threads only slow models of this size down
# The same examples every time, and none timed: the tests must not depend on luck or on the machine's load.
hypothesis.settings.register_profile("charlm", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("charlm")


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """`randomise(module, seed)` draws every parameter anew, and returns the module.

    Heads start at zero, biases at zero, norms at the identity and residual branches small: on fresh weights a wrong
    model is hard to tell from a right one.
    """

    def draw(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.normal_(std=0.5, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        return module

    return draw


@pytest.fixture(scope="session", autouse=True)
def plain_fp32() -> Iterator[Callable[[], bool]]:
    """Compute models and references by the same matrix products, in fixtures of any scope as in tests; gives the
    function that it replaces."""
    original = kernels_cpu.medium_is_fp32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_cpu, "medium_is_fp32", lambda: False)
        yield original


@pytest.fixture
def build_model(randomise) -> Callable[..., TrainedModel]:
    """`build_model(zero_heads=..., pairs=..., vocabulary_size=..., **model options)`: a random model with a head on
    every layer, or with heads for other pairs of layer and offset."""

    def build(*, zero_heads: bool = False, pairs=None, vocabulary_size: int = 256, **options) -> TrainedModel:
        config = Config(model=small_model(**options))
        transformer = randomise(CharTransformer(config.model, vocabulary_size))
        pairs = pairs or [(layer, 1) for layer in range(1, config.model.num_layers + 1)]
        heads = Heads(config.model, vocabulary_size, pairs)
        return TrainedModel(
            config=config,
            transformer=transformer.eval(),
            heads=heads.eval() if zero_heads else randomise(heads).eval(),
            vocabulary=ByteVocabulary(),
            checkpoint="step-00000007",
            step=7,
            corpus={"name": "letters", "sha256": "abc"},
            device=torch.device("cpu"),
        )

    return build


@pytest.fixture
def build_corpus() -> Callable[[bytes], Corpus]:
    """`build_corpus(text)`: the corpus that `build_model` names, with `text` as its test split."""

    def build(text: bytes) -> Corpus:
        vocabulary = ByteVocabulary()
        ids = np.frombuffer(text, np.uint8)
        split = Split(ids=ids, symbols=len(ids), characters=vocabulary.count_characters(ids), bytes=len(text))
        return Corpus(name="letters", source="typed", sha256="abc", vocabulary=vocabulary, splits={"test": split})

    return build


@pytest.fixture(scope="session")
def text_corpus_flags(tmp_path_factory) -> list[str]:
    """Flags for a corpus of 40,000 characters in which there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "deep", "stack", "learns", "to", "spell", "before", "it", "reads", "characters\n"]
    text = " ".join(random.Random(0).choices(words, k=8000))[:40_000]
    (folder / "words.txt").write_text(text)
    return ["--data.corpus=file", f"--data.path={folder / 'words.txt'}", f"--data.cache_dir={folder / 'cache'}"]


@pytest.fixture
def script(capfd, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """`script(name, *arguments)`: exit code, stdout and stderr of a script, on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return lambda name, *arguments: (run_script(name, *map(str, arguments)), *capfd.readouterr())


@pytest.fixture
def run_on_disk(tmp_path, randomise) -> Path:
    """A run of a random model on a little file, as training leaves it."""
    text = tmp_path / "text.txt"
    text.write_bytes(" ".join(f"{number}é" for number in range(2000)).encode())
    config = Config(
        data=DataConfig(corpus="file", path=text, cache_dir=tmp_path / "cache"),
        model=small_model(context_length=16),
        run=RunConfig(dir=tmp_path / "run"),
    )
    run = Run.create(config, load_corpus(config.data, show_progress=False).model_dump())
    save_checkpoint(run, take_snapshot(randomise(build_objective(config, 256)), [], {"step": 3}), best=True, keep=1)
    return run.path
