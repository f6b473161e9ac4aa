"""Runs that begin with the weights of a model (run.init_from), or branch off a held run (run.branch_from)."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import charlm
from charlm.ablation.variants import parse_row, plan
from charlm.config import LayersConfig
from charlm.files import sha256_of
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.report.metrics import read_runs
from charlm.report.page.probe import Probe
from charlm.report.page.tables import protocols
from charlm.runs.exported import save_model
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import load_tensors
from charlm.runs.trained import fitting, truncate
from charlm.training.origin import resolved
from fake_hub import fake_hub
from launched import train_with_two_processes
from tiny import TINY, assert_ended_like, checkpoint_bytes, checkpoint_folder, losses, refused, train, typed

STEPS = 12
SHORT = [*typed(f"--run.report=false --train.steps={STEPS} --train.batch_size=4 --train.mixed_precision=no")]
SHORT += typed("--train.valid_symbols=100 --train.valid_every=1 --train.log_every=1 --train.keep_checkpoints=100")
STILL = "--train.learning_rate=1e-30"
"""A rate at which no parameter changes by more than 1e-28."""
NEW_TEXT = "その猫は、静かに眠る。 naïve café œuvre\n" * 300
HELD = typed("--train.lr_schedule=wsd --train.warmup=2 --train.decay_steps=4 --model.residual_dropout=0.1")
HELD += typed("--aux.layers.schedule=constant")
"""Dropout depends on the step alone, and so must whatever a branch goes on with."""


def model_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    found, _ = load_tensors(checkpoint_folder(run, step) / "model.safetensors")
    return {name: found[name] for name in found if name.startswith(("transformer.", "heads."))}


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-25)


@pytest.fixture(scope="module")
def source(tmp_path_factory, text_corpus_flags) -> Path:
    """A run of three steps, with every checkpoint."""
    own = ["--train.valid_every=1", "--train.keep_checkpoints=9", "--train.learning_rate=0.1"]
    return train(*TINY, *own, *text_corpus_flags, f"--run.dir={tmp_path_factory.mktemp('source') / 'run'}")


@pytest.fixture(scope="module")
def held(tmp_path_factory, text_corpus_flags) -> Path:
    """A run whose rate is at its peak from step 2 to 36."""
    place = tmp_path_factory.mktemp("held") / "run"
    return train(*TINY, *SHORT, *HELD, *text_corpus_flags, "--train.steps=40", f"--run.dir={place}")


@pytest.fixture
def new_text(tmp_path) -> list[str]:
    """Flags for a text of characters that `source` has not seen."""
    (tmp_path / "new.txt").write_text(NEW_TEXT)
    return ["--data.corpus=file", f"--data.path={tmp_path / 'new.txt'}", f"--data.cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize(("name", "step"), [("", 3), ("@best", 3), ("@last", 3), ("@2", 2), ("exported", 3)])
def test_a_run_begins_with_the_weights(name, step, source, tmp_path, text_corpus_flags):
    """Guards against another checkpoint, fresh weights, options of the model that are not the source's, and a record,
    page or card that does not say where the weights come from."""
    place, file = f"{source}{name}", checkpoint_folder(source, step) / "model.safetensors"
    if name == "exported":
        place = save_model(load(source), tmp_path / "exported")
        file = place / "model.safetensors"
    run = train(*SHORT, *text_corpus_flags, STILL, f"--run.init_from={place}", f"--run.dir={tmp_path / 'run'}")
    assert_close(model_of(run, STEPS), model_of(source, step))
    assert Run.open(run).config().model == Run.open(source).config().model
    record = Run.open(run).provenance()["started_from"]
    assert record["SHA-256"] == sha256_of(file) and record["checkpoint"] == f"step-{step:08d}"
    assert record["name"] == Path(place).name
    page = protocols(read_runs([run])[0], Probe.without(""))["Origin"]["began with"]
    again = save_model(load(run), tmp_path / "again")
    assert load(again).started_from == record
    for text in (page, (again / "README.md").read_text()):
        assert record["SHA-256"] in text and record["name"] in text
    assert str(source.parent) not in (again / "README.md").read_text() + (again / "config.json").read_text()


FROM_HUB = """
import charlm, sys
print(charlm.train(charlm.load_config(overrides=sys.argv[1:])))
"""


@pytest.mark.slow
def test_a_run_begins_with_a_model_of_the_hub(source, tmp_path, text_corpus_flags):
    """Guards against a name on the hub that is taken for a path, or a revision for a checkpoint."""
    exported = save_model(load(source), tmp_path / "exported")
    with fake_hub(tmp_path) as hub:
        hub.files["owner/model"] = {path.name: path.read_bytes() for path in exported.iterdir()}
        place = tmp_path / "run"
        flags = [*SHORT, *text_corpus_flags, STILL, "--run.init_from=owner/model@main", f"--run.dir={place}"]
        done = hub.run(FROM_HUB, *flags)
    assert done.returncode == 0, done.stderr
    assert_close(model_of(place, STEPS), model_of(source, 3))
    assert Run.open(place).provenance()["started_from"]["name"] == "owner/model@main"
    assert Run.open(place).config().run.init_from == "owner/model@main"


def origin_flags(kind: str, place: Path, corpus: list[str]) -> list[str]:
    """Flags of a run that begins with a model, or branches off at step 8; both have 12 steps."""
    if kind == "branch":
        return [f"--run.branch_from={place}", "--run.branch_step=8", "--run.report=false"]
    return [
        *SHORT,
        *corpus,
        f"--run.init_from={place}",
        "--model.residual_dropout=0.1",
        *typed("--model.ngrams=[2] --model.ngram_buckets=64"),
    ]


@pytest.mark.parametrize("kind", ["model", "branch"])
def test_resuming_at_any_step_ends_in_the_same_bytes(kind, source, held, tmp_path, text_corpus_flags):
    """Guards against a resumed run that begins again with its origin, needs it once more, or loses its options; and
    against one that was stopped before its first checkpoint and starts from fresh weights."""
    place = shutil.copytree(held if kind == "branch" else source, tmp_path / "origin")
    flags = origin_flags(kind, place, text_corpus_flags)
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    first = 9 if kind == "branch" else 1
    begun = shutil.copytree(whole, tmp_path / "begun", ignore=shutil.ignore_patterns("step-*", "best", "last"))
    train(*flags, f"--run.dir={begun}", "--run.resume=true")
    assert_ended_like(begun, whole)
    shutil.rmtree(place)
    for step in random.Random(kind).sample(range(first, STEPS), 2):
        resumed = shutil.copytree(whole, tmp_path / f"from-{step}")
        again = flags if step % 2 else ["--run.report=false"]
        train(*again, f"--run.dir={resumed}", f"--run.resume_from={step}")
        assert_ended_like(resumed, whole)
        assert Run.open(resumed).config().run.replace(dir=whole) == Run.open(whole).config().run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "branch"])
def test_two_processes_resume_to_the_same_bytes(kind, source, held, tmp_path, text_corpus_flags):
    """Guards against processes that begin with different weights, and shards that are filled wrongly."""
    flags = origin_flags(kind, held if kind == "branch" else source, text_corpus_flags)
    whole, resumed, sharded = (tmp_path / name for name in ("whole", "resumed", "sharded"))
    runs = [[*flags, f"--run.dir={place}"] for place in (whole, resumed)]
    runs += [[*runs[1], "--run.resume_from=10"]]
    if kind == "model":  # n-gram tables are not sharded, and dropout depends on the process
        flags = [*flags, "--model.ngrams=[]", "--model.residual_dropout=0"]
        plain = train(*flags, f"--run.dir={tmp_path / 'plain'}")
        runs += [[*flags, "--train.sharding=fsdp2", f"--run.dir={sharded}"]]
    train_with_two_processes(tmp_path / "plan.json", runs)
    assert_ended_like(resumed, whole)
    if kind == "model":
        assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)


BRANCHES = {
    "from the hold": (8, ["--train.decay_steps=4"], 12),
    "longer than the run's own decay": (8, ["--train.decay_steps=7"], 15),
    "a share of the branch": (9, ["--train.decay_steps=0.25"], 12),
    "held on, then decayed": (8, ["--train.decay_steps=2", "--train.steps=12"], 12),
    "in a line": (10, ["--train.decay_steps=2", "--train.decay_type=linear", "--train.final_lr=0.1"], 12),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_the_run_that_was_planned_so_short(name, held, tmp_path, text_corpus_flags):
    """Guards against optimizer state, windows, dropout or a schedule that are not those of the held run: a branch ends
    in the same bytes as a run that was begun with this length and decay. Its steps by hand: 9 / (1 - 0.25) = 12."""
    step, own, steps = BRANCHES[name]
    branch = train("--run.report=false", f"--run.branch_from={held}", f"--run.branch_step={step}", *own,
                   f"--run.dir={tmp_path / 'branch'}")  # fmt: skip
    assert Run.open(branch).config().train.steps == steps
    planned = [*TINY, *SHORT, *HELD, *text_corpus_flags, *own, f"--train.steps={steps}"]
    whole = train(*planned, f"--run.dir={tmp_path / 'whole'}")
    assert checkpoint_bytes(branch, steps) == checkpoint_bytes(whole, steps)
    state = json.loads((checkpoint_folder(branch, steps) / "state.json").read_text())
    assert state["best_step"] >= step


def test_a_branch_of_a_run_that_was_planned_anew(held, tmp_path):
    """Guards against a branch that keeps changes of the held run's plan, which lie beyond its own end."""
    other = shutil.copytree(held, tmp_path / "held")
    own = Run(other).config()
    train_options = own.train.replace(steps=40, steps_before=((12, own.train.steps),))
    Run(other).write_config(own.replace(train=train_options))
    flags = ["--run.branch_step=8", "--run.report=false", "--train.decay_steps=4"]
    branches = [
        train(f"--run.branch_from={at}", *flags, f"--run.dir={tmp_path / at.parent.name}") for at in (held, other)
    ]
    assert Run.open(branches[1]).config().train.steps_before == ()
    assert checkpoint_bytes(branches[0], 12) == checkpoint_bytes(branches[1], 12)


def test_text_of_new_characters_is_learned_compressed_and_written(source, new_text, tmp_path):
    """Guards against a vocabulary that was cut to the first text's bytes."""
    flags = [*SHORT, *new_text, "--train.steps=60", "--train.learning_rate=0.02", "--train.valid_every=0.5"]
    run = train(*flags, f"--run.init_from={source}", f"--run.dir={tmp_path / 'run'}")
    trained, before = load(run, device="cpu"), load(source, device="cpu")
    corpus = charlm.load_corpus(trained.config.data)
    there = replace(before, corpus=trained.corpus)
    scores = [charlm.bits_per_character(one, corpus, split="test").bits_per_byte for one in (trained, there)]
    assert scores[0] < scores[1] - 1
    text, packed, back = (tmp_path / name for name in ("text", "packed", "back"))
    text.write_text(NEW_TEXT[:200])
    charlm.compress(trained, text, packed)
    charlm.decompress(trained, packed, back)
    assert back.read_bytes() == text.read_bytes()
    assert max(charlm.generate(trained, "猫", length=20)) > "\x7f"


@pytest.mark.parametrize("vocabulary", ["characters", "sentencepiece"])
def test_the_vocabulary_travels(vocabulary, tmp_path):
    """Guards against ids that stand for other characters in the new text than in the old."""
    (tmp_path / "old.txt").write_text("zebra quartz jumps\n" * 300)
    (tmp_path / "new.txt").write_text("a quartz zebra\n" * 300)
    places = [f"--data.cache_dir={tmp_path / 'cache'}", "--data.corpus=file"]
    old = [*places, f"--data.path={tmp_path / 'old.txt'}", f"--data.vocabulary={vocabulary}"]
    first = train(*TINY, *old, f"--run.dir={tmp_path / 'first'}")
    new = [*SHORT, *places, f"--data.path={tmp_path / 'new.txt'}", f"--run.init_from={first}"]
    run = train(*new, STILL, f"--run.dir={tmp_path / 'run'}")
    trained, before = load(run, device="cpu"), load(first, device="cpu")
    assert trained.vocabulary == before.vocabulary
    assert_close(model_of(run, STEPS), model_of(first, 3))
    charlm.bits_per_character(trained, charlm.load_corpus(trained.config.data), split="valid")
    if vocabulary == "characters":
        (tmp_path / "new.txt").write_text("über quartz, ärgerlich\n" * 300)
        with refused("data.path", "ä.*ü.*run.init_from"):
            train(*new, f"--run.dir={tmp_path / 'another'}")
        with refused("data.vocabulary"):
            train(*new, "--data.vocabulary=bytes", f"--run.dir={tmp_path / 'another'}")


REFUSED = {
    "model.d_model": ["--model.d_model=32"],
    "model.norm": ["--model.norm=post"],
    "model.position_encoding": ["--model.position_encoding=rotary"],
    "model.context_length": ["--model.context_length=17"],
    "data.vocabulary": ["--data.vocabulary=characters"],
    "run.init_from": ["--run.init_from=nowhere"],
    "run.branch_step": ["--run.branch_step=3"],
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_does_not_fit_the_model_is_refused(option, source, tmp_path, text_corpus_flags):
    """Guards against weights that are silently left out, and a folder that a refused run leaves."""
    flags = [*SHORT, *text_corpus_flags, f"--run.init_from={source}", f"--run.dir={tmp_path / 'run'}"]
    with refused(option):
        train(*flags, *REFUSED[option])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "flags", "option"),
    [
        (1, [], "run.branch_step"),
        (38, ["--train.decay_steps=9"], "run.branch_step"),
        (99, [], "run.branch_step"),
        (8, ["--train.steps=10"], "train.decay_steps"),
        (8, ["--train.decay_steps=0"], "train.decay_steps"),
        (8, ["--train.lr_schedule=cosine"], "train.lr_schedule"),
        (8, ["--train.time=1m"], "train.time"),
        (8, ["--train.learning_rate=0.5"], "train.learning_rate"),
        (8, ["--run.init_from=somewhere"], "run.init_from"),
    ],
)
def test_what_is_no_branch_is_refused(step, flags, option, held, tmp_path):
    """Guards against a branch off the warm-up or a decay, and one that goes on as another experiment."""
    with refused(option):
        train(f"--run.branch_from={held}", f"--run.branch_step={step}", f"--run.dir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run").exists()


def test_corpora_and_tables_are_prepared_for_the_model(tmp_path, script):
    """Guards against ids of another vocabulary than the model's in the cache, and rows with another model."""
    (tmp_path / "old.txt").write_text("zebra quartz jumps\n" * 300)
    (tmp_path / "new.txt").write_text("a quartz zebra\n" * 300)
    places = ["--data.corpus=file", f"--data.cache_dir={tmp_path / 'cache'}"]
    old = [*places, f"--data.path={tmp_path / 'old.txt'}", "--data.vocabulary=characters"]
    first = train(*TINY, *old, f"--run.dir={tmp_path / 'first'}")
    new = [*places, f"--data.path={tmp_path / 'new.txt'}", f"--run.init_from={first}"]
    code, out, _ = script("prepare", *new)
    assert code == 0 and f"vocabulary characters of {len(set('zebra quartz jumps') | {chr(10)})}" in out
    flags = dict(flag.removeprefix("--").split("=") for flag in new)
    rows = plan([parse_row("deeper: --model.num_layers=3"), parse_row("same: ")], [], flags, 1)
    models = [(row.config.model.num_layers, row.config.model.d_model, row.config.data.vocabulary) for row in rows]
    assert models == [(3, 16, "characters"), (2, 16, "characters")]
    with refused("model.d_model"):
        plan([parse_row("--model.d_model=32")], [], flags, 1)


def test_a_run_keeps_to_its_origin(source, held, tmp_path, text_corpus_flags):
    """Guards against a resumed run that is recorded with another origin than it had."""
    flags = [*SHORT, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.steps=2"]
    run = train(*flags, f"--run.init_from={source}")
    for given in (f"--run.init_from={source}@2", f"--run.branch_from={held} --run.branch_step=8"):
        with refused(given.partition("=")[0].removeprefix("--")):
            train(*flags, *typed(given), "--run.resume=true")
    shutil.rmtree(run / "checkpoints")
    record = json.loads((run / "provenance.json").read_text())
    record["started_from"]["SHA-256"] = "0"
    (run / "provenance.json").write_text(json.dumps(record))
    with refused("run.dir"):
        train(*flags, "--run.resume=true")


def test_options_that_were_given_win(source, tmp_path):
    """Guards against a default that counts as given, and given options that are lost."""
    flags = [f"--run.init_from={source}", f"--run.dir={tmp_path / 'run'}"]
    given = typed("--model.num_layers=4 --model.context_length=8 --aux.layers.at=[1/2] --train.seed=3")
    once = resolved(charlm.load_config(overrides=[*flags, *given]), continues=False)
    assert (once.model.d_model, once.model.num_layers, once.model.context_length) == (16, 4, 8)
    assert once.train.seed == 3 and once.aux == charlm.load_config(overrides=given).aux
    assert resolved(once, continues=False) == once
    assert resolved(charlm.load_config(overrides=given), continues=False) == charlm.load_config(overrides=given)


def logits_of(modules: tuple[CharTransformer, Heads], length: int) -> torch.Tensor:
    transformer, heads = modules
    layer = transformer.config.num_layers
    ids = torch.arange(length).view(1, -1)
    with torch.no_grad():
        return heads(transformer(ids)[layer], layer)[..., 0, :]


def grown(trained, pairs=None, layers=None, **options) -> tuple[CharTransformer, Heads]:
    """A fresh model of other options, with all parameters of `trained` that fit."""
    torch.manual_seed(1)
    config = trained.config.model.replace(**options)
    transformer = CharTransformer(config, 256)
    pairs = pairs or [(layer, 1) for layer in range(1, config.num_layers + 1)]
    heads = Heads(config, 256, pairs, layers=layers, final_norm=transformer.final_norm)
    both = torch.nn.ModuleDict({"transformer": transformer, "heads": heads}).eval()
    both.load_state_dict(fitting(trained, transformer, heads), strict=False)
    return transformer, heads


SAME = {
    "the same": ({}, {}),
    "idle layers": ({"position_encoding": "rotary"}, {"num_layers": 4, "residual_init": "zero"}),
    "a shorter context": ({}, {"context_length": 5}),
    "a longer one with rotary positions": ({"position_encoding": "rotary"}, {"context_length": 20}),
    "new n-gram tables": ({}, {"ngrams": (2, 4), "ngram_buckets": 50, "ngram_width": 4}),
    "a table between others": ({"ngrams": (2, 5), "ngram_buckets": 50, "ngram_width": 4}, {"ngrams": (2, 3, 5)}),
}


@pytest.mark.parametrize("name", SAME)
def test_a_changed_model_computes_what_it_did(name, build_model):
    """Guards against parameters that are left out, put in another's place, or additions that have an effect."""
    before, after = SAME[name]
    trained = build_model(**before)
    expected = logits_of((trained.transformer, trained.heads), 5)
    torch.testing.assert_close(logits_of(grown(trained, **after), 5), expected, rtol=1e-5, atol=1e-5)


def test_fewer_layers_are_the_exit(build_model):
    """Guards against the last layer's norm and head on the states of a lower layer."""
    trained = build_model(num_layers=3, pairs=[(1, 1), (3, 1)])
    exit_ = truncate(trained, 1)
    torch.testing.assert_close(
        logits_of(grown(trained, num_layers=1), 5), logits_of((exit_.transformer, exit_.heads), 5)
    )
    transformer, heads = grown(trained, num_layers=2)  # which has no head: a new one begins at zero
    assert not logits_of((transformer, heads), 5).any()
    assert torch.equal(transformer.final_norm.weight, torch.ones(8))
    own = trained.transformer.blocks[1].attention.out.weight
    assert torch.equal(transformer.blocks[1].attention.out.weight, own)


def test_new_heads_begin_at_zero(build_model):
    """Guards against a classifier of another kind, offset or layer on top of states that it does not know."""
    trained = build_model(pairs=[(1, 1), (2, 1)])
    _, heads = grown(trained, pairs=[(1, 1), (1, 2), (2, 1), (2, 2)])
    assert torch.equal(heads.exits["layer1"]["offset1"].weight, trained.heads.exits["layer1"]["offset1"].weight)
    assert not heads.exits["layer1"]["offset2"].weight.any() and not heads.exits["layer2"]["offset2"].weight.any()
    _, towers = grown(trained, layers=LayersConfig(head="tower"))
    assert not towers.exits["layer1"]["offset1"].weight.any() and towers.exits["layer2"]["offset1"].weight.any()
    _, longer = grown(trained, num_layers=3)
    assert torch.equal(longer.exits["layer3"]["offset1"].weight, trained.heads.exits["layer2"]["offset1"].weight)
    assert not longer.exits["layer2"]["offset1"].weight.any()


def test_the_config_of_fine_tuning(source, tmp_path, script):
    """Guards against an explanation of another model than the one that would be trained."""
    arguments = ["--config", "configs/finetune.yaml", f"--run.init_from={source}", f"--run.dir={source}"]
    code, out, err = script("explain", *arguments)
    assert (code, err) == (0, "") and "2 layers of width 16, context 16" in out
