"""Training and scoring on a pretended GPU that lacks what Apple's do: float64, fused optimizers, pinned memory."""

import pytest
from benchmarks.pretend.guard import missing
from benchmarks.pretend.worker import measure

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}")

SMALL = {
    **{"model.num_layers": 2, "model.num_heads": 2, "model.d_model": 32, "model.d_ff": 64, "model.context_length": 64},
    **{"model.ngram_buckets": 64, "train.batch_size": 4, "train.valid_symbols": 5_000},
}
STEPS = {
    "sgd": {},
    "adamw": {"train.optimizer": "adamw"},
    "muon, n-grams": {"train.optimizer": "muon", "model.ngrams": [2, 3]},
    "pairwise": {"train.optimizer": "adamw", "aux.route": "pairwise"},
}
CHECKS = ["evaluation", "layers_and_entropies", "exits", "bits_of_heads", "gradients", "generation", "compression"]


@pytest.mark.parametrize(
    "options",
    [pytest.param(own, id=name, marks=[pytest.mark.slow] * ("n-grams" not in name)) for name, own in STEPS.items()],
)
def test_steps(options):
    """Guards against a step that only a GPU of one maker can make, and tensors left apart by a way round."""
    (found,) = measure("steps", configs=["enwik8_t12.yaml"], set=SMALL | options, log=True, lacking=True)
    assert found["kernels"] > 0
    assert not any("_fused_" in name for name in found["operations"])


@pytest.mark.parametrize(
    "check", [pytest.param(own, marks=[pytest.mark.slow] * (own != "evaluation")) for own in CHECKS]
)
def test_inference(check):
    """Guards against scores, generation and compression in float64 on a device that has none."""
    found = measure("inference", configs=["enwik8_drafts.yaml"], set=SMALL, check=check, lacking=True)
    assert found["kernels"] > 0
