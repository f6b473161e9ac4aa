"""Diagnostics against brute force, and training that is the same with and without them.

Shapes: B batch, T positions, D d_model, V vocabulary, N symbols.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn

from charlm.config import AuxConfig, Config, HedgeConfig, LayersConfig, TrainConfig
from charlm.inference.evaluation import bits_per, negative_log_likelihoods
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.runs.folder import Run
from charlm.training.diagnose import bits_per_head, diagnose, gradient_figures, spread_windows
from launched import train_with_two_processes
from tiny import TINY, checkpoint_bytes, history, small_model, train, typed

V = 7
LASTING = LayersConfig(schedule="constant")
FLAGS = [
    *TINY,
    *typed("--model.num_layers=3 --train.steps=8 --train.log_every=1 --train.valid_every=4 --train.valid_symbols=500"),
    *typed("--aux.layers.schedule=constant --model.activation_dropout=0.2 --model.residual_dropout=0.1"),
]
LAYERS = ["layer1", "layer2", "layer3"]
HEADS = [f"{layer}/offset{offset}" for layer in LAYERS for offset in (1, 2)]
KINDS = ["bits_per_character", "supervision_ratio", "main_supervision_ratio", "gradient_cosine", "gradient_norm"]


def trained_objective(aux: AuxConfig | None = None, **model) -> Objective:
    """An objective of three layers, with random heads in place of the zeros that they begin with."""
    torch.manual_seed(0)
    config = Config(model=small_model(**({"num_layers": 3} | model)), aux=aux or AuxConfig())
    objective = build_objective(config, V)
    for parameter in objective.heads.parameters():
        nn.init.normal_(parameter)
    return objective


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, count).astype(np.uint8)


@pytest.mark.parametrize("num_symbols", [6, 9, 51])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bits_of_every_head_by_brute_force(norm, num_symbols):
    """Guards against shifted targets, symbols scored twice or not at all, mixed-up heads, and different denominators.
    Here each symbol is predicted by itself, with the context that validation gives it."""
    objective, ids = trained_objective(norm=norm).eval(), random_ids(num_symbols)
    expected = {pair: [math.log2(V)] * pair[1] for pair in objective.heads.pairs}
    assert len(expected) == 6
    with torch.no_grad():
        for source in range(num_symbols - 1):
            # Windows of 8 start at 0, 4, 8, ... and each but the first scores its last 4; the last ends with the text.
            start = max(0, min(4 * math.ceil((source - 7) / 4), num_symbols - 1 - 8))
            states = objective.transformer(torch.from_numpy(ids[None, start : source + 1].astype(int)), [1, 2, 3])
            for layer, offset in expected:
                if source + offset < num_symbols:
                    logits_V = objective.heads(states[layer][:, -1:], layer, (offset,))[0, 0, 0].double()
                    bits = -logits_V.log_softmax(-1)[int(ids[source + offset])] / math.log(2)
                    expected[layer, offset].append(float(bits))
    assert all(len(bits) == num_symbols for bits in expected.values())
    found = bits_per_head(objective, ids, 5)
    assert found == {
        f"layer{pair[0]}/offset{pair[1]}": approx(sum(bits) / 5, rel=1e-5) for pair, bits in expected.items()
    }
    nats = negative_log_likelihoods(objective.transformer, objective.heads, ids, stride=4)[3]
    assert found["layer3/offset1"] == approx(bits_per(nats, 5), rel=1e-6)


@pytest.mark.parametrize("cross_entropy", ["chunked", "reference"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_by_separate_backward_passes(norm, cross_entropy):
    """Guards against gradients of the wrong output or layer, wrongly weighted micro-batches, silent rows that count,
    and a main gradient inside the auxiliary one."""
    objective = trained_objective(norm=norm)
    objective.cross_entropy = cross_entropy
    windows_BW = torch.from_numpy(spread_windows(random_ids(60), 5, objective.window_length))
    # Layer 1 of 3 fell silent at 1/6.
    found = gradient_figures(objective, windows_BW, 0.2, micro_batch_size=2)

    states = {}
    for layer, block in enumerate(objective.transformer.blocks, start=1):
        block.register_forward_hook(lambda _, inputs, output, layer=layer: states.update({layer: output}))
    norms_of_states, of_parameters = {}, {}
    for output in (2, 3):
        objective.zero_grad()
        hidden_BTD = objective.transformer(windows_BW[:, :8], [output])[output]
        for state in states.values():
            state.retain_grad()
        logits_BTKV = objective.heads(hidden_BTD, output, (1, 2))
        losses = [F.cross_entropy(logits_BTKV[:, :, k - 1].mT, windows_BW[:, k : 8 + k]) for k in (1, 2)]
        (losses[0] + 0.5 * losses[1]).backward()
        for layer in range(1, output + 1):
            norms_of_states[output, layer] = states[layer].grad.norm()
            own = [p.grad.flatten() for p in objective.transformer.blocks[layer - 1].parameters()]
            of_parameters[output, layer] = torch.cat(own).clone()
    main = {layer: float(norms_of_states[3, 3] / norms_of_states[3, layer]) for layer in (1, 2, 3)}
    auxiliary = {layer: float(norms_of_states[2, 2] / norms_of_states[2, layer]) for layer in (1, 2)}
    expected = {
        "main_supervision_ratio": main,
        "supervision_ratio": {1: (main[1] + auxiliary[1]) / 2, 2: (main[2] + 1.0) / 2, 3: 1.0},
        "gradient_cosine": {
            layer: F.cosine_similarity(of_parameters[2, layer], of_parameters[3, layer], dim=0) for layer in (1, 2)
        },
        "gradient_norm": {
            layer: (of_parameters[3, layer] + of_parameters.get((2, layer), 0.0)).norm() for layer in main
        },
    }
    assert found == {
        name: {f"layer{layer}": approx(float(value), rel=1e-4) for layer, value in values.items()}
        for name, values in expected.items()
    }
    assert main[1] != approx(1.0, rel=0.01) and expected["gradient_cosine"][1] != approx(1.0, rel=0.01)


def test_ratio_and_cosine_of_a_stack_by_hand():
    """Guards against an inverted ratio. Layers that only scale their input make every gradient known."""
    objective = trained_objective(AuxConfig(layers=LASTING), norm="post")

    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x_BTD, *_):
            return self.factor * x_BTD

    objective.transformer.blocks = nn.ModuleList([Scale(1.0), Scale(2.0), Scale(5.0)])
    windows_BW = torch.from_numpy(spread_windows(random_ids(60), 4, objective.window_length))
    found = gradient_figures(objective, windows_BW, 0.0)
    # |d loss_3 / d x_1| is 10 |d loss_3 / d x_3|, and |d loss_2 / d x_1| is 2 |d loss_2 / d x_2|.
    assert found["main_supervision_ratio"] == approx({"layer1": 1 / 10, "layer2": 1 / 5, "layer3": 1.0})
    assert found["supervision_ratio"] == approx(
        {"layer1": (1 + 1 / 2 + 1 / 10) / 3, "layer2": (1 + 1 / 5) / 2, "layer3": 1.0}
    )
    # One number each: it agrees or it does not.
    assert {key: abs(value) for key, value in found["gradient_cosine"].items()} == approx(
        {"layer1": 1.0, "layer2": 1.0}
    )


@pytest.mark.parametrize(
    "aux", [AuxConfig(layers=LayersConfig(enabled=False)), AuxConfig(layers=LASTING, main_weight=0.0)]
)
def test_figures_of_one_output(aux):
    """Guards against a cosine without a second gradient, and figures of layers that no loss reaches."""
    objective = trained_objective(aux)
    windows_BW = torch.from_numpy(spread_windows(random_ids(60), 4, objective.window_length))
    found = gradient_figures(objective, windows_BW, 0.0)
    layers = LAYERS[:2] if aux.main_weight == 0 else LAYERS
    assert found["gradient_cosine"] == {}
    assert list(found["gradient_norm"]) == list(found["supervision_ratio"]) == layers
    assert found["main_supervision_ratio"] == ({} if aux.main_weight == 0 else found["supervision_ratio"])


def test_leaves_no_trace():
    """Guards against gradients left in `.grad`, changed modes of dropout, consumed random numbers, and NaN in
    metrics.jsonl."""
    objective = trained_objective(activation_dropout=0.5, attention_dropout=0.5)
    objective.transformer.activation_checkpointing = True
    for parameter in objective.heads.parameters():
        nn.init.zeros_(parameter)  # no gradient gets past the heads: no ratio, no cosine
    modes = [module.training for module in objective.modules()]
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    marked = objective.transformer.embedding.weight.grad = torch.ones(V, 8)
    random = torch.get_rng_state()
    vocabulary = SimpleNamespace(count_characters=len, decode=lambda ids: bytes(len(ids)))
    corpus = SimpleNamespace(texts=lambda split, symbols: [random_ids(100)[:symbols]], vocabulary=vocabulary)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", scaler=None, num_processes=1)
    config = Config(train=TrainConfig(batch_size=3))
    found = diagnose(config, corpus, objective, accelerator, 0.0)
    assert found == diagnose(config, corpus, objective, accelerator, 0.0)
    assert found == {
        "symbols": 100,
        "bits_per_character": dict.fromkeys(HEADS, approx(math.log2(V))),
        "windows": 16,
        "supervision_ratio": {},
        "main_supervision_ratio": {},
        "gradient_cosine": {},
        "gradient_norm": dict.fromkeys(LAYERS, 0.0),
    }
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in objective.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    assert {name for name, p in objective.named_parameters() if p.grad is not None} == {"transformer.embedding.weight"}
    assert objective.transformer.embedding.weight.grad is marked and torch.equal(marked, torch.ones(V, 8))


@pytest.mark.parametrize("head", ["shared", "shared_frozen", "tower"])
def test_heads_of_every_kind(head):
    """Guards against using the wrong classifier, and failing on one without a gradient."""
    layers = LayersConfig(schedule="constant", head=head, hinge=0.1)
    objective = trained_objective(AuxConfig(layers=layers, hedge=HedgeConfig(enabled=True)), num_layers=2).eval()
    ids = random_ids(9)
    bits = bits_per_head(objective, ids, 9)
    states = objective.transformer(torch.from_numpy(ids[None, :8].astype(int)), [1])[1]
    loss = F.cross_entropy(objective.heads(states, 1, (1,))[0, :, 0], torch.from_numpy(ids[1:].astype(int)))
    assert bits["layer1/offset1"] == approx((8 * loss.item() / math.log(2) + math.log2(V)) / 9, rel=1e-5)
    figures = gradient_figures(objective, torch.from_numpy(spread_windows(random_ids(60), 4, 10)), 0.0)
    assert {name: list(values) for name, values in figures.items()} == {
        "supervision_ratio": LAYERS[:2],
        "main_supervision_ratio": LAYERS[:2],
        "gradient_cosine": LAYERS[:1],
        "gradient_norm": LAYERS[:2],
    }


def test_windows_lie_evenly():
    """Guards against windows that reach beyond the end of the text, or all come from its beginning."""
    assert spread_windows(np.arange(11), 3, 5).tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]
    assert spread_windows(np.arange(5), 2, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def record(folder: Path, *flags: str) -> Run:
    return Run(train(*FLAGS, *flags, f"--run.dir={folder}"))


def diagnosed(run: Run) -> dict[int, dict]:
    return {row["step"]: row["diagnostics"] for row in run.metrics() if "diagnostics" in row}


def assert_same_training(one: Run, other: Run) -> None:
    first, second = ([row for row in history(run.path) if "diagnostics" not in row] for run in (one, other))
    assert first == second
    assert checkpoint_bytes(one.path, 8) == checkpoint_bytes(other.path, 8)


def test_training_is_the_same_with_and_without(tmp_path, text_corpus_flags, monkeypatch):
    """Guards against diagnostics that change training, and rows or trackers that lack them."""
    flags = [*text_corpus_flags, "--train.micro_batch_size=3", "--train.activation_checkpointing=true"]
    flags += ["--aux.hedge.enabled=true"]
    run = record(tmp_path / "with", *flags, "--train.diagnose_every=3")
    assert_same_training(run, record(tmp_path / "without", *flags))
    found = diagnosed(run)
    assert list(found) == [3, 6, 8]
    weights = [row["hedge"] for row in run.metrics() if "loss" in row]
    assert len(weights) == 8 and all(list(row) == LAYERS and sum(row.values()) == approx(1.0) for row in weights)
    for row in found.values():
        assert row["symbols"] == 500 and row["windows"] == 16
        assert {name: list(row[name]) for name in KINDS} == {
            "bits_per_character": HEADS,
            "supervision_ratio": LAYERS,
            "main_supervision_ratio": LAYERS,
            "gradient_cosine": LAYERS[:2],
            "gradient_norm": LAYERS,
        }
    valid = next(row["valid"] for row in run.metrics() if "valid" in row and row["step"] == 8)
    assert found[8]["bits_per_character"]["layer3/offset1"] == approx(valid["bits_per_character"], rel=1e-6)
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_two_processes_and_shards(tmp_path, text_corpus_flags):
    """Guards against a reducer that sees the gradients of diagnostics, and processes that diverge."""
    names = {
        "with": ["--train.diagnose_every=3"],
        "without": [],
        "shards": ["--train.diagnose_every=3", "--train.sharding=fsdp2"],
        "shards-without": ["--train.sharding=fsdp2"],
    }
    runs = [[*FLAGS, *text_corpus_flags, *flags, f"--run.dir={tmp_path / name}"] for name, flags in names.items()]
    said = train_with_two_processes(tmp_path / "plan.json", runs)
    assert said.count("diagnostics: bits per character alone, as the gradients are in shards") == 1
    assert_same_training(Run(tmp_path / "with"), Run(tmp_path / "without"))
    assert_same_training(Run(tmp_path / "shards"), Run(tmp_path / "shards-without"))
    both, shards = diagnosed(Run(tmp_path / "with")), diagnosed(Run(tmp_path / "shards"))
    assert list(both) == list(shards) == [3, 6, 8]
    for step in both:
        assert set(both[step]) == {"symbols", "windows", *KINDS}
        assert shards[step] == {
            "symbols": 500,
            "bits_per_character": approx(both[step]["bits_per_character"], rel=1e-3),
        }
