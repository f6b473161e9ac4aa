"""Models exported as a stock architecture of transformers: the same logits without charlm, or a refusal by name."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")

from transformers import AutoModelForCausalLM, AutoTokenizer, Starcoder2ForCausalLM

from exporting import TEXT, logits, some_ids
from tiny import refused

STOCK = {"position_encoding": "rotary", "head_bias": False, "pairs": ((2, 1),)}
MODELS = {
    "relu": {"vocabulary": "bytes"},
    "gelu": {"vocabulary": "characters", "activation": "gelu", "num_layers": 2, "context_length": 512},
    "relu squared": {"vocabulary": "sentencepiece", "activation": "relu_squared", "num_heads": 4},
}
ALONE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
assert not any(name.partition(".")[0] == "charlm" for name in sys.modules)
try:
    import charlm
    raise SystemExit("charlm is there")
except ImportError:
    pass
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer("The end.").input_ids)
print(pipeline("text-generation", sys.argv[1], device="cpu")("The ", max_new_tokens=5, do_sample=False)[0])
"""


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_model(name, export):
    """Guards against a tensor in another's place, other angles of rotation, a norm of another size, another
    activation, and ids that a tokenizer renumbers."""
    trained, folder = export("transformers-stock", **STOCK, **MODELS[name])
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is Starcoder2ForCausalLM
    ids = some_ids(trained, 2, trained.config.model.context_length)
    torch.testing.assert_close(loaded(ids).logits, logits(trained, ids), atol=1e-4, rtol=1e-4)
    spelt = trained.vocabulary.encode(TEXT.encode()).tolist()
    assert tokenizer(TEXT).input_ids == spelt and tokenizer.decode(spelt, skip_special_tokens=True) == TEXT
    if name != "gelu":  # a vocabulary of characters has no id to spare
        both = tokenizer(["The", "The end."], padding=True, return_tensors="pt")
        assert both.attention_mask.tolist() == [[0] * 5 + [1] * 3, [1] * 8]
        short = loaded(**both).logits[0, -1]
        torch.testing.assert_close(short, logits(trained, both.input_ids[:1, 5:])[0, -1], atol=1e-4, rtol=1e-4)


REFUSED = {
    "model.position_encoding": {"position_encoding": "input"},
    "model.norm": {"norm": "post"},
    "model.ngrams": {"ngrams": (2,)},
    "keep_heads": {"pairs": ((1, 1), (2, 1))},
    "model.head_bias": {"head_bias": True},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_exact_is_refused(option, export, tmp_path):
    """Guards against a stock model that computes something else, and a folder that is left half-written."""
    with refused(option, "transformers-stock"):
        export("transformers-stock", **STOCK | REFUSED[option])
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_without_charlm(export, tmp_path):
    """Guards against a folder that needs a class of ours, or code in it."""
    trained, folder = export("transformers-stock", **STOCK)
    (tmp_path / "elsewhere").mkdir()
    paths = [path for path in sys.path if path and not os.path.isdir(os.path.join(path, "charlm"))]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompt = torch.tensor([list(b"The ")])
    for _ in range(5):
        prompt = torch.cat([prompt, logits(trained, prompt)[:, -1:].argmax(-1)], dim=1)
    text = bytes(prompt[0].tolist()).decode("utf-8", "replace")
    assert done.stdout == f"{list(b'The end.')}\n{ {'generated_text': text} }\n"
