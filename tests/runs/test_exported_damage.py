"""Exported folders that someone broke, or made to do harm: one message that names the file and the reason."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from charlm import formats
from charlm.config import UserError
from charlm.data.vocabulary import CharacterVocabulary
from charlm.runs.exported import save_model
from charlm.runs.load import load
from storage import content, entries, missing, replaced, tensors, written

CONFIG, TENSORS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.json"


@pytest.fixture
def sound(build_model, tmp_path) -> Path:
    """A folder that loads."""
    return save_model(build_model(), tmp_path / "sound")


PLACE = [CONFIG, "name a place on a machine"]
CASES = {
    "no tensors": (missing(TENSORS), [TENSORS, "is missing"]),
    "no vocabulary": (missing(VOCABULARY), [VOCABULARY, "is missing"]),
    "a pipe that never ends": (replaced(TENSORS, os.mkfifo), [TENSORS, "regular file"]),
    "a config that never ends": (replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")), [CONFIG]),
    "a config that is no JSON": (written(CONFIG, "{"), [CONFIG, "cannot be read as JSON"]),
    "a config of megabytes": (written(CONFIG, "[" + "0," * 2**20 + "0]"), [CONFIG, "more than 1,048,576 bytes"]),
    "another library's config": (written(CONFIG, '{"model_type": "gpt2"}'), [CONFIG, "does not fit this version"]),
    "a later format": (entries(CONFIG, format=2), [CONFIG, "format"]),
    "options nested deeply": (entries(CONFIG, options__model=json.loads("[" * 300 + "]" * 300)), [CONFIG]),
    "an unknown option": (entries(CONFIG, options__model__virus=1), [CONFIG, "virus"]),
    "code in an option": (
        entries(CONFIG, options__model__norm="!!python/object/apply:os.system ['x']"),
        [CONFIG, "norm"],
    ),
    "a place to write": (entries(CONFIG, options__data__cache_dir="/etc"), PLACE),
    "a folder to train into": (entries(CONFIG, options__run={"dir": "/etc"}), PLACE),
    "a file to read": (entries(CONFIG, options__data={"corpus": "file", "path": "/etc/passwd"}), PLACE),
    "a dataset that is a folder": (entries(CONFIG, options__data={"corpus": "hub", "hub_id": "/home/me"}), PLACE),
    "a model larger than the file": (entries(CONFIG, options__model__d_model=4096), [TENSORS, "float32"]),
    "a model larger than any machine": (entries(CONFIG, options__model__d_model=10**12), [CONFIG, "no machine"]),
    "ten thousand layers": (
        entries(CONFIG, options__model__num_layers=10_000, heads__pairs=[[10_000, 1]]),
        [TENSORS, "too few for the 10,000 layers"],
    ),
    "layers that are missing": (
        entries(CONFIG, options__model__num_layers=3, heads__pairs=[[3, 1], [2, 1], [1, 1]]),
        [TENSORS, "too few for the 3 layers"],
    ),
    "a context of a billion": (
        entries(CONFIG, options__model__context_length=10**9, options__model__position_encoding="rotary"),
        [TENSORS, "no machine like this"],
    ),
    "no head for the last layer": (entries(CONFIG, heads__pairs=[[1, 1]]), [CONFIG, "heads.pairs"]),
    "a head of no layer": (entries(CONFIG, heads__pairs=[[3, 1], [2, 1]]), [CONFIG, "heads.pairs"]),
    "heads without end": (entries(CONFIG, heads__pairs=[[2, 1], [2, 10**9]]), [CONFIG, "heads.pairs"]),
    "a head more than there are tensors": (
        entries(CONFIG, heads__pairs=[[1, 1], [2, 1], [2, 2]]),
        [TENSORS, "tensor heads", "is missing"],
    ),
    "a weight of no layer": (entries(CONFIG, hedge_weights={"3": 1.0}), [CONFIG, "hedge_weights"]),
    "weights that are zero": (entries(CONFIG, hedge_weights={"2": 0.0}), [CONFIG, "hedge_weights"]),
    "a step beyond numbers": (entries(CONFIG, step=10**400), [CONFIG, "step"]),
    "a corpus without a hash": (entries(CONFIG, corpus={"name": "x"}), [CONFIG, "corpus.sha256"]),
    "another vocabulary": (
        written(VOCABULARY, json.dumps(CharacterVocabulary("ab").to_dict())),
        [TENSORS, "its tensor heads.exits.layer1.offset1.bias is float32 [256]", "float32 [2]"],
    ),
    "a vocabulary that is none": (written(VOCABULARY, "[]"), [VOCABULARY, "not one that this version knows"]),
    "a damaged vocabulary": (
        written(VOCABULARY, json.dumps(CharacterVocabulary("ab").to_dict() | {"characters": "abc"})),
        [VOCABULARY, "damaged"],
    ),
    "a header said to be huge": (written(TENSORS, (2**63).to_bytes(8, "little") + b"{}"), [TENSORS, "too large"]),
    "an extra tensor": (tensors(TENSORS, virus=torch.zeros(1)), [TENSORS, "tensor virus is float32 [1]"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_folder_is_answered_with_one_message(case, sound, tmp_path):
    """Guards against tracebacks, code that runs, places on this machine that a stranger names, memory that a file asks
    for, and tensors of another model."""
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    change, parts = CASES[case]
    change(folder)
    before = None if "never ends" in case else content(tmp_path)
    with pytest.raises(UserError) as caught:
        load(folder, device="cpu")
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message
    assert before is None or content(tmp_path) == before


ELSEWHERE = (
    *("a config that never ends", "a config that is no JSON", "a config of megabytes"),
    *("another library's config", "another vocabulary", "a step beyond numbers"),
)
"""Cases in which that library reads the file before charlm is asked, or in which model and tokenizer are sound."""


@pytest.mark.parametrize("case", [case for case in CASES if case not in ELSEWHERE])
def test_a_broken_folder_in_transformers(case, build_model, tmp_path):
    """Guards against the same, where another library opens the folder."""
    pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")
    from charlm.hf import CharlmForCausalLM, CharlmTokenizer

    folder = formats.save_model(build_model(), tmp_path / "model", "transformers")
    change, parts = CASES[case]
    change(folder)
    with pytest.raises((UserError, ValueError)) as caught:
        CharlmForCausalLM.from_pretrained(folder)
        CharlmTokenizer.from_pretrained(folder)
    assert all(part in str(caught.value) for part in parts if not part.endswith(".json"))


def test_a_checkpoint_of_what_has_none_is_refused(sound):
    """Guards against the one model that there is under the name of another."""
    with pytest.raises(UserError, match=r"checkpoint=last: .* is an exported model, which has only one"):
        load(sound, "last")


def test_links_of_the_library_cache_are_followed(sound, tmp_path):
    """Guards against refusing the folders of the hub's own library, whose files are links."""
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, TENSORS, VOCABULARY):
        (tmp_path / "snapshot" / name).symlink_to(sound / name)
    assert load(tmp_path / "snapshot", device="cpu").step == 7
