"""A trained model, read from a run or from an exported folder, and cut to its lower layers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from charlm.config import AuxConfig, Config, LayersConfig, ModelConfig, UserError
from charlm.config.errors import first_line
from charlm.config.load import to_yaml
from charlm.data.vocabulary import EncodingError, Vocabulary
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer, NgramEmbedding
from charlm.runs.tensors import check_tensors
from charlm.text import html_table


@dataclass(frozen=True)
class TrainedModel:
    """A model with everything needed to use it."""

    config: Config
    transformer: CharTransformer
    heads: Heads
    vocabulary: Vocabulary
    checkpoint: str
    """Name of the checkpoint, `step-00001000`."""
    step: int
    """Number of optimizer steps it was trained for."""
    corpus: dict[str, Any]
    """The run's record of its corpus: name, sha256, vocabulary, sizes."""
    device: torch.device
    hedge_weights: dict[int, float] | None = None
    """Weight of each layer learned by aux.hedge, summing to 1; None without it."""
    scores: tuple[dict[str, Any], ...] = ()
    """For the model card, as `Score.as_dict` gives them."""
    started_from: dict[str, str] = field(default_factory=dict)
    """The run's record of the model that it began with."""
    file: Path | None = None
    """The file that it was read from."""
    options: str | None = None
    """YAML of the options it was trained with, if `config` lacks some."""

    @property
    def modules(self) -> nn.ModuleDict:
        """Transformer and heads as one module, with the parameter names of a checkpoint."""
        return nn.ModuleDict({"transformer": self.transformer, "heads": self.heads})

    def ids(self, text: str | bytes, option: str) -> np.ndarray:
        """The ids of a text; UserError that names `option` if the vocabulary cannot spell it.

        Stray bytes in a str are lone surrogates, as in Python's "surrogateescape".
        """
        try:
            return self.vocabulary.encode(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
        except (EncodingError, UnicodeEncodeError) as error:
            raise UserError(f"{option}: {error}; use what the vocabulary has", option) from error

    def _repr_html_(self) -> str:
        model, size = self.config.model, sum(own.numel() for own in self.modules.parameters())
        shape = f"{model.num_layers} layers of width {model.d_model}, context {model.context_length}"
        rows = {"model": shape, "parameters": f"{size:,}", "checkpoint": self.checkpoint, "corpus": self.corpus["name"]}
        vocabulary = f"{self.vocabulary.size:,} {self.vocabulary.name}"
        return html_table(rows | {"vocabulary": vocabulary, "scores": dict(enumerate(self.scores, 1))})


def exit_layers(trained: TrainedModel) -> list[int]:
    """Layers with a head for the next symbol; the last always has one."""
    return [layer for layer, offset in trained.heads.pairs if offset == 1]


def any_prompt(trained: TrainedModel) -> bytes:
    """A prompt that the vocabulary can spell and the context holds."""
    for text in (b"The ", b"the ", b"a"):
        with suppress(UserError):
            if len(trained.vocabulary.encode(text)) <= trained.config.model.context_length:
                return text
    return trained.vocabulary.decode(np.array([trained.vocabulary.size - 1]))


def trained_with(trained: TrainedModel) -> str:
    """YAML of the options that differ from the defaults."""
    if trained.options is not None:
        return trained.options
    return to_yaml(trained.config, include={"model", "aux", "train"}, exclude_defaults=True)


def build_model(
    config: Config, vocabulary_size: int, pairs: Iterable[tuple[int, int]], last_tower: bool
) -> nn.ModuleDict:
    """A new transformer with its heads; `pairs` and `last_tower` as in `Heads`."""
    transformer = CharTransformer(config.model, vocabulary_size)
    how = {"layers": config.aux.layers, "final_norm": transformer.final_norm, "last_tower": last_tower}
    return nn.ModuleDict({"transformer": transformer, "heads": Heads(config.model, vocabulary_size, pairs, **how)})


def filled(
    build: Callable[[], nn.Module], config: ModelConfig, tensors: Mapping[str, Tensor], path: Path, owner: str
) -> nn.Module:
    """What `build` makes, with the `tensors` of `path`; UserError if they do not fit."""
    layers = config.num_layers
    if 16 * layers > len(tensors):  # building thousands of layers would take minutes
        problem = f"has {len(tensors)} tensors, too few for the {layers:,} layers"
        raise UserError(f"{path} {problem} of {owner}")
    needed = 8 * config.context_length * layers * config.d_model
    if needed > psutil.virtual_memory().total:
        reason = f"keys and values take {needed / 1e9:,.0f} GB"
        raise UserError(f"{path}: no machine like this can use {owner}: {reason}")
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, TypeError) as error:  # a size that overflows
        raise UserError(f"{path}: no machine can hold {owner}: {first_line(error)}") from None
    check_tensors(path, tensors, module.state_dict(), owner)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def truncate(trained: TrainedModel, depth: int | None = None, *, keep_heads: bool = False) -> TrainedModel:
    """The model cut at layer `depth`, by default the last: that exit, with the same parameters.

    With `keep_heads`, the heads of lower layers and for later symbols stay. UserError if there is no such
    head for the next symbol.
    """
    num_layers = trained.config.model.num_layers
    depth = num_layers if depth is None else depth
    exits = exit_layers(trained)
    if depth not in exits:
        choices = ", ".join(map(str, exits))
        raise UserError(f"depth={depth}: has no head; choose one of {choices}", "depth")
    pairs = trained.heads.pairs if keep_heads else [(depth, 1)]
    pairs = [(layer, offset) for layer, offset in pairs if layer <= depth]
    hedge_weights = trained.hedge_weights if keep_heads else None
    cut = replace(trained, options=trained_with(trained), hedge_weights=hedge_weights)
    state = trained.modules.state_dict()
    last_tower = trained.heads.last_tower
    if depth < num_layers:
        layers = trained.config.aux.layers
        state = _state_of_exit(trained, depth)
        last_tower = layers.head == "tower"
        kinds = layers.model_dump(include={"head", "tower_width", "tower_dropout"})
        model = trained.config.model.replace(num_layers=depth)
        aux = AuxConfig(layers=LayersConfig(**kinds))
        config = trained.config.replace(model=model, aux=aux)
        name = f"{trained.checkpoint}, layers 1 to {depth} of {num_layers}"
        cut = replace(cut, config=config, checkpoint=name, hedge_weights=None, scores=())
    with torch.device("meta"):
        modules = build_model(cut.config, trained.vocabulary.size, pairs, last_tower).eval()
    kept = {name: state[name] for name in modules.state_dict()}
    modules.load_state_dict(kept, assign=True)
    return replace(cut, **modules)


def _state_of_exit(trained: TrainedModel, depth: int) -> dict[str, Tensor]:
    state = dict(trained.modules.state_dict())
    if trained.config.aux.layers.head in ("shared", "shared_frozen"):
        # the exit has used the last layer's classifier
        last = f"heads.exits.layer{trained.config.model.num_layers}."
        own = f"heads.exits.layer{depth}."
        shared = [name for name in state if name.startswith(last)]
        state |= {name.replace(last, own): state[name] for name in shared}
    norm = trained.heads.norm(depth).state_dict()
    return state | {f"transformer.final_norm.{name}": own for name, own in norm.items()}


def fitting(model: TrainedModel, transformer: CharTransformer, heads: Heads) -> dict[str, Tensor]:
    """The parameters of `model` for a new transformer and its heads, by name.

    The last layer's heads become those of the new last layer, but where layers are cut off, it keeps its own.
    """
    new = transformer.config
    if new.num_layers in exit_layers(model):
        model = truncate(model, new.num_layers, keep_heads=True)
    depth = model.config.model.num_layers
    last, new_last = (f"heads.exits.layer{layer}." for layer in (depth, new.num_layers))
    unfit = ("transformer.ngram_embedding.",)
    if new.num_layers < depth:  # without a head of its own
        unfit += (last, "transformer.final_norm.")
    found = {}
    for name, tensor in model.modules.state_dict().items():
        if not name.startswith(unfit):
            is_table = name.startswith("transformer.position_tables.")
            found[name.replace(last, new_last)] = tensor[: new.context_length] if is_table else tensor
    if new.ngrams:
        found |= _ngram_tables(model.transformer.ngram_embedding, transformer.ngram_embedding)
    own = nn.ModuleDict({"transformer": transformer, "heads": heads}).state_dict()
    fits = {name for name in found.keys() & own.keys() if found[name].shape == own[name].shape}
    for layer in heads.exits:  # its classifiers fit if what is below them does
        head = f"heads.exits.{layer}."
        if any(name.startswith(head) and "offset" not in name and name not in fits for name in own | found):
            fits = {name for name in fits if not name.startswith(head)}
    return {name: found[name] for name in sorted(fits)}


def _ngram_tables(old: NgramEmbedding | None, new: NgramEmbedding) -> dict[str, Tensor]:
    """Tables of the same length and shape; the matrix that projects all is zero for the others."""
    found = {"up.weight": torch.zeros(new.up.weight.shape)}
    for place, length in enumerate(new.lengths):
        if old is not None and length in old.lengths:
            before = old.lengths.index(length)
            table = old.tables[before].weight.detach()
            if table.shape == new.tables[place].weight.shape:
                found[f"tables.{place}.weight"] = table
                columns = old.up.weight.detach().split(table.shape[1], dim=1)
                found["up.weight"].split(table.shape[1], dim=1)[place].copy_(columns[before])
    return {f"transformer.ngram_embedding.{name}": tensor for name, tensor in found.items()}


def shallowest(layers: Mapping[int, float], within: float) -> int:
    """The lowest layer at most `within` bits per character above the best."""
    limit = min(layers.values()) + within
    return min(layer for layer, bits in layers.items() if bits <= limit)
