"""Models exported for transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from charlm.config import AuxConfig, LayersConfig
from charlm.formats import Format, save_model
from charlm.runs import trained as models
from charlm.runs.trained import TrainedModel
from exporting import vocabulary_of


@pytest.fixture
def export(build_model, randomise, tmp_path) -> Callable[..., tuple[TrainedModel, Path]]:
    """`export(format, vocabulary, head, pairs, **model options)`: a random model, and the folder it was exported to."""

    def make(
        format: Format = "transformers",
        vocabulary: str = "bytes",
        head: str = "linear",
        pairs=((1, 1), (2, 1), (2, 2)),
        **options,
    ) -> tuple[TrainedModel, Path]:
        trained = build_model(**{"context_length": 32} | options)
        symbols = vocabulary_of(vocabulary)
        config = trained.config.replace(aux=AuxConfig(layers=LayersConfig(head=head)))
        modules = models.build_model(config, symbols.size, pairs, False)
        for seed, module in enumerate(modules.values()):
            randomise(module, seed)
        trained = replace(trained, config=config, vocabulary=symbols, **modules.eval())
        return trained, save_model(trained, tmp_path / "exported", format)

    return make
