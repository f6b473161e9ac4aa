"""Exported folders with a graph for other runtimes, model.onnx, and its parameters.

Shapes: B texts, T positions, P earlier ones, L layers, H heads, C head size, N longest n-gram, V vocabulary.
"""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.export import Dim

from charlm.config import UserError
from charlm.model.cache import Places
from charlm.runs.exported import files_of, write_folder
from charlm.runs.trained import TrainedModel, truncate


class Graph(nn.Module):
    """The network and its last head, by kernels that do not depend on sizes."""

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.transformer, self.heads = truncate(trained).modules.cpu().requires_grad_(False).values()
        for block in self.transformer.blocks:
            block.attention.backend = "sdpa"

    def forward(self, ids_BT: Tensor, *past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, T, V], and keys and values of all positions, [L, B, H, P + T, C].

        `past`: keys and values of the earlier positions and, with n-grams, their last ids, [B, N - 1]; -1 is none.
        """
        known, grown = past[0].shape[3], []

        def extend(*new_BHTC: Tensor) -> list[Tensor]:
            earlier = (own[len(grown)] for own in past[:2])
            grown.append([torch.cat(pair, dim=2) for pair in zip(earlier, new_BHTC, strict=True)])
            return grown[-1]

        places = Places(slice(known, known + ids_BT.shape[1]), known + ids_BT.shape[1], None)
        layer, ids_BS = SimpleNamespace(places=places, extend=extend), torch.cat([*past[2:], ids_BT], dim=1)
        how = {"places": lambda _: places, "layer": lambda *_: layer, "extend_ids": lambda *_: ids_BS, "lengths": 0}
        ((last, states_BTD),) = self.transformer(ids_BT, cache=SimpleNamespace(**how)).items()
        return self.heads(states_BTD, last)[:, :, 0], *map(torch.stack, zip(*grown, strict=True))


def save_model(trained: TrainedModel, folder: Path | str, name: str | None = None) -> Path:
    """As charlm's own format, with the graph. Raises UserError for a context that is too short to trace it."""
    model, batch, growing = trained.config.model, Dim("batch"), {1: Dim("batch"), 3: Dim.AUTO}
    if (length := model.context_length) < 4:
        raise UserError(f"model.context_length={length}: format=onnx needs at least 4", "model.context_length")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names packages that no one needs
    graph, ids_BT = Graph(trained).eval(), torch.zeros(2, 2, dtype=torch.long)
    shape = model.num_layers, 2, model.num_heads, 2, model.d_model // model.num_heads
    past_ids = ids_BT[:, :1].repeat(1, max(model.ngrams, default=1) - 1)
    inputs = (ids_BT, torch.zeros(shape), torch.zeros(shape), past_ids)[: 4 if model.ngrams else 3]
    graph(*inputs)  # fills caches of tables, which must not hold symbols
    names = ["ids", "past_keys", "past_values", "past_ids"][: len(inputs)]
    shapes = {0: batch, 1: Dim.AUTO}, (growing, growing, {0: batch})[: len(inputs) - 1]
    how = {"input_names": names, "output_names": ["logits", "keys", "values"], "dynamic_shapes": shapes}
    with warnings.catch_warnings(action="ignore"):  # of libraries to each other
        program = torch.onnx.export(graph, inputs, optimize=False, verbose=False, **how)
    for node in program.model.graph:
        node.metadata_props.clear()  # places on this machine
    files = files_of(trained, name or Path(folder).name)
    tensors = trained.modules.state_dict()
    return write_folder(
        Path(folder), tensors, files, lambda made: program.save(made / "model.onnx", external_data=True)
    )
