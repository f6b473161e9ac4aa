"""Cross-entropy of linear classifiers, computed from hidden states without keeping the logits.

Shapes: N positions, D d_model, K offsets, V vocabulary, R = K * V rows of all classifiers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from charlm.config import CrossEntropyBackend

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Logits computed at once: they fit the caches of two CPU cores, or keep a GPU busy."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_RD: Tensor,
    bias_R: Tensor,
    targets_NK: Tensor,
    loss_weights_NK: Tensor,
    backend: CrossEntropyBackend = "chunked",
    hinge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The losses of K linear classifiers of the same hidden states, and their weighted sum.

    Matrix products run in autocast's precision, if it is on; softmax and losses are always fp32.

    Args:
        weight_RD, bias_R: the parameters of the K classifiers, stacked.
        targets_NK: the ids to predict at each offset.
        loss_weights_NK: at least 0, one of them above; fp32, without a gradient.
        hinge: in nats, at least 0. It is taken off each prediction, so that micro-batches of any size
            agree, and not off the mean (Lee et al. 2015, Deeply-Supervised Nets, section 2).

    Returns:
        total: sum of loss_weights * max(0, losses - hinge); differentiable.
        losses_NK: -ln softmax(logits)[target] in nats, whatever the hinge; without a gradient.
    """
    if backend == "chunked":
        arguments = hidden_ND, weight_RD, bias_R, targets_NK, loss_weights_NK, hinge
        return ChunkedLinearCrossEntropy.apply(*arguments)
    N, K = targets_NK.shape
    logits = F.linear(hidden_ND, weight_RD, bias_R).float().view(N * K, -1)
    losses_NK = F.cross_entropy(logits, targets_NK.flatten(), reduction="none").view(N, K)
    return _weighted_sum(losses_NK, loss_weights_NK, hinge), losses_NK.detach()


def _weighted_sum(losses_NK: Tensor, loss_weights_NK: Tensor, hinge: float) -> Tensor:
    counted_NK = F.relu(losses_NK - hinge) if hinge else losses_NK
    return (loss_weights_NK * counted_NK).sum()


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
                targets = targets_NK[chunk].flatten()[:, None]
                logits = F.linear(hidden[chunk], weight, bias).float().view(len(targets), -1)
                probabilities = logits.softmax(dim=-1)
                # -ln p by way of the largest p, as the target's own may underflow to 0.
                behind = logits.amax(dim=-1, keepdim=True) - logits.gather(1, targets)
                largest = probabilities.amax(dim=-1, keepdim=True)
                losses_NK[chunk] = (behind - largest.log()).view(-1, K)
                if differentiable:
                    # d loss / d logits = softmax - onehot
                    grad_logits = probabilities
                    minus_one = grad_logits.new_full((1, 1), -1.0)
                    grad_logits.scatter_add_(1, targets, minus_one.expand_as(targets))
                    factors = factors_NK[chunk]
                    if hinge:
                        factors = factors * (losses_NK[chunk] > hinge)
                    grad_logits = grad_logits.mul_(factors.reshape(-1, 1)).view(-1, len(weight))
                    if not constant:
                        grad_bias += grad_logits.sum(dim=0)
                    grad_logits = grad_logits.to(dtype)
                    torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                    if not constant:
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
        return grad_hidden.to(ctx.dtype) * factor, *grads, None, None, None
