"""Checkpoints that someone broke, or made to do harm: one message that names file and reason, and nothing changed.

A file whose SHA-256 does not fit is found by that alone; in the cases called `forged` the manifest is made to fit.
"""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from charlm.config import Config, ModelConfig, RunConfig, UserError
from charlm.data.vocabulary import ByteVocabulary
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import find_checkpoint, newest_whole_checkpoint, save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import Snapshot
from storage import CORPUS, content, entries, manifest_for, missing, replaced, tensors, written

WEIGHT = "transformer.blocks.0.attention.query.weight"


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory) -> Path:
    """A run of a tiny model with optimizer state, which loads."""
    config = Config(
        model=ModelConfig(num_layers=2, num_heads=2, d_model=8, d_ff=16, context_length=8),
        run=RunConfig(dir=tmp_path_factory.mktemp("sound") / "run"),
    )
    run = Run.create(config, CORPUS | {"vocabulary": ByteVocabulary().to_dict()})
    model = build_objective(config, 256).state_dict()
    optimizer = {f"{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in model.items()}
    optimizer |= {f"{name}.step": torch.tensor(1.0) for name in model}
    save_checkpoint(run, Snapshot(dict(model), optimizer, {"step": 1}), best=True, keep=1)
    assert load(run.path, device="cpu").step == 1
    return run.path


def restored(path: Path, device: str = "cpu", apart: Sequence[str] = ()) -> None:
    """Continue from a checkpoint; the parameters `apart` have an optimizer of their own."""
    run = Run(path)
    objective = build_objective(run.config(), 256)
    groups = [[], []]
    for name, parameter in objective.named_parameters():
        groups[name in apart].append(parameter)
    optimizers = [torch.optim.SGD(group) for group in groups if group]
    find_checkpoint(run, 1).restore(objective, optimizers)


def linked(name: str):
    """Move a file out of the run, and leave a link to it."""

    def change(folder: Path) -> None:
        outside = folder.parents[2] / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def tensor_file(header: bytes, data: bytes = b"", header_bytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if header_bytes is None else header_bytes) + header + data


def one_tensor(**described) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | described}).encode()


MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
OUTSIDE = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
PICKLE = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94."
DAMAGED = {
    "no manifest": (missing(MANIFEST), [MANIFEST, "missing"]),
    "an empty manifest": (written(MANIFEST, ""), [MANIFEST, "JSON"]),
    "an entry nested deeply": (
        entries(MANIFEST, **{STATE: json.loads("[" * 500 + "]" * 500)}),
        [MANIFEST, "nested"],
    ),
    "a manifest of megabytes": (written(MANIFEST, "[" + "0," * 2**20 + "0]"), [MANIFEST, "more than 1,048,576 bytes"]),
    "a manifest that names a file outside": (
        entries(MANIFEST, **{"../../../outside": OUTSIDE}),
        [MANIFEST, "damaged"],
    ),
    "an extra file": (written("model.bin", "x"), ["model.bin", "no checkpoint has such a file"]),
    "linked parameters": (linked(MODEL), [MODEL, "a link"]),
    "a folder in place of a file": (replaced(OPTIMIZER, Path.mkdir), [OPTIMIZER, "regular file"]),
    "a pipe that never ends": (replaced(MODEL, os.mkfifo), [MODEL, "regular file"]),
    "a pickle": (written(MODEL, PICKLE), [MODEL, "does not match"]),
    "state of another run": (written(STATE, '{"step": 1}'), [STATE, "does not match"]),
}
FORGED = {
    "a pickle, forged": (written(MODEL, PICKLE), [MODEL]),
    "a header said to be huge": (written(MODEL, tensor_file(b"{}", header_bytes=2**63)), [MODEL, "header too large"]),
    "a header nested deeply": (written(MODEL, tensor_file(b'{"a":' * 10_000)), [MODEL]),
    "a tensor past the end": (written(MODEL, tensor_file(one_tensor(data_offsets=[0, 10**12]))), [MODEL]),
    "a shape that overflows": (written(MODEL, tensor_file(one_tensor(shape=[2**62, 2**62]), bytes(4))), [MODEL]),
    "no tensors at all": (written(MODEL, tensor_file(b"{}")), [MODEL, "has 0 tensors, too few"]),
    "a missing tensor": (tensors(MODEL, **{WEIGHT: None}), [MODEL, f"tensor {WEIGHT} is missing"]),
    "an extra tensor": (tensors(MODEL, virus=torch.zeros(1)), [MODEL, "tensor virus is float32 [1]"]),
    "a wrong shape": (
        tensors(MODEL, **{WEIGHT: torch.zeros(4, 16)}),
        [MODEL, WEIGHT, "float32 [4, 16]", "float32 [8, 8]"],
    ),
    "a wrong type": (tensors(MODEL, **{WEIGHT: torch.zeros(8, 8).double()}), [MODEL, WEIGHT, "float64", "float32"]),
    "an embedding that is a number": (
        tensors(MODEL, transformer__embedding__weight=torch.tensor(1.0)),
        [MODEL, "transformer.embedding.weight", "float32 []"],
    ),
    "state of no parameter": (tensors(OPTIMIZER, nobody__exp_avg=torch.zeros(1)), [OPTIMIZER, "nobody.exp_avg"]),
    "state of a wrong shape": (
        tensors(OPTIMIZER, **{f"{WEIGHT}.exp_avg": torch.zeros(3)}),
        [OPTIMIZER, f"{WEIGHT}.exp_avg", "float32 [3]"],
    ),
    "state by rows of what has none": (
        tensors(OPTIMIZER, transformer__blocks__0__attention__query__bias__mean_square=torch.zeros(8, 1)),
        [OPTIMIZER, "bias.mean_square", "float32 [8]"],
    ),
    "state of a wrong type": (
        tensors(OPTIMIZER, **{f"{WEIGHT}.exp_avg": torch.zeros(8, 8).half()}),
        [OPTIMIZER, f"{WEIGHT}.exp_avg", "float16"],
    ),
    "optimizer state that is a pickle": (written(OPTIMIZER, PICKLE), [OPTIMIZER]),
    "a state of another step": (written(STATE, '{"step": 2}'), [STATE, "step"]),
    "a step that is true": (written(STATE, '{"step": true}'), [STATE, "step"]),
    "a step beyond numbers": (written(STATE, '{"step": ' + "9" * 100_000 + "}"), [STATE, "step"]),
    "a best step that is text": (written(STATE, '{"step": 1, "best_step": "1"}'), [STATE, "best_step"]),
    "a best score that is a list": (written(STATE, '{"step": 1, "best_bits": [1]}'), [STATE, "best_bits"]),
    "a state of megabytes": (written(STATE, " " * 2**21), [STATE, "more than 1,048,576 bytes"]),
}


@pytest.mark.parametrize("case", [*DAMAGED, *FORGED])
def test_a_broken_checkpoint_is_answered_with_one_message(case, sound_run, tmp_path):
    """Guards against tracebacks, code that runs, files read outside the run, memory that a file asks for, and damage
    that is loaded."""
    shutil.copytree(sound_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    change, parts = (DAMAGED | FORGED)[case]
    change(folder)
    if case in FORGED:
        (folder / MANIFEST).write_text(manifest_for(folder))
    before = sorted(content(tmp_path))
    with pytest.raises(UserError) as caught:
        (restored if parts[0] == OPTIMIZER else load)(tmp_path / "run", device="cpu")
    message = str(caught.value)
    assert str(folder) in message
    assert len(message) < 600
    for part in parts:
        assert part in message
    assert sorted(content(tmp_path)) == before


def test_optimizer_state_is_all_there_or_not_at_all(sound_run, tmp_path):
    """Guards against a parameter that goes on with half of its state; silent heads have none, and other optimizers'
    parameters other state."""
    shutil.copytree(sound_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    silent = next(name for name in load_file(folder / MODEL) if name != WEIGHT)
    tensors(OPTIMIZER, **{f"{silent}.exp_avg": None, f"{silent}.step": None, f"{WEIGHT}.exp_avg": None})(folder)
    (folder / MANIFEST).write_text(manifest_for(folder))
    restored(tmp_path / "run", apart=[WEIGHT])
    with pytest.raises(UserError, match=rf"{OPTIMIZER}: its tensor {WEIGHT}.exp_avg is missing"):
        restored(tmp_path / "run")


def test_a_folder_that_is_a_link_is_refused(sound_run, tmp_path):
    """Guards against a checkpoint that lies outside of the run, and against removing what a link leads to."""
    shutil.copytree(sound_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    outside = content(tmp_path / "outside")
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match="step-00000001 is damaged: it is not a folder"):
        load(run.path, device="cpu")
    assert newest_whole_checkpoint(run)[0] is None
    for step in (2, 3):
        save_checkpoint(run, Snapshot({}, {}, {"step": step}), best=True, keep=1)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["best", "last", "step-00000003"]
    assert content(tmp_path / "outside") == outside
