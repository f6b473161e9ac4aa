"""Both backends against the definition, and each other's gradients."""

import math

import pytest
import torch
from torch import Tensor

from charlm.objective import cross_entropy as module
from charlm.objective.cross_entropy import linear_cross_entropy

BACKENDS = ["reference", "chunked"]
N, D, K, V = 11, 6, 2, 5


def example(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D), (K * V, D), (K * V,)]
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets_NK = torch.randint(V, (N, K), generator=generator)
    weights_NK = torch.rand(N, K, generator=generator)
    weights_NK[3] = 0.0
    return inputs, targets_NK, weights_NK


@pytest.mark.parametrize("hinge", [0.0, 2.0])
@pytest.mark.parametrize("rows_at_once", [1, 3, N, 100])
def test_backends_agree(rows_at_once, hinge, monkeypatch):
    """A chunk left out or read twice, a last chunk of the wrong size, weights of other positions, a lost factor."""
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", rows_at_once * K * V)
    inputs, targets_NK, weights_NK = example()
    results = {}
    for backend in BACKENDS:
        total, losses_NK = linear_cross_entropy(*inputs, targets_NK, weights_NK, backend, hinge)
        assert (losses_NK > hinge).any() and (losses_NK < hinge).any() == (hinge > 0.0)
        assert not losses_NK.requires_grad
        # 3 * total stands for what accelerate does to a loss: divide it by the number of accumulation steps.
        results[backend] = [total, losses_NK, *torch.autograd.grad(3 * total, inputs)]
    for result, expected in zip(results["chunked"], results["reference"], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_the_definition(backend):
    """A target of another offset, a classifier's rows mixed with the next one's, a softmax over both."""
    (hidden_ND, weight_RD, bias_R), targets_NK, weights_NK = example()
    total, losses_NK = linear_cross_entropy(hidden_ND, weight_RD, bias_R, targets_NK, weights_NK, backend)
    expected_total = 0.0
    for n in range(N):
        for k in range(K):
            rows = slice(k * V, (k + 1) * V)
            scores = (weight_RD[rows].double() @ hidden_ND[n].double() + bias_R[rows].double()).tolist()
            loss = math.log(sum(math.exp(score) for score in scores)) - scores[targets_NK[n, k]]
            assert losses_NK[n, k].item() == pytest.approx(loss, rel=1e-5)
            expected_total += weights_NK[n, k].item() * loss
    assert total.item() == pytest.approx(expected_total, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_softmax_is_fp32_under_autocast(backend):
    """Losses of bf16 logits computed in bf16: wrong in the third digit, and zero where a prediction is sure."""
    hidden_ND, weight_RD, bias_R = torch.ones(1, 1), torch.tensor([[8.0], [0.0], [0.0], [0.0]]), torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16):
        _, losses_NK = linear_cross_entropy(
            hidden_ND, weight_RD, bias_R, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), backend
        )
    assert losses_NK.dtype == torch.float32
    assert losses_NK.item() == pytest.approx(math.log(1 + 3 * math.exp(-8)), rel=1e-4)


def test_backends_agree_under_autocast_as_far_as_bf16_goes():
    """Gradients rounded to nothing because a weight of 1 / N was applied in the low precision, or of the wrong type."""
    inputs, targets_NK, _ = example()
    weights_NK = torch.full((N, K), 1e-7)
    expected = torch.autograd.grad(linear_cross_entropy(*inputs, targets_NK, weights_NK, "reference")[0], inputs)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            total, _ = linear_cross_entropy(*inputs, targets_NK, weights_NK, "chunked")
        for gradient, reference in zip(torch.autograd.grad(total, inputs), expected, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("constant", [False, True])
def test_the_chunked_backend_keeps_no_logits(constant):
    """Memory that grows with the number of classifiers: beside the weights' gradients, one matrix like the states; work
    done for the gradient of constant classifiers, and one of the states that changes by it."""
    (hidden_ND, *classifiers), targets_NK, weights_NK = example()
    total, _ = linear_cross_entropy(hidden_ND, *classifiers, targets_NK, weights_NK, "chunked")
    (expected,) = torch.autograd.grad(total, [hidden_ND])
    classifiers = [parameter.detach() if constant else parameter for parameter in classifiers]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        total, _ = linear_cross_entropy(hidden_ND, *classifiers, targets_NK, weights_NK, "chunked")
    assert sum(tensor.numel() for tensor in kept) <= N * D + 1 + (0 if constant else K * V * D + K * V)
    assert torch.equal(torch.autograd.grad(total, [hidden_ND])[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hinge_by_hand(backend):
    """A threshold on the mean in place of each loss, one that scales the gradient, and losses reported without it."""
    # Logits 0, ln 3 over two symbols: probabilities 1/4 and 3/4.
    hidden_ND = torch.ones(3, 1, requires_grad=True)
    weight_RD = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    bias_R = torch.zeros(2, requires_grad=True)
    targets_NK, weights_NK = torch.tensor([[0], [1], [0]]), torch.tensor([[0.5], [0.25], [2.0]])
    total, losses_NK = linear_cross_entropy(hidden_ND, weight_RD, bias_R, targets_NK, weights_NK, backend, 1.0)
    torch.testing.assert_close(losses_NK, torch.tensor([[math.log(4)], [math.log(4 / 3)], [math.log(4)]]))
    assert total.item() == pytest.approx(2.5 * (math.log(4) - 1))
    total.backward()
    # softmax - onehot of target 0 is (-3/4, 3/4); the second prediction's loss lies under the hinge.
    torch.testing.assert_close(bias_R.grad, 2.5 * torch.tensor([-0.75, 0.75]))
    torch.testing.assert_close(hidden_ND.grad, 0.75 * math.log(3) * torch.tensor([[0.5], [0.0], [2.0]]))
