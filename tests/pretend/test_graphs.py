"""Graphs of compiled blocks while windows change their length."""

from typing import Any

import pytest
from benchmarks.pretend.worker import measure

TINY = {
    **{"model.num_layers": 2, "model.num_heads": 2, "model.d_model": 16, "model.d_ff": 32, "model.context_length": 32},
    **{"train.batch_size": 4, "train.valid_symbols": 500, "train.mixed_precision": "no"},
    **{"train.compile": "yes", "train.attention": "sdpa"},  # as on a GPU
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("enwik8_fast.yaml", {}, marks=pytest.mark.slow),
        pytest.param("enwik8_t12.yaml", {}),
        pytest.param("enwik8_t12.yaml", {"train.activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["windows that grow", "windows of one length", "checkpointing"],
)
def test_blocks_are_whole_graphs(config: str, options: dict[str, Any]) -> None:
    """Guards against a block in several graphs, and one that is compiled anew whenever validation comes."""
    found = measure("graphs", configs=[config], set=TINY | options)
    assert found["breaks"] == {}
    assert 0 < found["compiled"] <= 4  # short, full, validation, and the chain of losses
    assert {event: new for event, new in found["new_graphs"].items() if "turn 2" in event and new} == {}
