"""Models of transformers that are imported: the same logits in charlm, or a refusal by name."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from charlm.config import UserError
from charlm.formats import imported
from charlm.runs.exported import save_model
from charlm.runs.load import load
from exporting import logits, some_ids
from nano import vocabulary_of
from tiny import refused

NEOX = {
    **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40},
    **{"max_position_embeddings": 32, "vocab_size": 256, "use_parallel_residual": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}
STARCODER = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 32, "vocab_size": 256, "hidden_act": "gelu"},
}
SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 256}
GPT2 = SMALL_GPT2 | {"activation_function": "gelu"}
SAME = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2, untied": GPT2Config(**GPT2 | {"activation_function": "relu", "n_inner": 40, "tie_word_embeddings": False}),
    "gpt_neox": GPTNeoXConfig(**NEOX),
    "gpt_neox, tied": GPTNeoXConfig(**NEOX, attention_bias=False, hidden_act="relu", tie_word_embeddings=True),
    "starcoder2": Starcoder2Config(**STARCODER),
    "starcoder2, untied": Starcoder2Config(
        **STARCODER | {"hidden_act": "relu2"}, use_bias=False, tie_word_embeddings=False
    ),
}
DIFFERENT = {
    "model.activation": GPT2Config(**SMALL_GPT2),  # gelu_new is the default
    "layer_norm_epsilon": GPT2Config(**GPT2, layer_norm_epsilon=1e-6),
    "scale_attn_weights": GPT2Config(**GPT2, scale_attn_weights=False),
    "scale_attn_by_inverse_layer_idx": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "use_parallel_residual": GPTNeoXConfig(**NEOX | {"use_parallel_residual": True}),
    "rope_parameters": GPTNeoXConfig(**NEOX | {"rope_parameters": None}),  # a quarter is rotated
    "norm_epsilon": Starcoder2Config(**STARCODER, norm_epsilon=1e-6),
    "num_key_value_heads": Starcoder2Config(**STARCODER | {"num_key_value_heads": 1}),
    "sliding_window": Starcoder2Config(**STARCODER, sliding_window=4),
    "vocab_size": GPT2Config(**GPT2 | {"vocab_size": 257}),
    "model_type": LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
}


def read_model(folder: Path):
    """The model of a folder, with the vocabulary that is found there."""
    return imported.read_model(folder, *vocabulary_of(folder))


@pytest.fixture
def foreign(tmp_path, randomise):
    """`foreign(config)`: a random model of transformers, and the folder where the library saved it."""

    def make(config: PreTrainedConfig):
        model = randomise(AutoModelForCausalLM.from_config(config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.4)  # logits of a few units, as a trained model's
                if "ln_" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


def edit(folder: Path, **entries) -> None:
    """Change entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_the_same_logits(name, foreign, tmp_path):
    """Guards against a tensor in another's place: fused matrices that are cut otherwise, transposed ones, positions, a
    classifier that is or is not the embedding, biases that are missing; and a folder that charlm.load does not read."""
    model, folder = foreign(SAME[name])
    save_model(read_model(folder), tmp_path / "ours")
    trained = load(tmp_path / "ours", device="cpu")
    ids = some_ids(trained, 3, 32)
    torch.testing.assert_close(logits(trained, ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert trained.vocabulary.name == "bytes" and trained.started_from["kind"] == name.partition(",")[0]


@pytest.mark.parametrize("option", DIFFERENT)
def test_what_charlm_cannot_compute_is_refused(option, foreign):
    """Guards against a model that is imported and predicts something else."""
    _, folder = foreign(DIFFERENT[option])
    with refused(option):
        read_model(folder)


def test_options_unknown_to_us_are_found_by_the_logits(foreign, monkeypatch):
    """Guards against an option of a later version of the library that changes what a model computes."""
    _, folder = foreign(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))
    monkeypatch.delitem(imported.NEEDED, "scale_attn_by_inverse_layer_idx")
    with refused("logits"):
        read_model(folder)


DAMAGED = {
    "without a place": lambda tensors: tensors | {"transformer.h.0.attn.extra": torch.ones(2)},
    "missing": lambda tensors: {name: own for name, own in tensors.items() if "wpe" not in name},
    "no embedding": lambda tensors: {name: own for name, own in tensors.items() if "wte" not in name},
    "another shape": lambda tensors: tensors | {"transformer.h.1.attn.c_attn.weight": torch.ones(16, 47)},
    "a number": lambda tensors: tensors | {"transformer.h.1.attn.c_attn.weight": torch.ones(())},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_every_tensor_has_a_place(damage, foreign):
    """Guards against tensors that are left out or made up, and tracebacks for those of another shape."""
    _, folder = foreign(GPT2Config(**GPT2))
    path = folder / "model.safetensors"
    save_file(DAMAGED[damage](load_file(path)), path)
    with refused(None, "tensor"):
        read_model(folder)


@pytest.mark.parametrize("entries", [{"n_layer": 10_000}, {"n_head": 3}, {"n_layer": "two"}, {"n_embd": 0}])
def test_sizes_are_checked_before_anything_is_built(entries, foreign):
    """Guards against a config of a stranger's that names a network which its tensors do not fill."""
    _, folder = foreign(GPT2Config(**GPT2))
    edit(folder, **entries)
    with pytest.raises(UserError):
        read_model(folder)


@pytest.mark.parametrize("vocabulary", ["bytes", "characters", "sentencepiece"])
def test_there_and_back(vocabulary, export):
    """Guards against a stock export that does not come back with the same weights, options and vocabulary, and ids that
    are taken for bytes though a tokenizer says otherwise."""
    stock = {"position_encoding": "rotary", "head_bias": False, "pairs": ((2, 1),)}
    trained, folder = export("transformers-stock", vocabulary, **stock)
    back, ids = read_model(folder), some_ids(trained, 2, 20)
    assert back.vocabulary == trained.vocabulary and back.config.model == trained.config.model
    assert torch.equal(logits(back, ids), logits(trained, ids))
    (folder / "vocabulary.json").unlink()
    with refused("vocabulary"):
        read_model(folder)
