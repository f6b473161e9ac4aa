"""Graphs of charlm's models, run by onnxruntime beside charlm."""

import pytest
import torch

pytest.importorskip("onnxscript", reason="not installed, see requirements-hf.txt")
pytest.importorskip("onnxruntime", reason="not installed, see requirements-hf.txt")

import onnxruntime

import charlm
from exporting import SIX, logits, some_ids
from tiny import refused

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def graph(path):
    """A function from arrays by name to the graph's outputs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [own.name for own in session.get_inputs()]

    def run(*inputs: torch.Tensor):
        given = {name: own.contiguous().numpy() for name, own in zip(names, inputs, strict=True)}
        return map(torch.from_numpy, session.run(None, given))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_prefill_and_steps(name, export):
    """Guards against a graph that holds for the batch or the length it was traced with, positions that begin anew,
    n-grams that do not see the symbols before, and a folder
    that tells where it was made."""
    trained, folder = export("onnx", **SIX[name])
    run, V = graph(folder / "model.onnx"), trained.vocabulary.size
    for batch, *lengths in ((1, 1, 1, 1), (3, 7, 1, 1), (20, 25, 4, 1), (2, 32), (1, 31, 1)):
        ids = some_ids(trained, batch, sum(lengths))
        expected, found, keys, place = logits(trained, ids), [], torch.zeros(2, batch, 2, 0, 4), 0
        values = keys
        for length in lengths:
            before = torch.cat([ids.new_full((batch, 3), -1), ids[:, :place]], dim=1)[:, -3:]
            past = [keys, values, before][: 3 if "ngrams" in SIX[name] else 2]
            out, keys, values = run(ids[:, place : place + length], *past)
            found.append(out)
            place += length
        torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)
        assert found[0].shape == (batch, lengths[0], V) and keys.shape == (2, batch, 2, place, 4)
    texts = {"config.json", "vocabulary.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == texts | {"model.safetensors", "model.onnx", "model.onnx.data"}
    assert b".py" not in (folder / "model.onnx").read_bytes()
    assert torch.equal(logits(charlm.load(folder, device="cpu"), ids), expected)


def test_what_cannot_be_exported(export, tmp_path):
    """Guards against a context that is too short to trace, and a folder that is left half-written."""
    with refused("model.context_length"):
        export("onnx", context_length=3)
    assert list(tmp_path.iterdir()) == []
