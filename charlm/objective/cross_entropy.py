"""Cross-entropy of linear classifiers: from hidden states to losses, without keeping the logits.

Shapes: N positions, D d_model, K offsets, V vocabulary, R = K * V rows of the classifiers of all offsets together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from charlm.config import CrossEntropyBackend

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
"""Logits that the chunked backend computes at once, by type of device: what a core's cache holds; what fills a GPU."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_RD: Tensor,
    bias_R: Tensor,
    targets_NK: Tensor,
    loss_weights_NK: Tensor,
    backend: CrossEntropyBackend = "chunked",
) -> tuple[Tensor, Tensor]:
    """Losses of K linear classifiers that read the same hidden states, and the weighted sum to minimise.

    Products run in the precision of autocast, if it is on; the softmax and the losses are fp32 whatever it is.

    Args:
        weight_RD, bias_R: of the K classifiers, one below the other.
        targets_NK: ids; of the classifier of each offset.
        loss_weights_NK: what each loss counts, at least 0 and one of them more; fp32, without a gradient.

    Returns:
        total: sum of loss_weights * losses; differentiable with respect to hidden states, weight and bias.
        losses_NK: -ln softmax(logits)[target] in nats; without a gradient.
    """
    function = _reference if backend == "reference" else ChunkedLinearCrossEntropy.apply
    return function(hidden_ND, weight_RD, bias_R, targets_NK, loss_weights_NK)


def _reference(
    hidden_ND: Tensor, weight_RD: Tensor, bias_R: Tensor, targets_NK: Tensor, loss_weights_NK: Tensor
) -> tuple[Tensor, Tensor]:
    N, K = targets_NK.shape
    logits = F.linear(hidden_ND, weight_RD, bias_R).float().view(N * K, -1)
    losses_NK = F.cross_entropy(logits, targets_NK.flatten(), reduction="none").view(N, K)
    return (loss_weights_NK * losses_NK).sum(), losses_NK.detach()


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """The gradient is computed in the forward pass, chunk by chunk while the logits are at hand, and kept in their
    place: one matrix of the hidden states' shape however many classifiers read them.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, weight_RD: Tensor, bias_R: Tensor, targets_NK: Tensor, loss_weights_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        with torch.autocast(device, enabled=False):
            hidden, weight, bias = hidden_ND.to(dtype), weight_RD.to(dtype), bias_R.to(dtype)
            N, K = targets_NK.shape
            losses_NK = torch.empty(N, K, device=hidden.device)
            differentiable = any(ctx.needs_input_grad)
            if differentiable:
                grad_hidden = torch.empty_like(hidden)
                grad_weight, grad_bias = torch.zeros_like(weight_RD), torch.zeros_like(bias_R)
                # The gradients kept here are of order 1 whatever the weights are, so that fp16 can hold them.
                scale = loss_weights_NK.max()
                factors_NK = loss_weights_NK / scale
            rows = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // len(weight))
            for start in range(0, N, rows):
                chunk = slice(start, start + rows)
                targets = targets_NK[chunk].flatten()[:, None]
                logits = F.linear(hidden[chunk], weight, bias).float().view(len(targets), -1)
                probabilities = logits.softmax(dim=-1)
                # -ln p of the target by way of the largest p, at least 1 / V, as the target's own may be no number.
                behind = logits.amax(dim=-1, keepdim=True) - logits.gather(1, targets)
                losses_NK[chunk] = (behind - probabilities.amax(dim=-1, keepdim=True).log()).view(-1, K)
                if differentiable:
                    # d loss / d logits = softmax - onehot
                    grad_logits = probabilities
                    grad_logits.scatter_add_(1, targets, grad_logits.new_full((1, 1), -1.0).expand_as(targets))
                    grad_logits = grad_logits.mul_(factors_NK[chunk].reshape(-1, 1)).view(-1, len(weight))
                    grad_bias += grad_logits.sum(dim=0)
                    grad_logits = grad_logits.to(dtype)
                    torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                    grad_weight += grad_logits.mT @ hidden[chunk]
            if differentiable:
                ctx.save_for_backward(scale, grad_hidden, grad_weight, grad_bias)
                ctx.dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(losses_NK)
        return (loss_weights_NK * losses_NK).sum(), losses_NK

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        factor = grad_total * scale
        return grad_hidden.to(ctx.dtype) * factor, grad_weight * factor, grad_bias * factor, None, None
