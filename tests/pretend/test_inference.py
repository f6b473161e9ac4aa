"""Evaluation, diagnostics, generation and compression on a pretended GPU: no mixed device, few waits."""

import pytest
from benchmarks.pretend.guard import missing
from benchmarks.pretend.worker import measure

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}")

SMALL = {
    **{"model.num_layers": 2, "model.num_heads": 2, "model.d_model": 32, "model.d_ff": 64, "model.context_length": 64},
    **{"model.ngram_buckets": 64, "train.valid_symbols": 5_000},
}
READS = "each figure is read by itself"
WAITS = {
    "evaluation": (1, None),
    "layers_and_entropies": (1, None),
    "exits": (4, None),
    "bits_of_heads": (2, None),
    "gradients": (1, READS),
    "generation": (3, None),
    "generation_past_the_context": (3, None),
    "generation_of_several": (3, None),
    "generation_by_exits": (7, None),
    "drafts_by_offsets": (5, None),
    "drafts_by_exit": (9, None),
    "truncated": (2, None),
    "compression": (200, None),
}
"""By check: the most waits, of a batch or for each character, and why there are more today."""


def cases() -> list:
    found = []
    for check, (waits, reason) in WAITS.items():
        marks = [] if check in ("evaluation", "generation") else [pytest.mark.slow]
        marks += [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        found.append(pytest.param(check, waits, marks=marks, id=check))
    return found


@pytest.mark.parametrize(("check", "waits"), cases())
def test_inference_mixes_no_devices(check, waits):
    """Guards against a tensor left on the CPU, and a host that waits more often than it needs to read."""
    found = measure("inference", configs=["enwik8_drafts.yaml"], set=SMALL, check=check)
    assert found["kernels"] > 0
    assert sum(found["waits"].values()) <= waits
