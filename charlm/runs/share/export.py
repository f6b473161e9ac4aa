"""Exports a trained model to share it: all of it, or the layers up to one whose exit is good enough.

A model cut at layer N gives the same logits, to the last bit, as the exit of layer N in the whole model. It runs the
same layers, and the exit's norm becomes its final norm.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from charlm.config import AuxConfig, Config, LayersConfig, UserError
from charlm.files import sync, write_whole
from charlm.runs.share.card import model_card, trained_with
from charlm.runs.share.read import CARD, CONFIG, FORMAT, TENSORS, VOCABULARY, portable
from charlm.runs.tensors import check_space, save_tensors
from charlm.runs.trained import TrainedModel, empty_model, exit_layers


def save_model(trained: TrainedModel, folder: Path | str) -> Path:
    """Export a model to a new folder, whole or not at all.

    Raises:
        UserError: the folder exists already, or cannot be written.
    """
    folder = Path(folder)
    check_absent(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir()
        write_model(trained, temporary, folder.name)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_absent(folder: Path) -> None:
    """Raise UserError if the place of a new folder is taken."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already; choose another folder")


def write_model(trained: TrainedModel, folder: Path, name: str) -> None:
    """Write the files of a model, called `name` in its card, into an empty folder. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.modules.state_dict().items()}
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


def truncate(trained: TrainedModel, depth: int | None = None, *, keep_heads: bool = False) -> TrainedModel:
    """The model that ends at layer `depth`, by default the last; it shares its parameters with the whole one.

    Args:
        keep_heads: keep the heads of lower layers and for later symbols, which early exit and drafts need. Otherwise
            only the last layer's head for the next symbol stays.

    Raises:
        UserError: there is no such layer, or it has no head for the next symbol.
    """
    num_layers = trained.config.model.num_layers
    depth = num_layers if depth is None else depth
    check_depth(trained, depth)
    is_whole = depth == num_layers
    kind = trained.config.aux.layers.head
    pairs = [pair for pair in trained.heads.pairs if (pair[0] <= depth if keep_heads else pair == (depth, 1))]
    last_tower = trained.heads.last_tower if is_whole else kind == "tower"
    config = trained.config if is_whole else _config_at(trained.config, depth)
    model = empty_model(config, trained.transformer.vocabulary_size, pairs, last_tower)
    state = _state_at(trained, depth)
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    model.eval()
    return replace(
        trained,
        config=config,
        transformer=model["transformer"],
        heads=model["heads"],
        checkpoint=trained.checkpoint if is_whole else f"{trained.checkpoint}, layers 1 to {depth} of {num_layers}",
        hedge_weights=trained.hedge_weights if is_whole and keep_heads else None,
        scores=trained.scores if is_whole else (),
        options=trained_with(trained),
    )


def check_depth(trained: TrainedModel, depth: int) -> None:
    """Raise UserError unless the model can end at layer `depth`."""
    exits, num_layers = exit_layers(trained), trained.config.model.num_layers
    if not 1 <= depth <= num_layers:
        raise UserError(f"depth={depth}: the model's layers run from 1 to {num_layers}")
    if depth not in exits:
        raise UserError(f"depth={depth}: has no head for the next symbol; choose one of {', '.join(map(str, exits))}")


def shallowest(layers: Mapping[int, float], within: float) -> int:
    """The lowest layer whose bits per character are at most `within` above the best layer's."""
    most = min(layers.values()) + within
    return min(layer for layer, bits in layers.items() if bits <= most)


def _config_at(config: Config, depth: int) -> Config:
    """The config of a cut model. Of the objective, whose layers are gone, it keeps only the kind of head."""
    layers = config.aux.layers
    kinds = LayersConfig(head=layers.head, tower_width=layers.tower_width, tower_dropout=layers.tower_dropout)
    return config.replace(model=config.model.replace(num_layers=depth), aux=AuxConfig(layers=kinds))


def _state_at(trained: TrainedModel, depth: int) -> dict[str, Tensor]:
    """The parameters of the whole model under the names they have in one that ends at `depth`.

    The exit's norm becomes the final norm; a classifier shared with the last layer becomes the exit's own.
    """
    state = dict(trained.modules.state_dict())
    num_layers = trained.config.model.num_layers
    if depth < num_layers:
        if trained.config.aux.layers.head in ("shared", "shared_frozen"):
            last = f"heads.exits.layer{num_layers}."
            state |= {
                name.replace(last, f"heads.exits.layer{depth}."): tensor
                for name, tensor in state.items()
                if name.startswith(last)
            }
        norm = trained.heads.norm(depth).state_dict()
        state |= {f"transformer.final_norm.{name}": tensor for name, tensor in norm.items()}
    return state
