"""Sizes and FLOP per character of the measured models."""

from pathlib import Path

import pytest
import torch
from benchmarks.peers import build_peer, gated_d_ff, matrix_parameters
from benchmarks.setups import Setup
from benchmarks.shapes import Shape, charlm_config, named_shape

from charlm.objective.count import num_parameters
from charlm.report.explain import explain

TOY = Shape(name="toy", num_layers=2, d_model=8, num_heads=2, d_ff=32, context_length=16, batch_size=3)


@pytest.mark.parametrize(
    ("name", "auxiliary", "flop", "targets", "exits"),
    [
        # 6 * (6 * (4 * 256^2 + 2 * 256 * 1024) + 256 * 256 * targets * exits) + 12 * 6 * 256 * 512
        ("S", False, 6 * (6 * 786_432 + 65_536) + 9_437_184, 1, 1),
        ("S", True, 6 * (6 * 786_432 + 65_536 * 12) + 9_437_184, 2, 6),
        # 6 * (12 * (4 * 512^2 + 2 * 512 * 2048) + 256 * 512 * targets * exits) + 12 * 12 * 512 * 512
        ("P", False, 6 * (12 * 3_145_728 + 131_072) + 37_748_736, 1, 1),
        ("P", True, 6 * (12 * 3_145_728 + 131_072 * 24) + 37_748_736, 2, 12),
    ],
)
def test_charlm_runs_the_whole_table(name: str, auxiliary: bool, flop: int, targets: int, exits: int) -> None:
    """Guards against a benchmark of charlm with some rows asleep, and a factor lost in the FLOP per character."""
    config = charlm_config(named_shape(name, gpu=False), Path("text"), mixed_precision="no", auxiliary=auxiliary)
    explanation = explain(config)
    assert explanation.flops_per_character["training_start"] == flop
    assert len(explanation.terms) == targets * exits
    assert {term.positions for term in explanation.terms} == {"all"}


@pytest.mark.parametrize(
    ("library", "module", "blocks", "rest"),
    [
        # Per layer 4 D^2 + 2 D d_ff, and V D of the head; then biases, norms and embeddings beside them.
        ("torch TransformerEncoder", "torch", 2 * (4 * 64 + 2 * 256), 2 * (4 * 8 + 40 + 32) + 16 + 16 * 8 + 2048 + 256),
        ("transformers GPT-2", "transformers", 2 * (4 * 64 + 2 * 256), 2 * (4 * 8 + 40 + 32) + 16 + 16 * 8),
        ("transformers Llama", "transformers", 2 * (4 * 64 + 3 * 8 * gated_d_ff(32)), 2 * 16 + 8 + 2048),
        ("x-transformers", "x_transformers", 2 * (4 * 64 + 2 * 256), 2 * (40 + 2 * 8) + 8 + 17 * 8 + 2048),
    ],
)
@pytest.mark.parametrize("tuned", [False, True])
def test_peer_has_the_shape(library: str, module: str, blocks: int, rest: int, tuned: bool) -> None:
    """Guards against a peer of another size, and against a matrix product that is not counted."""
    pytest.importorskip(module)
    setup = Setup(library=library, label="", precision="fp32", tuned=tuned)
    model, loss_of = build_peer(setup, TOY)
    assert matrix_parameters(model) == blocks + 256 * 8
    assert num_parameters(model) == blocks + 256 * 8 + rest
    windows_BW = torch.randint(256, (3, 17), generator=torch.Generator().manual_seed(0))
    loss = loss_of(windows_BW)
    loss.backward()
    assert 4 < loss.item() < 8  # ln 256 is 5.5
    assert all(parameter.grad is not None for parameter in model.parameters())
