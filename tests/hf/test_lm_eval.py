"""charlm's models in the lm-evaluation-harness, on tasks made of local files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="not installed, see requirements-hf.txt")

import charlm
from charlm.formats import save_model
from charlm.formats.lm_eval import CharlmLM
from charlm.runs.trained import truncate
from exporting import logits, vocabulary_of
from launched import ON_CPU
from tiny import refused, table_cells

ROOT = Path(__file__).resolve().parents[2]
T = 8


def asked(*given) -> SimpleNamespace:
    """A request of the harness."""
    return SimpleNamespace(args=given)


@pytest.fixture
def harness_model(build_model, tmp_path):
    """`harness_model(vocabulary, **arguments)`: a random model of context T as charlm has it, and in the harness."""

    def make(vocabulary: str = "bytes", **arguments):
        symbols = vocabulary_of(vocabulary)
        trained = build_model(context_length=T, vocabulary_size=symbols.size)
        folder = save_model(replace(trained, vocabulary=symbols), tmp_path / "model", "charlm")
        return charlm.load(folder, device="cpu"), CharlmLM(folder, device="cpu", **arguments)

    return make


def nats_of(trained, text: str, scored: int, first: int = 0) -> tuple[float, bool]:
    """The negative nats of the last `scored` symbols, each after the T before it, but none before `first`; and whether
    each is the likeliest. The first of all has equal probabilities."""
    ids, total, greedy = trained.vocabulary.encode(text.encode()).tolist(), 0.0, True
    for place in range(len(ids) - scored, len(ids)):
        before = ids[max(first, place - T) : place]
        scores = logits(trained, torch.tensor([before]))[0, -1] if before else torch.zeros(trained.vocabulary.size)
        total += float(scores.double().log_softmax(-1)[ids[place]])
        greedy = greedy and int(scores.argmax()) == ids[place]
    return total, greedy


PAIRS = {
    "both fit": ("The ", "end", 0),
    "a space ends the context, another begins": ("The ", " end", 0),
    "no context": ("", "The end", 0),
    "the context is cut": ("The end. The end. The ", "bead", 17),
    "the continuation fills it": ("The end. ", "The bead", 8),
    "longer than the context": ("The end", " a beach bead.", 6),
    "nothing": ("The", "", 0),
}
"""Context, continuation, and the first symbol that is read."""


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_loglikelihood(vocabulary, harness_model):
    """Guards against symbols of the context that are counted, spaces that change sides, a beginning that is kept in
    place of the end, and windows that score a symbol twice."""
    trained, model = harness_model(vocabulary, stride=1)
    found = model.loglikelihood([asked(*pair[:2]) for pair in PAIRS.values()])
    for (context, continuation, first), (nats, greedy) in zip(PAIRS.values(), found, strict=True):
        expected = nats_of(trained, context + continuation, len(continuation), first)
        assert (nats, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    if vocabulary == "characters":  # random bytes are no text
        text = charlm.generate(trained, "The ", length=4, temperature=0)
        ends = text, text[:3] + "en"[text[3] == "e"], text[:2] + "en"[text[2] == "e"] + text[3]
        found = model.loglikelihood([asked("The ", end) for end in ends])
        assert [greedy for _, greedy in found] == [True, False, False]


KEPT = {"bytes": " deeped", "characters": "é deeped", "sentencepiece": " deeped"}
"""The end of `CONTEXT` that fits into the context, without a part of a character."""
CONTEXT = "Äé deeped"
COLD = {"temperature": 0.5, "top_k": 9, "top_p": 0.7}


@pytest.mark.parametrize("vocabulary", KEPT)
def test_generate_until(vocabulary, harness_model):
    """Guards against a stop that stays in the text, a later one that is taken for the first, a beginning of the context
    that is kept in place of its end, and samples that are all alike or others than charlm's."""
    trained, model = harness_model(vocabulary, seed=3)

    def ours(length: int, **how) -> str:
        return charlm.generate(trained, KEPT[vocabulary], length=length, **how)

    text = ours(12, temperature=0)
    stops = [text[9], "", text[4:6]]
    sampled = {"do_sample": True, "max_new_tokens": 9}
    cases = [
        ({"max_gen_toks": 12}, text),
        ({"max_gen_toks": 12, "until": stops}, text[: min(text.index(stop) for stop in stops if stop)]),
        ({"max_gen_toks": 5, "do_sample": False, "temperature": 2.0}, ours(5, temperature=0)),
        (sampled, ours(9, seed=6)),
        (
            sampled | {"temperature": 0.5, "top_k": 9, "top_p": 0.7},
            ours(9, temperature=0.5, top_k=9, top_p=0.7, seed=7),
        ),
    ]
    assert model.generate_until([asked(CONTEXT, how) for how, _ in cases]) == [text for _, text in cases]


def test_what_is_refused(harness_model):
    """Guards against options that do nothing, and characters that count for nothing."""
    _, model = harness_model("characters")
    with refused("num_beams"):
        model.generate_until([asked("The", {"num_beams": 4})])
    with refused(None, "U\\+0058"):
        model.loglikelihood_rolling([asked("The X")])
    with refused("stride"):
        CharlmLM(model.trained.file.parent, stride=T + 1, device="cpu").loglikelihood([asked("The", "end")])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list: [{{metric: {metric}}}]
"""
UNTIL = "generation_kwargs: {{until: [{stop}], max_gen_toks: 6}}"
PROMPTS = ("1é 2é", "77é", "é 600é 6")


@pytest.mark.slow
def test_the_command_line(run_on_disk, tmp_path, script):
    """Guards against a model that the harness does not find, bits per byte that are not those of scripts/evaluate.py,
    and answers that come to the wrong questions."""
    deep = charlm.load(run_on_disk, device="cpu")
    shallow = save_model(truncate(deep, 1), tmp_path / "shallow", "charlm")
    corpus = charlm.load_corpus(deep.config.data)
    answers = charlm.generate(deep, PROMPTS, length=6, temperature=0)
    stop = answers[0][3]
    documents = {
        "text": [{"text": corpus.vocabulary.decode(corpus.splits["test"].ids).decode()}],
        "write": [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)],
        "stop": [{"prompt": PROMPTS[0], "answer": answers[0].partition(stop)[0]}],
    }
    own = {"kind": "generate_until", "text": "{{prompt}}", "target": "{{answer}}", "metric": "exact_match"}
    fields = {"text": {"kind": "loglikelihood_rolling", "text": "", "target": "{{text}}", "metric": "bits_per_byte"}}
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, rows in documents.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TASK.format(name=name, file=file, **fields.get(name, own))
        task += {"write": UNTIL.format(stop=""), "stop": UNTIL.format(stop=json.dumps(stop))}.get(name, "")
        (tasks / f"{name}.yaml").write_text(task)
    right = []
    for run in (run_on_disk, shallow):
        how = {"--model": "charlm", "--model_args": f"run={run}", "--tasks": ",".join(documents)}
        words = [*chain(*how.items()), "--include_path", str(tasks)]
        done = subprocess.run(
            [sys.executable, "-m", "charlm", "lm-eval", *words],
            capture_output=True, text=True, timeout=600, cwd=tmp_path,
            env=os.environ | ON_CPU | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        table = {row[0]: float(row[6]) for row in table_cells(done.stdout) if row[0] in documents}
        _, printed, _ = script("evaluate", run, "--json", f"--data.path={tmp_path / 'text.txt'}")
        ours = charlm.generate(charlm.load(run, device="cpu"), PROMPTS, length=6, temperature=0)
        right.append(sum(map(str.__eq__, ours, answers)) / len(answers))
        assert table == {
            "text": pytest.approx(json.loads(printed)["bits_per_byte"], abs=1e-4),
            "write": pytest.approx(right[-1], abs=1e-4),
            "stop": float(ours[0].partition(stop)[0] == answers[0].partition(stop)[0]),
        }
    assert right[0] == 1.0 > right[1]
