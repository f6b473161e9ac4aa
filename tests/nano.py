"""Helpers for tests: the files of a small model of nanoGPT."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from charlm import cli
from tiny import SCRIPTS

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "bias": False, "vocab_size": 5, "dropout": 0.0}
STOI = {"b": 0, "é": 1, "a": 2, "\n": 3, "日": 4}


def tensors_of(bias: bool, size: int) -> dict[str, torch.Tensor]:
    """Random tensors by nanoGPT's names."""
    shapes = {"transformer.wte": (size, 16), "transformer.wpe": (24, 16), "transformer.ln_f": (16,)}
    for layer in ("transformer.h.0", "transformer.h.1"):
        shapes |= {f"{layer}.ln_1": (16,), f"{layer}.ln_2": (16,), f"{layer}.attn.c_attn": (48, 16)}
        shapes |= {f"{layer}.attn.c_proj": (16, 16), f"{layer}.mlp.c_fc": (64, 16), f"{layer}.mlp.c_proj": (16, 64)}
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, shape in shapes.items() if bias else ():
        if not name.endswith(("wte", "wpe")):
            tensors[f"{name}.bias"] = 0.3 * torch.randn(shape[:1], generator=draw)
    return tensors


def write_nano(folder: Path) -> None:
    """A model of five characters, as docs/sharing.md says to write it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ARGS))
    (folder / "meta.json").write_text(json.dumps({"stoi": STOI}))
    save_file(tensors_of(False, 5), folder / "model.safetensors")


def vocabulary_of(folder: Path) -> tuple:
    """As in scripts/import.py, under the name that pydantic looks for docstrings in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(cli, "script", lambda main: None)
        return runpy.run_path(str(SCRIPTS / "import.py"), run_name="__main__")["vocabulary_of"](folder)
