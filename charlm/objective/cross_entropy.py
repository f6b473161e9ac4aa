"""Cross-entropy of linear classifiers, computed from hidden states without keeping the logits.

Shapes: N positions, D d_model, K offsets, V vocabulary, R = K * V rows of all classifiers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from charlm.config import CrossEntropyBackend

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Logits computed at once: they fit the caches of two CPU cores, or keep a GPU busy."""


Chain = Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None, Tensor | None]]
"""`loss_chain`, or the same compiled."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_RD: Tensor,
    bias_R: Tensor,
    targets_NK: Tensor,
    loss_weights_NK: Tensor,
    backend: CrossEntropyBackend = "chunked",
    hinge: float = 0.0,
    chain: Chain | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of K linear classifiers of the same hidden states, and their weighted sum.

    Matrix products run in autocast's precision, if it is on; softmax and losses are always fp32.

    Args:
        weight_RD, bias_R: the parameters of the K classifiers, stacked.
        targets_NK: the ids to predict at each offset.
        loss_weights_NK: at least 0, one of them above; fp32, without a gradient.
        hinge: in nats, at least 0. It is taken off each prediction, so that micro-batches of any size
            agree, and not off the mean (Lee et al. 2015, Deeply-Supervised Nets, section 2).
        chain: for the chunked backend.

    Returns:
        total: sum of loss_weights * max(0, losses - hinge); differentiable.
        losses_NK: -ln softmax(logits)[target] in nats, whatever the hinge; without a gradient.
    """
    if backend == "chunked":
        arguments = hidden_ND, weight_RD, bias_R, targets_NK, loss_weights_NK, hinge, chain or loss_chain
        return ChunkedLinearCrossEntropy.apply(*arguments)
    N, K = targets_NK.shape
    logits = F.linear(hidden_ND, weight_RD, bias_R).float().view(N * K, -1)
    losses_NK = F.cross_entropy(logits, targets_NK.flatten(), reduction="none").view(N, K)
    return _weighted_sum(losses_NK, loss_weights_NK, hinge), losses_NK.detach()


def _weighted_sum(losses_NK: Tensor, loss_weights_NK: Tensor, hinge: float) -> Tensor:
    counted_NK = F.relu(losses_NK - hinge) if hinge else losses_NK
    return (loss_weights_NK * counted_NK).sum()


def loss_chain(
    logits_NR: Tensor, targets_NK: Tensor, factors_NK: Tensor | None, hinge: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses, [N, K], and unless `factors_NK` is None the gradient of factors * losses.

    It comes as [N, R], like the logits, and as its sum over N in fp32, [R].
    """
    N, K = targets_NK.shape
    targets = targets_NK.flatten()[:, None]
    logits = logits_NR.float().view(N * K, -1)
    probabilities = logits.softmax(dim=-1)
    # -ln p by way of the largest p, as the target's own may underflow to 0.
    behind = logits.amax(dim=-1, keepdim=True) - logits.gather(1, targets)
    largest = probabilities.amax(dim=-1, keepdim=True)
    losses_NK = (behind - largest.log()).view(N, K)
    if factors_NK is None:
        return losses_NK, None, None
    if hinge:
        factors_NK = factors_NK * (losses_NK > hinge)
    # d loss / d logits = softmax - onehot
    if torch.compiler.is_compiling():  # in one kernel; eagerly the other way has fewer passes
        symbols_V = torch.arange(logits.shape[1], device=logits.device)
        grad_logits = probabilities - (symbols_V == targets).float()
    else:
        minus_one = probabilities.new_full((1, 1), -1.0)
        grad_logits = probabilities.scatter_add_(1, targets, minus_one.expand_as(targets))
    grad_NR = grad_logits.mul_(factors_NK.reshape(-1, 1)).view(N, -1)
    return losses_NK, grad_NR.to(logits_NR.dtype), grad_NR.sum(dim=0)


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk; keeps it in place of the logits."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_RD: Tensor,
        bias_R: Tensor,
        targets_NK: Tensor,
        loss_weights_NK: Tensor,
        hinge: float,
        chain: Chain,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        in_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if in_autocast else hidden_ND.dtype
        with torch.autocast(device, enabled=False):
            hidden, weight, bias = hidden_ND.to(dtype), weight_RD.to(dtype), bias_R.to(dtype)
            N, K = targets_NK.shape
            losses_NK = torch.empty(N, K, device=hidden.device)
            differentiable = any(ctx.needs_input_grad)
            constant = not any(ctx.needs_input_grad[1:3])  # the classifiers' parameters
            if differentiable:
                grad_hidden = torch.empty_like(hidden)
                grad_weight = None if constant else torch.zeros_like(weight_RD)
                grad_bias = None if constant else torch.zeros_like(bias_R)
                # Scaled to order 1, so that fp16 can hold the gradients.
                scale = loss_weights_NK.max()
                factors_NK = loss_weights_NK / scale
            rows = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // len(weight))
            for start in range(0, N, rows):
                chunk = slice(start, start + rows)
                logits = F.linear(hidden[chunk], weight, bias)
                factors = factors_NK[chunk] if differentiable else None
                losses_NK[chunk], grad_logits, grad_rows = chain(logits, targets_NK[chunk], factors, hinge)
                if differentiable:
                    torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                    if not constant:
                        grad_bias += grad_rows
                        grad_weight += grad_logits.mT @ hidden[chunk]
            if differentiable:
                ctx.save_for_backward(scale, grad_hidden, grad_weight, grad_bias)
                ctx.dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(losses_NK)
        return _weighted_sum(losses_NK, loss_weights_NK, hinge), losses_NK

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, grad_hidden, *grads_classifiers = ctx.saved_tensors
        factor = grad_total * scale
        grads = [None if grad is None else grad * factor for grad in grads_classifiers]
        # A factor with a dimension widens in the same pass.
        return (grad_hidden * factor[None]).to(ctx.dtype), *grads, None, None, None, None
