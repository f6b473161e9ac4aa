"""Exported models: folders that can be loaded without a run and a corpus.

FOLDER/config.json          options it was trained with, heads, corpus, scores
FOLDER/model.safetensors    parameters of transformer and heads, by name
FOLDER/vocabulary.json      for sentencepiece, the library's model in base64
FOLDER/README.md            a model card: scores with their protocols, use

A stranger may have made it: loading runs no code, refuses paths, and checks sizes first.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from charlm.config import Config, DataConfig, RunConfig, TextConfig, UserError
from charlm.config.errors import first_line
from charlm.config.load import load_config
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.files import read_json, replacing, write_whole
from charlm.runs.folder import CorpusRecord, Visible
from charlm.runs.tensors import check_space, load_tensors, save_tensors
from charlm.runs.trained import TrainedModel, any_prompt, build_model, filled, trained_with
from charlm.text import visible

EXPORT_CONFIG = "config.json"
TENSORS = "model.safetensors"
VOCABULARY = "vocabulary.json"
CARD = "README.md"
FILES = (EXPORT_CONFIG, TENSORS, VOCABULARY)
MAX_CONFIG_BYTES = 2**20
MAX_OFFSET = 1000
PUBLIC = {"name": True, "sha256": True, "splits": True, "sources": {"__all__": {"name", "sha256", "splits"}}}
CARD_TEMPLATE = Path(__file__).with_name("card.md")

Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
Layer = Annotated[int, Field(strict=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HeadsRecord(BaseModel, strict=True):
    pairs: Annotated[list[Pair], Field(max_length=10_000)]
    last_tower: bool


class ModelRecord(BaseModel, strict=True):
    """The checked part of config.json."""

    format: Literal[1]
    options: dict[str, Any]
    heads: HeadsRecord
    hedge_weights: dict[Layer, Weight] | None
    checkpoint: Visible
    step: int
    corpus: CorpusRecord
    scores: list[dict[str, Any]]
    trained_with: str
    started_from: dict[str, Visible] = {}


def save_model(trained: TrainedModel, folder: Path | str, name: str | None = None) -> Path:
    """Export a model, which its card calls `name`, to a new folder, or raise UserError."""
    return write_folder(Path(folder), trained.modules.state_dict(), files_of(trained, name or Path(folder).name))


def files_of(trained: TrainedModel, name: str, use: str = "charlm", **entries: Any) -> dict[str, str]:
    """The texts of an exported folder by file; `use` as for `card`, and `entries` go into config.json."""
    heads = {"head", "tower_width", "tower_dropout"}
    included = {"model": True, "data": True, "aux": {"layers": heads}}
    options = portable(trained.config).model_dump(mode="json", include=included, exclude={"data": {"cache_dir"}})
    record = {
        "library_name": "charlm",
        "format": 1,
        "options": options,
        "heads": {"pairs": trained.heads.pairs, "last_tower": trained.heads.last_tower},
        "hedge_weights": trained.hedge_weights,
        "checkpoint": trained.checkpoint,
        "step": trained.step,
        "corpus": CorpusRecord(**trained.corpus).model_dump(include=PUBLIC, exclude_unset=True),
        "scores": trained.scores,
        "trained_with": trained_with(trained),
        "started_from": trained.started_from,
    }
    return {
        EXPORT_CONFIG: json.dumps(record | entries, indent=2) + "\n",
        VOCABULARY: json.dumps(trained.vocabulary.to_dict(), indent=2) + "\n",
        CARD: card(trained, name, use),
    }


def write_folder(
    folder: Path, tensors: dict[str, Tensor], files: dict[str, str], add: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Make a folder of tensors, texts and what `add` writes there, whole or not at all.

    Raises UserError if it exists or cannot be written.
    """
    check_absent(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            temporary.mkdir()
            check_space(temporary, tensors.values())
            for name, text in files.items():
                write_whole(temporary / name, text)
            save_tensors(tensors, temporary / TENSORS, temporary / EXPORT_CONFIG, {"format": "pt"})
            add(temporary)
    except OSError as error:
        check_absent(folder)  # another process may have been faster
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    return folder


def check_absent(folder: Path) -> None:
    """Raise UserError if anything is there."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already; choose another folder", "to")


def read_model(folder: Path, device: torch.device) -> TrainedModel:
    """The model in a folder, for evaluation; UserError if a file is missing or damaged."""
    record = read_json(folder / EXPORT_CONFIG, MAX_CONFIG_BYTES, ModelRecord)
    config = config_of(record, folder / EXPORT_CONFIG)
    vocabulary_record = read_json(folder / VOCABULARY)
    try:
        vocabulary = vocabulary_from_dict(vocabulary_record)
    except UserError as error:
        raise UserError(f"{folder / VOCABULARY}: {str(error).partition(';')[0]}") from error
    tensors, _ = load_tensors(folder / TENSORS)
    pairs = {(layer, offset) for layer, offset in record.heads.pairs}
    build = partial(build_model, config, vocabulary.size, pairs, record.heads.last_tower)
    model = filled(build, config.model, tensors, folder / TENSORS, f"the model of {EXPORT_CONFIG}")
    return TrainedModel(
        config=config,
        **model.to(device),
        vocabulary=vocabulary,
        checkpoint=record.checkpoint,
        step=record.step,
        corpus=record.corpus.model_dump(exclude_unset=True) | {"vocabulary": vocabulary_record},
        device=device,
        hedge_weights=record.hedge_weights,
        scores=tuple(record.scores),
        options=record.trained_with,
        started_from=record.started_from,
        file=folder / TENSORS,
    )


def card(trained: TrainedModel, name: str, use: str = "charlm", library: str = "charlm") -> str:
    """The model card; `use` names the file charlm/runs/use_*.md that shows how it is loaded with `library`."""
    scores = "\n".join(map(_score_line, trained.scores))
    pairs = zip(trained.config.data.mixture.items(), trained.corpus.get("sources", {}).values(), strict=False)
    sources = [f"\n- {name}, weight {own.weight:g}: SHA-256 {one['sha256']}" for (name, own), one in pairs]
    prompt = any_prompt(trained)
    origin = ", ".join(f"{key} {own}" for key, own in trained.started_from.items())
    shown = CARD_TEMPLATE.with_name(f"use_{use}.md").read_text("utf-8").strip()
    template = CARD_TEMPLATE.read_text("utf-8").replace("{use}", shown)
    text = template.format(
        library=library,
        name=name,
        trained=trained,
        prompt=json.dumps(prompt.decode()) if prompt.isascii() else repr(prompt),
        model=trained.config.model,
        vocabulary=trained.vocabulary,
        length=trained.config.model.context_length // 2,
        sources="".join(sources),
        parameters=sum(parameter.numel() for parameter in trained.modules.parameters()),
        origin=f" It began with the weights of another model: {origin}." if origin else "",
        scores=scores or "Nothing yet: `scripts/export.py --score test` measures it.",
        options=trained_with(trained).rstrip(),
    )
    return visible(text, kept="\n")


def _score_line(score: dict[str, Any]) -> str:
    bits, per_byte = (score.get(f"bits_per_{unit}") for unit in ("character", "byte"))
    line = f"**{bits:.4f}** bits per character" if isinstance(bits, float) else "a score"
    if isinstance(per_byte, float):
        line += f" ({per_byte:.4f} per byte)"
    left_out = ("bits_per_character", "bits_per_byte", "layers", "mixture", "seconds")
    protocol = {key: value for key, value in score.items() if key not in left_out}
    shown = (f"{key} {value}" for key, value in protocol.items() if value is not None)
    return f"- {line}: {', '.join(shown)}"


def portable(config: Config) -> Config:
    """The config without paths of this machine; of files and folders the names stay."""
    mixture = {name: _portable(source) for name, source in config.data.mixture.items()}
    data = _portable(config.data).replace(mixture=mixture, cache_dir=DataConfig().cache_dir)
    return config.replace(data=data, run=RunConfig())


def _portable(text: TextConfig) -> TextConfig:
    hub_id = text.hub_id
    if hub_id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id, re.ASCII):
        hub_id = Path(hub_id).name
    path = None if text.path is None else Path(text.path.name)
    return text.replace(path=path, hub_id=hub_id)


def config_of(record: ModelRecord, path: Path) -> Config:
    """The options in a record from the file `path`. Raises UserError if they, or the heads, cannot work."""
    pairs, weights = record.heads.pairs, record.hedge_weights
    try:
        config = load_config((), record.options)
        last = config.model.num_layers
        if portable(config) != config:
            raise UserError("options: must not name a place on a machine")
        in_range = all(0 < layer <= last and 0 < offset <= MAX_OFFSET for layer, offset in pairs)
        if not in_range or [last, 1] not in pairs:
            raise UserError(f"heads.pairs: needs [{last}, 1], offsets to {MAX_OFFSET}")
        if weights is not None:
            have_heads = all([layer, 1] in pairs for layer in weights)
            if not have_heads or not any(weights.values()):
                raise UserError("hedge_weights: each needs a head, and one must not be 0")
    except (UserError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    return config
