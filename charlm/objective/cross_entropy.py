"""Cross-entropy per position."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BTKV: Tensor, targets_BTK: Tensor) -> Tensor:
    """-ln softmax(logits)[target], in nats and fp32 whatever the precision of the logits: [B, T, K]."""
    return F.cross_entropy(logits_BTKV.flatten(0, 2).float(), targets_BTK.flatten(), reduction="none").view_as(
        targets_BTK
    )
