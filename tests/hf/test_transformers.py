"""charlm's models in transformers, beside the same models in charlm."""

import json
import re
import runpy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import charlm
from charlm.config import UserError
from charlm.hf import CharlmConfig, CharlmForCausalLM, CharlmTokenizer, model
from exporting import NGRAMS, SIX, TEXT, logits, some_ids

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name_of_the_cache", ["past_key_values", "cache"])
@pytest.mark.parametrize("name", SIX)
@torch.no_grad()
def test_all_that_charlm_predicts(name, name_of_the_cache, export, tmp_path):
    """Guards against another network under the name of ours: logits of every head, with a cache and without, hidden
    states, the loss in nats; and against tensors that change on their way through a saved folder and back to charlm."""
    trained, folder = export(**SIX[name])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is CharlmForCausalLM and not loaded.training
    ids = some_ids(trained, 3, 20)
    out = loaded(ids, output_hidden_states=True, labels=ids)
    torch.testing.assert_close(out.logits, logits(trained, ids), **CLOSE)
    for layer, states in trained.transformer(ids, (1, 2)).items():
        torch.testing.assert_close(out.hidden_states[layer], states, **CLOSE)
    for layer, offset in trained.heads.pairs:
        ours = logits(trained, ids, layer, offset)
        torch.testing.assert_close(loaded.exit_logits(layer, offset, input_ids=ids), ours, **CLOSE)
    first = loaded(ids[:, :7])
    seen = {"seen_ids": ids} if "ngrams" in SIX[name] else {}
    rest = loaded(ids[:, 7:], **{name_of_the_cache: first.past_key_values}, **seen)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), logits(trained, ids), **CLOSE)
    nats = cross_entropy(logits(trained, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, nats, **CLOSE)
    loaded.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits)
    for place in (folder, tmp_path / "saved"):
        back = charlm.load(place, device="cpu")
        assert torch.equal(logits(back, ids), logits(trained, ids)) and back.vocabulary == trained.vocabulary
        assert back.config.model == trained.config.model


WAYS = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "a cache of fixed size": {"cache_implementation": "static"},
    "the likeliest of a sample": {"do_sample": True, "top_k": 1},
    "an early exit drafts": {"assistant_early_exit": 1},
    "the prompt drafts": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", ["the paper's", "rotary", "n-grams", "n-grams of characters"])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_text(name, way, export):
    """Guards against a cache, padding or drafts that change the text: each row is what charlm predicts for it alone,
    symbol by symbol from the whole text so far."""
    trained, folder = export(**SIX[name])
    loaded = CharlmForCausalLM.from_pretrained(folder)
    prompts = [some_ids(trained, 1, length) for length in ((9,) if "drafts" in way else (3, 9, 1))]
    width = max(prompt.shape[1] for prompt in prompts)
    padded = [pad(prompt, (width - prompt.shape[1], 0), value=trained.vocabulary.size) for prompt in prompts]
    texts = loaded.generate(torch.cat(padded), max_new_tokens=12, **{"do_sample": False} | WAYS[way])
    for prompt, text in zip(prompts, texts, strict=True):
        for _ in range(12):
            prompt = torch.cat([prompt, logits(trained, prompt)[:, -1:].argmax(-1)], dim=1)
        assert text[width:].tolist() == prompt[0, -12:].tolist()


def test_beams(export):
    """Guards against a cache whose rows stay behind when beams change places: with as many beams as there are texts,
    the text found is the likeliest of all."""
    trained, folder = export(vocabulary="characters", **NGRAMS)
    loaded, V = CharlmForCausalLM.from_pretrained(folder), trained.vocabulary.size
    prompt = some_ids(trained, 1, 5)
    all_ends = torch.tensor(list(product(range(V), repeat=2)))
    texts = torch.cat([prompt.expand(len(all_ends), -1), all_ends], dim=1)
    nats = logits(trained, texts).log_softmax(-1)[:, 4:6].gather(2, all_ends[..., None]).sum(dim=(1, 2))
    found = loaded.generate(prompt, max_new_tokens=2, num_beams=V, do_sample=False)
    assert found[0, 5:].tolist() == all_ends[nats.argmax()].tolist()


def test_samples_follow_the_distribution(export):
    """Guards against warpers that see other logits than those of the model."""
    trained, folder = export(vocabulary="characters")
    loaded = CharlmForCausalLM.from_pretrained(folder)
    prompt = some_ids(trained, 1, 6)
    torch.manual_seed(0)
    drawn = loaded.generate(prompt.expand(4000, -1), max_new_tokens=1, do_sample=True, temperature=4.0, top_k=0)[:, -1]
    shares = torch.bincount(drawn, minlength=trained.vocabulary.size) / 4000
    torch.testing.assert_close(shares, (logits(trained, prompt)[0, -1] / 4).softmax(-1), atol=0.04, rtol=0)


@pytest.mark.parametrize("vocabulary", ["bytes", "characters", "sentencepiece"])
def test_tokenizer(vocabulary, export):
    """Guards against ids that are not the vocabulary's, special tokens found in a text, and text that is cleaned up."""
    trained, folder = export(vocabulary=vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is CharlmTokenizer
    ids = trained.vocabulary.encode(TEXT.encode()).tolist()
    assert tokenizer(TEXT).input_ids == ids and tokenizer.decode(ids) == TEXT
    both = tokenizer(["The", TEXT], padding=True)
    padding = len(ids) - 3
    assert both.input_ids[0] == [trained.vocabulary.size] * padding + ids[:3]
    assert both.attention_mask[0] == [0] * padding + [1] * 3
    assert tokenizer.batch_decode(both.input_ids, skip_special_tokens=True) == ["The", TEXT]
    for symbol, id in enumerate(trained.vocabulary.symbols[vocabulary == "sentencepiece" :]):
        assert tokenizer.decode([symbol + (vocabulary == "sentencepiece")]) == id.decode("utf-8", "replace")


def test_pipeline_and_card(export, monkeypatch, capsys):
    """Guards against a card whose lines do not run, and a pipeline that adds, cleans or drops text."""
    trained, folder = export()
    monkeypatch.chdir(folder.parent)
    made = pipeline("text-generation", "exported", device="cpu")
    texts = made(["The ", "a"], max_new_tokens=5, do_sample=False, batch_size=2)
    prompts = [torch.tensor([list(prompt)]) for prompt in (b"The ", b"a")]
    for (text,), prompt in zip(texts, prompts, strict=True):
        for _ in range(5):
            prompt = torch.cat([prompt, logits(trained, prompt)[:, -1:].argmax(-1)], dim=1)
        assert text["generated_text"] == bytes(prompt[0].tolist()).decode("utf-8", "replace")
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert card.startswith("---\nlibrary_name: charlm\n") and len(code.splitlines()) == 4
    Path("example.py").write_text(code.replace("max_new_tokens=16", "max_new_tokens=5, do_sample=False"))
    runpy.run_path("example.py")
    assert capsys.readouterr().out == texts[0][0]["generated_text"] + "\n"


def test_positions_beyond_the_context(export):
    """Guards against tables that are read beyond their end, or silently from the start again."""
    trained, folder = export()
    loaded = CharlmForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="33 positions exceed the context of 32"):
        loaded.generate(some_ids(trained, 1, 30), max_new_tokens=8)
    left = pad(some_ids(trained, 1, 30), (9, 0), value=256)
    assert loaded.generate(left, max_new_tokens=3).shape == (1, 42)  # padding takes no place


def test_ngrams_ask_for_the_ids_before(export):
    """Guards against n-grams that begin anew at each call, without a word."""
    trained, folder = export(**NGRAMS)
    loaded, ids = CharlmForCausalLM.from_pretrained(folder), some_ids(trained, 1, 6)
    with pytest.raises(ValueError, match="seen_ids"):
        loaded(ids[:, 3:], past_key_values=loaded(ids[:, :3]).past_key_values)


@pytest.mark.parametrize("options", [{}, NGRAMS, {"norm": "post", "position_encoding": "rotary"}], ids=str)
def test_gradients(options, export):
    """Guards against padding and checkpointing that change gradients, and sparse ones, which many optimizers refuse."""
    trained, folder = export(**options)
    ids, gradients = some_ids(trained, 2, 9), []
    padded = pad(ids, (4, 0), value=256)
    for inputs, checkpointing in ((ids, False), (padded, False), (padded, True)):
        loaded = CharlmForCausalLM.from_pretrained(folder).train()
        if checkpointing:
            loaded.activation_checkpointing_enable()
        labels = inputs.masked_fill(inputs == 256, -100)
        labels[:, -9] = -100  # else padding predicts it
        loaded(inputs, attention_mask=(inputs != 256).long(), labels=labels).loss.backward()
        gradients.append({name: own.grad for name, own in loaded.named_parameters() if own.grad is not None})
    assert not any(gradient.is_sparse for gradient in gradients[0].values())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-4, rtol=1e-4)


def test_a_config_from_scratch():
    """Guards against a new model that needs a record of training."""
    config = CharlmConfig(vocab_size=7, options={"model": {"num_layers": 3, "d_model": 8, "num_heads": 2}})
    new = CharlmForCausalLM(config)
    assert new.heads.pairs == [(3, 1)] and config.num_hidden_layers == 3 and config.hidden_size == 8
    assert not new(torch.zeros(1, 4, dtype=torch.long)).logits.any()  # heads start at zero
    assert new.generation_config.pad_token_id == 7


def change_config(folder: Path, **entries) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | entries))


def test_no_code_and_no_pickle_of_the_folder(export, tmp_path):
    """Guards against code that config.json names, weights in a pickle, and weights in another file than was checked."""
    _, folder = export()
    hurt = tmp_path / "hurt"
    code = f"open({str(hurt)!r}, 'w')\n"
    (folder / "virus.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change_config(folder, auto_map=dict.fromkeys(names, "virus.Virus"), transformers_weights="virus.bin")
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 65, "content": "B", "special": true}]}')
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(hurt).encode() + b"'\ntR.")
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        loaded = kind.from_pretrained(folder)
    assert loaded("AB").input_ids == [65, 66] and loaded.decode([65, 66]) == "AB"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not hurt.exists()


def test_models_of_the_hub(export, monkeypatch):
    """Guards against another revision than was asked for, and files that are fetched beside those that are needed."""
    _, folder = export()
    calls = []
    monkeypatch.setattr(model, "snapshot_download", lambda *given, **how: calls.append((given, how)) or folder)
    CharlmForCausalLM.from_pretrained("owner/model", revision="v1", token="t")
    patterns = ["*.json", "*.safetensors"]
    assert calls == [(("owner/model",), {"allow_patterns": patterns, "revision": "v1", "token": "t"})]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype, export, tmp_path):
    """Guards against a model that was saved in a smaller type and cannot be loaded, and against masks in one type."""
    _, folder = export()
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.dtype == dtype
    out = small.generate(torch.tensor([[256, 256, 65], [65, 66, 67]]), max_new_tokens=4)
    assert out.shape == (2, 7)
