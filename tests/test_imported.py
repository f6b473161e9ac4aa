"""Models of nanoGPT that are imported, beside nanoGPT's network."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from charlm.formats.imported import read_model
from charlm.runs.load import load
from exporting import logits
from nano import ARGS, STOI, tensors_of, vocabulary_of, write_nano
from tiny import refused


def nano(tensors: dict[str, torch.Tensor], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of nanoGPT's network, written down once more."""

    def norm(x, name):
        return F.layer_norm(x, (16,), tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    x = tensors["transformer.wte.weight"][ids_BT] + tensors["transformer.wpe.weight"][: ids_BT.shape[1]]
    for layer in ("transformer.h.0", "transformer.h.1"):
        parts = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(16, dim=2)
        query, key, value = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{layer}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors["transformer.wte.weight"].T


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of five characters, as docs/sharing.md says to write it."""
    write_nano(tmp_path / "nano")
    return tmp_path / "nano"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [5, 256])
def test_the_same_logits(bias, size, folder):
    """Guards against a tensor in another's place, another GELU, norms without biases that get some, a classifier that
    is not the embedding, and characters whose ids are sorted while their embeddings are not."""
    tensors = tensors_of(bias, size)
    (folder / "config.json").write_text(json.dumps(ARGS | {"bias": bias, "vocab_size": size}))
    if size == 256:
        (folder / "meta.json").unlink()
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    trained = read_model(folder, *vocabulary_of(folder))
    text = "bé日a\na日日bé" if size == 5 else "It is."
    theirs = torch.tensor([[STOI[one] for one in text] if size == 5 else list(text.encode())])
    ours = torch.tensor([trained.vocabulary.encode(text.encode()).tolist()])
    found = logits(trained, ours)
    if size == 5:
        found = found[..., [sorted(STOI).index(one) for one in STOI]]
    torch.testing.assert_close(found, nano(tensors, theirs), atol=1e-5, rtol=1e-5)


def test_a_model_is_scored_on_its_text(folder, script, tmp_path):
    """Guards against an imported model that our protocol cannot score, since the record of its text or its vocabulary
    is another; and against a folder that is overwritten."""
    text = "ab\né日aab" * 300
    (tmp_path / "text.txt").write_text(text)
    data = [f"--data.path={tmp_path / 'text.txt'}", f"--data.cache_dir={tmp_path / 'cache'}"]
    code, printed, error = script("import", folder, "--to", tmp_path / "ours", *data)
    assert code == 0, error
    assert "evaluate.py" in printed
    code, printed, error = script("evaluate", tmp_path / "ours", *data, "--json", "--limit=20")
    assert code == 0, error
    score = json.loads(printed)
    assert score["symbols"] == 20 and 0 < score["bits_per_character"] < 30
    trained = load(tmp_path / "ours", device="cpu")
    assert trained.started_from["name"] == "nano" and trained.vocabulary.characters == "\nabé日"
    assert script("import", folder, "--to", tmp_path / "untold")[0] == 0
    assert load(tmp_path / "untold", device="cpu").corpus["name"] == "unknown"
    code, _, error = script("import", folder, "--to", tmp_path / "ours")
    assert code == 2 and error.startswith("error: to=")


REFUSED = {
    "stoi": ("meta.json", {"stoi": {"a": 0, "b": 2}}),
    "stoi ": ("meta.json", {"stoi": {"ab": 0}}),
    "stoi  ": ("meta.json", {}),
    "vocab_size": ("config.json", ARGS | {"vocab_size": 50304}),
    "vocab_size ": ("config.json", ARGS | {"vocab_size": "5"}),
    "model_type": ("config.json", {"model_type": ["llama"]}),
    "model.num_layers": ("config.json", ARGS | {"n_layer": "two"}),
    "model.d_model": ("config.json", ARGS | {"n_embd": 15}),
    "vocabulary": ("tokenizer.json", {}),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_no_such_model_is_refused(option, folder):
    """Guards against tracebacks for what strangers write, and ids that are taken for others."""
    name, content = REFUSED[option]
    (folder / name).write_text(json.dumps(content))
    if option == "vocabulary":
        (folder / "meta.json").unlink()
    with refused(option.strip()):
        read_model(folder, *vocabulary_of(folder))


@pytest.mark.parametrize(
    "change", [{"transformer.h.0.attn.extra": torch.ones(2)}, {"transformer.h.1.attn.c_attn.weight": torch.ones(())}]
)
def test_every_tensor_has_a_place(change, folder):
    """Guards against tensors that are left out, and tracebacks for those of another shape."""
    save_file(tensors_of(False, 5) | change, folder / "model.safetensors")
    with refused(None, "tensor"):
        read_model(folder, *vocabulary_of(folder))


def test_a_checkpoint_is_no_folder(tmp_path, script):
    """Guards against a pickle that is read, or a traceback for one."""
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    code, _, error = script("import", tmp_path / "ckpt.pt", "--to", tmp_path / "ours")
    assert code == 2 and error.count("error: ") == 1 and "docs/sharing.md" in error
