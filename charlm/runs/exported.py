"""A model on its own, to be shared: a folder that needs neither the run nor the corpus to be loaded.

FOLDER/config.json          the options it was trained with, its heads, its corpus, its figures
FOLDER/model.safetensors    parameters of transformer and heads, by name
FOLDER/vocabulary.json      the vocabulary, of sentencepiece the library's model in base64
FOLDER/README.md            a card: what it is, how it scores under which protocol, how it is used

Such a folder may come from anybody. Reading it runs nothing, takes no place on this machine from it, and costs no more
than what its files say in few bytes.
"""

import json
import math
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from charlm.config import Config, DataConfig, RunConfig, UserError
from charlm.config.load import load_config
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.files import read_json, sync, write_whole
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.runs.card import model_card, trained_with
from charlm.runs.tensors import check_model, check_space, load_tensors, save_tensors
from charlm.runs.trained import TrainedModel

CONFIG, TENSORS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"
FILES = (CONFIG, TENSORS, VOCABULARY)
"""What loading needs."""
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"
FORMAT = 1
MAX_CONFIG_BYTES = 2**20


def is_exported(folder: Path) -> bool:
    """Whether a folder looks like an exported model rather than a run."""
    return (folder / CONFIG).exists() and not (folder / "config.yaml").exists()


def is_hub_id(name: str) -> bool:
    """Whether this is OWNER/NAME, with or without @REVISION, and not a mistyped path into a folder that there is."""
    return bool(re.fullmatch(HUB_ID, name, re.ASCII)) and not Path(name).parent.exists()


def check_absent(folder: Path) -> None:
    """Raise UserError if there is something at the place of a new folder."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already; choose another folder")


def save_model(trained: TrainedModel, folder: Path | str) -> Path:
    """Make a folder of a model, whole or not at all.

    Raises:
        UserError: there is something at this place already, or the disk does not take it.
    """
    folder = Path(folder)
    check_absent(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        write_model(trained, temporary, folder.name)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_model(trained: TrainedModel, folder: Path, name: str) -> None:
    """Write the files of a model, which its card calls `name`, into an empty folder. Raises OSError."""
    model = model_modules(trained.transformer, trained.heads)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    check_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
    config = portable(trained.config)
    data = config.data.model_dump(mode="json")
    del data["cache_dir"]
    layers = config.aux.layers
    record = {
        "library_name": "charlm",
        "format": FORMAT,
        "options": {
            "model": config.model.model_dump(mode="json"),
            "data": data,
            "aux": {"layers": {name: getattr(layers, name) for name in ("head", "tower_width", "tower_dropout")}},
        },
        "heads": {"pairs": trained.heads.pairs, "last_tower": trained.heads.last_tower},
        "hedge_weights": trained.hedge_weights,
        "checkpoint": trained.checkpoint,
        "step": trained.step,
        "corpus": {key: trained.corpus[key] for key in ("name", "sha256", "splits") if key in trained.corpus},
        "scores": trained.scores,
        "trained_with": trained_with(trained),
    }
    write_whole(folder / CONFIG, json.dumps(record, indent=2) + "\n")
    write_whole(folder / VOCABULARY, json.dumps(trained.vocabulary.to_dict(), indent=2) + "\n")
    write_whole(folder / CARD, model_card(trained, name))
    save_tensors(tensors, folder / TENSORS, folder / CONFIG, {"format": "pt"})


def read_model(folder: Path, device: torch.device) -> TrainedModel:
    """The model in a folder, in evaluation mode.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """
    for name in FILES:
        if not (folder / name).exists():
            raise UserError(f"{folder} is no exported model: it has no {name}")
        if not stat.S_ISREG((folder / name).stat().st_mode):
            raise UserError(f"{folder / name} is no file")
    path = folder / CONFIG
    record = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not that of a model exported by this version of charlm")
    try:
        config = _config(record)
        layers = range(1, config.model.num_layers + 1)
        heads = _typed(record, "heads", dict)
        pairs = sorted({_pair(pair, layers) for pair in _typed(heads, "pairs", list)})
        if (layers[-1], 1) not in pairs:
            raise ValueError("heads: the last layer has none for the next symbol")
        exits = [layer for layer, offset in pairs if offset == 1]
        hedge_weights = _hedge_weights(record.get("hedge_weights"), exits)
        last_tower = _typed(heads, "last_tower", bool)
        corpus = _typed(record, "corpus", dict)
        _typed(corpus, "name", str), _typed(corpus, "sha256", str)
        checkpoint, step = _typed(record, "checkpoint", str), _typed(record, "step", int)
        scores = _typed(record, "scores", list)
        if not all(isinstance(score, dict) for score in scores):
            raise ValueError("scores: must hold figures with their protocols")
        options = _typed(record, "trained_with", str)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {str(error).partition(chr(10))[0]}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    vocabulary_record = read_json(folder / VOCABULARY)
    try:
        vocabulary = vocabulary_from_dict(vocabulary_record)
    except UserError as error:
        raise UserError(f"{folder / VOCABULARY}: {str(error).partition(';')[0]}") from error
    model = empty_model(config, vocabulary.size, pairs, last_tower)
    check_model(folder / TENSORS, model.state_dict(), CONFIG)
    model.load_state_dict(load_tensors(folder / TENSORS), assign=True)
    model.to(device).eval()
    return TrainedModel(
        config=config,
        transformer=model["transformer"],
        heads=model["heads"],
        vocabulary=vocabulary,
        checkpoint=checkpoint,
        step=step,
        corpus=corpus | {"vocabulary": vocabulary_record},
        device=device,
        hedge_weights=hedge_weights,
        scores=tuple(scores),
        options=options,
    )


def empty_model(
    config: Config, vocabulary_size: int, pairs: Iterable[tuple[int, int]], last_tower: bool
) -> nn.ModuleDict:
    """A model without values, on the meta device, with a head for each of `pairs`; see `Heads`."""
    with torch.device("meta"):
        transformer = CharTransformer(config.model, vocabulary_size)
        heads = Heads(
            config.model,
            vocabulary_size,
            pairs,
            layers=config.aux.layers,
            final_norm=transformer.final_norm,
            last_tower=last_tower,
        )
    return model_modules(transformer, heads)


def model_modules(transformer: CharTransformer, heads: Heads) -> nn.ModuleDict:
    """Both as one module, whose state has the names of a checkpoint's."""
    return nn.ModuleDict({"transformer": transformer, "heads": heads})


def portable(config: Config) -> Config:
    """The config without the places that it names on this machine; of a file or folder, its name stays."""
    data = config.data
    hub_id = data.hub_id
    if hub_id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id, re.ASCII):
        hub_id = Path(hub_id).name
    path = None if data.path is None else Path(data.path.name)
    data = data.replace(path=path, hub_id=hub_id, cache_dir=DataConfig().cache_dir)
    return config.replace(data=data, run=RunConfig())


def _config(record: dict[str, Any]) -> Config:
    options = _typed(record, "options", dict)
    config = load_config((), options)
    if portable(config) != config:
        raise ValueError("options: name a place on a machine, which those of a shared model must not")
    return config


def _typed(record: dict[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key}: must be of type {kind.__name__}")
    return value


def _pair(pair: Any, layers: range) -> tuple[int, int]:
    match pair:
        case [int(layer), int(offset)] if layer in layers and 1 <= offset <= 1000:
            return layer, offset
    raise ValueError(f"heads: {str(pair)[:40]} is no layer with an offset; layers run from 1 to {layers[-1]}")


def _hedge_weights(record: Any, exits: list[int]) -> dict[int, float] | None:
    if record is None:
        return None
    names = {str(layer): layer for layer in exits}
    if not isinstance(record, dict) or not record or not record.keys() <= names.keys():
        raise ValueError("hedge_weights: must name layers with a head for the next symbol")
    weights = {names[name]: weight for name, weight in record.items()}
    if not all(type(weight) is float and 0 <= weight < math.inf for weight in weights.values()) or not any(
        weights.values()
    ):
        raise ValueError("hedge_weights: must be finite, at least 0, and not all 0")
    return weights
