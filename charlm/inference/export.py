"""What is shared of a trained model: the whole of it, or the layers up to one whose exit is good enough.

A model that ends at layer N gives the same logits, to the last bit, as the exit of that layer in the model it was cut
from: it runs the same layers, and what the exit does to their output it does after its last layer.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from charlm.config import AuxConfig, Config, LayersConfig, UserError
from charlm.inference.evaluation import Score, exit_layers
from charlm.runs.card import trained_with
from charlm.runs.exported import empty_model, model_modules
from charlm.runs.trained import TrainedModel


def truncate(trained: TrainedModel, depth: int | None = None, *, keep_heads: bool = False) -> TrainedModel:
    """The model that ends at layer `depth`, by default the last; it shares its parameters with the whole one.

    Args:
        keep_heads: keep the heads of lower layers and for characters further ahead, as early exit and drafts need
            them; else only the last layer's for the next symbol stays.

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
        raise UserError(
            f"depth={depth}: layer {depth} has no head for the next symbol; those that have one: "
            + ", ".join(map(str, exits))
        )


def shallowest(layers: Mapping[int, float], within: float) -> int:
    """The lowest layer whose bits per character are at most `within` above those of the best."""
    most = min(layers.values()) + within
    return min(layer for layer, bits in layers.items() if bits <= most)


def score_at(score: Score, depth: int) -> dict[str, object]:
    """The figure of one layer out of a score of all, for a model that ends there."""
    bits = score.layers[str(depth)]
    per_byte = bits * score.characters / score.bytes
    figures = {"bits_per_character": bits, "bits_per_byte": per_byte, "standard_error": None}
    return replace(score, layers=None).as_dict() | figures


def _config_at(config: Config, depth: int) -> Config:
    """Without the objective, whose layers are no longer there; only of what kind the heads are is kept."""
    layers = config.aux.layers
    kinds = LayersConfig(head=layers.head, tower_width=layers.tower_width, tower_dropout=layers.tower_dropout)
    return config.replace(model=config.model.replace(num_layers=depth), aux=AuxConfig(layers=kinds))


def _state_at(trained: TrainedModel, depth: int) -> dict[str, Tensor]:
    """The state of the whole model under the names of one that ends at `depth`.

    The norm of the exit is then the final one, and a classifier that was shared with the last layer that of the exit.
    """
    state = dict(model_modules(trained.transformer, trained.heads).state_dict())
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
