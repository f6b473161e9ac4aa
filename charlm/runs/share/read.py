"""The folder of an exported model, which needs neither its run nor its corpus to be loaded.

FOLDER/config.json          the options it was trained with, its heads, its corpus, its scores
FOLDER/model.safetensors    parameters of transformer and heads, by name
FOLDER/vocabulary.json      the vocabulary; for sentencepiece, the library's model in base64
FOLDER/README.md            a model card: what it is, its scores with their protocols, how to use it

Such a folder may come from a stranger. Loading never runs code, refuses any path in the files, and checks sizes before
it reads.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError

from charlm.config import Config, DataConfig, RunConfig, UserError
from charlm.config.errors import first_line
from charlm.config.load import load_config
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.files import read_json
from charlm.runs.tensors import check_model
from charlm.runs.trained import TrainedModel, empty_model

CONFIG, TENSORS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"
FILES = (CONFIG, TENSORS, VOCABULARY)
"""The files needed for loading."""
FORMAT = 1
MAX_CONFIG_BYTES = 2**20
MAX_OFFSET = 1000

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HeadsRecord(BaseModel, strict=True):
    """Arguments of `Heads`."""

    pairs: list[Annotated[list[int], Field(min_length=2, max_length=2)]]
    last_tower: bool


class CorpusRecord(BaseModel, strict=True, extra="allow"):
    """The corpus the model was trained on."""

    name: str
    sha256: str


class ModelRecord(BaseModel, strict=True):
    """The checked part of config.json."""

    options: dict[str, Any]
    heads: HeadsRecord
    hedge_weights: dict[str, Weight] | None
    checkpoint: str
    step: int
    corpus: CorpusRecord
    scores: list[dict[str, Any]]
    trained_with: str


def is_exported(folder: Path) -> bool:
    """Whether a folder looks like an exported model rather than a run."""
    return (folder / CONFIG).exists() and not (folder / "config.yaml").exists()


def read_model(folder: Path, device: torch.device) -> TrainedModel:
    """The model in a folder, in evaluation mode.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no exported model: {name} is missing or no regular file")
    record, config = _read_config(folder / CONFIG)
    vocabulary_record = read_json(folder / VOCABULARY)
    try:
        vocabulary = vocabulary_from_dict(vocabulary_record)
    except UserError as error:
        raise UserError(f"{folder / VOCABULARY}: {str(error).partition(';')[0]}") from error
    pairs = sorted({(layer, offset) for layer, offset in record.heads.pairs})
    model = empty_model(config, vocabulary.size, pairs, record.heads.last_tower)
    model.load_state_dict(check_model(folder / TENSORS, model.state_dict(), CONFIG), assign=True)
    model.to(device).eval()
    weights = record.hedge_weights and {int(layer): weight for layer, weight in record.hedge_weights.items()}
    return TrainedModel(
        config=config,
        transformer=model["transformer"],
        heads=model["heads"],
        vocabulary=vocabulary,
        checkpoint=record.checkpoint,
        step=record.step,
        corpus=record.corpus.model_dump() | {"vocabulary": vocabulary_record},
        device=device,
        hedge_weights=weights,
        scores=tuple(record.scores),
        options=record.trained_with,
    )


def _read_config(path: Path) -> tuple[ModelRecord, Config]:
    content = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not that of a model exported by this version of charlm")
    try:
        record = ModelRecord.model_validate(content)
        config = load_config((), record.options)
        if portable(config) != config:
            raise UserError("options: must not name a place on a machine")
        _check_heads(record, config.model.num_layers)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    except UserError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    return record, config


def _check_heads(record: ModelRecord, num_layers: int) -> None:
    pairs = record.heads.pairs
    for layer, offset in pairs:
        if not (1 <= layer <= num_layers and 1 <= offset <= MAX_OFFSET):
            raise UserError(f"heads: [{layer}, {offset}] is no layer in 1 to {num_layers} with an offset")
    if [num_layers, 1] not in pairs:
        raise UserError(f"heads: layer {num_layers}, the last, has none for the next symbol")
    exits = {str(layer) for layer, offset in pairs if offset == 1}
    weights = record.hedge_weights
    if weights is not None and not (weights.keys() <= exits and any(weights.values())):
        raise UserError("hedge_weights: must name layers that have a head for the next symbol, and not be all 0")


def portable(config: Config) -> Config:
    """The config without the places on this machine that it names; of a file or folder, the name stays."""
    data = config.data
    hub_id = data.hub_id
    if hub_id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id, re.ASCII):
        hub_id = Path(hub_id).name
    path = None if data.path is None else Path(data.path.name)
    data = data.replace(path=path, hub_id=hub_id, cache_dir=DataConfig().cache_dir)
    return config.replace(data=data, run=RunConfig())
