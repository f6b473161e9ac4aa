"""charlm as it is installed, with nothing of the checkout: what a user of transformers does with a model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")

ROOT = Path(__file__).resolve().parents[2]
USE = """
import sys
from pathlib import Path

import charlm.hf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

assert Path(charlm.__file__).is_relative_to(sys.argv[2]), charlm.__file__
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
texts = [tokenizer("abcdefgh" * (1 + number % 3)) for number in range(64)]
how = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 0.02, "logging_steps": 1}
trainer = Trainer(
    model,
    TrainingArguments("out", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **how),
    train_dataset=texts,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < losses[0] / 2, losses
trainer.save_model("tuned")
again = AutoModelForCausalLM.from_pretrained("tuned")
ids = torch.tensor([texts[0]["input_ids"]])
assert torch.equal(again(ids).logits, model.eval()(ids).logits)
prompt = AutoTokenizer.from_pretrained("tuned")("abcdefgh", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=4, do_sample=False)[0]))
print(charlm.generate(charlm.load("tuned", device="cpu"), "abcdefgh", length=4, temperature=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ngrams": (2, 3), "ngram_buckets": 64}], ids=str)
def test_load_tune_save_and_load(options, export, tmp_path):
    """Guards against files that are not in the package, gradients that the library's optimizer cannot use, and a tuned
    model that is not saved, or that charlm cannot read."""
    _, folder = export(**options)
    place = tmp_path / "installed"
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(place)]
    for name in ("charlm", "scripts", "configs"):  # pip writes beside what it builds
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(tmp_path / "source")], check=True, timeout=300)
    others = [path for path in sys.path if path and not Path(path, "charlm").exists()]
    paths = os.pathsep.join([str(place), *others])
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE, str(folder), str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    text, ours = done.stdout.splitlines()[-2:]
    assert text == "abcdefgh" + ours
