"""Models cut to a depth, and folders to share: the same logits, the same figures, from the folder alone."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from charlm.config import AuxConfig, Config, DataConfig, LayersConfig, ModelConfig, TrainConfig, UserError
from charlm.data.corpus import load_corpus
from charlm.data.vocabulary import CharacterVocabulary
from charlm.inference.evaluation import bits_per_character
from charlm.inference.generation import generate
from charlm.model import kernels_cpu
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.runs import exported
from charlm.runs.exported import save_model
from charlm.runs.load import load
from charlm.runs.trained import TrainedModel, shallowest, truncate
from storage import content, left_of
from tiny import SCRIPTS, run_script

PAIRS = [(layer, offset) for layer in (1, 2, 4) for offset in (1, 2)]
MODELS = {
    "pre": {},
    "post": {"norm": "post"},
    "rotary": {"position_encoding": "rotary"},
    "input": {"position_encoding": "input"},
    "n-grams": {"ngrams": (2, 3), "ngram_buckets": 50, "ngram_width": 4},
}
HEADS = ("linear", "shared", "shared_frozen", "tower")


@pytest.fixture
def build(randomise):
    """`build(head, **model options)`: a random model of four layers, with heads for two offsets on three of them."""

    def make(head: str = "linear", **options) -> TrainedModel:
        config = Config(
            data=DataConfig(corpus="file", path=Path("/home/somebody/secret/text.txt"), vocabulary="characters"),
            model=ModelConfig(num_layers=4, num_heads=2, d_model=8, d_ff=16, context_length=8, **options),
            aux=AuxConfig(layers=LayersConfig(at=(1, 2), head=head, tower_width=0.75 if head == "tower" else None)),
            train=TrainConfig(steps=77),
        )
        vocabulary = CharacterVocabulary("abcdefgh")
        transformer = randomise(CharTransformer(config.model, vocabulary.size))
        shared = {"layers": config.aux.layers, "final_norm": transformer.final_norm}
        return TrainedModel(
            config=config,
            transformer=transformer.eval(),
            heads=randomise(Heads(config.model, vocabulary.size, PAIRS, **shared), seed=1).eval(),
            vocabulary=vocabulary,
            checkpoint="step-00000007",
            step=7,
            corpus={"name": "file", "sha256": "abc", "source": "/home/somebody/secret/text.txt", "splits": {}},
            device=torch.device("cpu"),
        )

    return make


@torch.no_grad()
def logits(trained: TrainedModel, layer: int, offsets: tuple[int, ...] = (1,)) -> torch.Tensor:
    ids = torch.arange(24).view(3, 8) % 8
    return trained.heads(trained.transformer(ids, layers=[layer])[layer], layer, offsets)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("head", HEADS)
def test_a_cut_model_gives_the_logits_of_the_exit(build, tmp_path, head, model):
    """Guards against a norm that is left out or taken twice, a tower without its hidden layer, a shared classifier that
    stays behind, and tables of layers that are gone; before and after the folder is written."""
    whole = build(head, **MODELS[model])
    for depth in (1, 2, 4):
        cut = truncate(whole, depth)
        assert cut.heads.pairs == [(depth, 1)]
        save_model(cut, tmp_path / str(depth))
        for found in (cut, load(tmp_path / str(depth), device="cpu")):
            assert len(found.transformer.blocks) == found.config.model.num_layers == depth
            assert torch.equal(logits(found, depth), logits(whole, depth))


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_kept_on_demand(build, tmp_path, head):
    """Guards against heads below that read other parameters than before, drafts that lose their heads, and heads that
    are made up."""
    whole = build(head)
    with pytest.raises(UserError, match="choose one of 1, 2, 4") as caught:
        truncate(whole, 3)
    assert caught.value.option == "depth"
    save_model(truncate(whole, 2, keep_heads=True), tmp_path / "cut")
    cut = load(tmp_path / "cut", device="cpu")
    assert cut.heads.pairs == [(1, 1), (1, 2), (2, 1), (2, 2)]
    again = truncate(cut, 1)
    for layer in (1, 2):
        assert torch.equal(logits(cut, layer, (1, 2)), logits(whole, layer, (1, 2)))
    assert torch.equal(logits(again, 1), logits(whole, 1))
    assert again.checkpoint == "step-00000007, layers 1 to 2 of 4, layers 1 to 1 of 2"


def test_what_a_folder_says_of_the_model(build, tmp_path):
    """Guards against weights of a mixture or figures that belong to other layers, options that are lost, places on
    somebody's machine that are given away, and a card without the protocol."""
    figure = {"bits_per_character": 1.25, "split": "valid", "stride": 4, "symbols": 90}
    whole = replace(build(), hedge_weights={1: 0.25, 2: 0.25, 4: 0.5}, scores=(figure,))
    save_model(truncate(whole, keep_heads=True), tmp_path / "whole")
    found = load(tmp_path / "whole", device="cpu")
    assert found.hedge_weights == whole.hedge_weights
    assert found.scores == (figure,)
    assert found.config.model == whole.config.model
    assert found.config.data == whole.config.data.replace(path=Path("text.txt"))
    assert (found.step, found.checkpoint, found.corpus["sha256"]) == (7, "step-00000007", "abc")
    assert found.vocabulary == whole.vocabulary
    files = list((tmp_path / "whole").iterdir())
    assert {path.name for path in files} == {"config.json", "model.safetensors", "vocabulary.json", "README.md"}
    assert not any(b"somebody" in path.read_bytes() for path in files)
    assert len({path.stat().st_mode for path in files}) == 1
    card = (tmp_path / "whole" / "README.md").read_text()
    for part in ("**1.2500** bits per character", "split valid", "stride 4", "symbols 90", "4 layers of width 8"):
        assert part in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "charlm"
    assert yaml.safe_load(found.options)["train"] == {"steps": 77}
    save_model(found, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    cut = truncate(whole, 2, keep_heads=True)
    assert (cut.hedge_weights, cut.scores) == (None, ())
    assert cut.checkpoint == "step-00000007, layers 1 to 2 of 4"


def test_the_shallowest_depth_by_hand():
    """Guards against the best layer in place of the lowest, a loss against the last layer in place of the best one, and
    a bound that excludes itself."""
    layers = {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.25, 5: 1.5}
    assert [shallowest(layers, within) for within in (0.0, 0.25, 0.5, 0.75, 2.0)] == [4, 3, 3, 2, 1]


@pytest.mark.slow
def test_a_fresh_process_scores_the_folder_alone_alike(run_on_disk, tmp_path, capfd, monkeypatch, plain_fp32):
    """Guards against a folder that needs its run, and figures that differ in any digit."""
    monkeypatch.setattr(kernels_cpu, "medium_is_fp32", plain_fp32)  # as a fresh process has it
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trained = load(run_on_disk, device="cpu")
    corpus = load_corpus(trained.config.data, show_progress=False)
    expected = {
        "whole": bits_per_character(trained, corpus, all_layers=True),
        "cut": bits_per_character(truncate(trained, 1), corpus),
    }
    assert expected["cut"].bits_per_character == pytest.approx(expected["whole"].layers["1"], abs=1e-6)
    for name, depth in (("whole", []), ("cut", ["--depth=1", "--score=test"])):
        assert run_script("export", str(run_on_disk), f"--to={tmp_path / name}", *depth) == 0
    text = tmp_path / "elsewhere" / "text.txt"
    text.parent.mkdir()
    (run_on_disk.parent / "text.txt").rename(text)
    shutil.rmtree(run_on_disk)
    shutil.rmtree(tmp_path / "cache")
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS.parent)!r})
import charlm, pathlib
for name in ("whole", "cut"):
    trained = charlm.load(name, device="cpu")
    data = trained.config.data.replace(path=pathlib.Path({str(text)!r}), cache_dir=pathlib.Path("cache2"))
    score = charlm.bits_per_character(trained, charlm.load_corpus(data, show_progress=False))
    print(score.bits_per_character.hex(), score.bits_per_byte.hex())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = [(score.bits_per_character.hex(), score.bits_per_byte.hex()) for score in expected.values()]
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == figures
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"**{expected['cut'].bits_per_character:.4f}** bits per character" in card
    for part in ("split test", f"corpus_sha256 {corpus.sha256}", "stride 8", "layers 1 to 1 of 2"):
        assert part in card
    capfd.readouterr()
    arguments = [f"--data.path={text}", f"--data.cache_dir={tmp_path / 'cache2'}", "--json"]
    assert run_script("evaluate", str(tmp_path / "cut"), *arguments) == 0
    assert json.loads(capfd.readouterr().out)["bits_per_character"] == expected["cut"].bits_per_character
    assert run_script("generate", str(tmp_path / "whole"), "--prompt=12é ", "--length=30") == 0
    assert capfd.readouterr().out == f"12é {generate(trained, '12é ', length=30)}\n"


@pytest.mark.parametrize(("within", "depth"), [(0.0, 2), (50.0, 1)])
def test_depth_auto_says_what_it_saw(run_on_disk, tmp_path, capfd, within, depth):
    """Guards against a depth chosen on the test split, and a choice that cannot be followed."""
    trained = load(run_on_disk, device="cpu")
    corpus = load_corpus(trained.config.data, show_progress=False)
    score = bits_per_character(trained, corpus, split="valid", limit=300, all_layers=True)
    assert score.layers["1"] > score.layers["2"]
    capfd.readouterr()
    arguments = [f"--to={tmp_path / 'out'}", "--depth=auto", f"--within={within}", "--limit=300"]
    assert run_script("export", str(run_on_disk), *arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("valid split, first 300 symbols")
    for layer in (1, 2):
        arrow = "  <- exported" if layer == depth else ""
        assert lines[layer] == f"  layer  {layer}: {score.layers[str(layer)]:.4f} bits per character{arrow}"
    found = load(tmp_path / "out", device="cpu")
    assert found.config.model.num_layers == depth
    assert found.scores[-1]["bits_per_character"] == score.layers[str(depth)]
    assert (found.scores[-1]["split"], found.scores[-1]["symbols"]) == ("valid", 300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth=3"], "depth=3: has no head; choose one of 1, 2"),
        (["--depth=0"], "depth=0: has no head; choose one of 1, 2"),
        (["--depth=half"], "depth=half"),
        (["--depth=auto", "--within=-1"], "within=-1.0: must be a number of bits, at least 0"),
        (["--depth=auto", "--within=nan"], "within=nan: should be"),
        (["--checkpoint=5"], "has no checkpoint '5'"),
        (["--to=."], "to=.: a folder, a pipe or a device is there"),
        (["--score=valid", "--stride=99"], "stride=99: must lie in"),
        ([], "--to"),
    ],
)
def test_bad_input(run_on_disk, tmp_path, capfd, monkeypatch, arguments, message):
    """Guards against tracebacks, half of a folder, and a folder that is written over."""
    monkeypatch.chdir(tmp_path)
    to = [] if not arguments or arguments[0].startswith("--to") else ["--to=out"]
    load_corpus(load(run_on_disk).config.data, show_progress=False)
    before = content(tmp_path)
    assert run_script("export", str(run_on_disk), *to, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert content(tmp_path) == before


def test_nothing_half_written_stays(build, tmp_path, monkeypatch):
    """Guards against a folder that looks whole, or rubbish, when the disk is full or the process was killed before."""
    left = left_of(tmp_path / "out")
    left.mkdir()
    (left / "rubbish").touch()
    with monkeypatch.context() as patch:
        patch.setattr(exported, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match=r"out cannot be written \(No space left\)"):
            save_model(build(), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    save_model(build(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = content(tmp_path)
    with pytest.raises(UserError, match="out exists already"):
        save_model(build(), tmp_path / "out")
    assert content(tmp_path) == before


def test_the_first_of_two_exports_at_once_wins(build, tmp_path, monkeypatch):
    """Guards against exports to one place that all fail, or leave a mixture, rubbish, or no word of the winner."""
    first, save_tensors = build(), exported.save_tensors

    def overtaken(*arguments) -> None:
        monkeypatch.setattr(exported, "save_tensors", save_tensors)
        save_model(first, tmp_path / "out")
        save_tensors(*arguments)

    monkeypatch.setattr(exported, "save_tensors", overtaken)
    with pytest.raises(UserError, match="out exists already"):
        save_model(build("tower"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load(tmp_path / "out", device="cpu").config.aux.layers.head == "linear"
