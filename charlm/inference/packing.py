"""A model whose weights lie as the processor's own library wants them, for passes over a few symbols.

Shapes: N outputs, D inputs.
"""

import copy

import torch
from torch import Tensor, nn

from charlm.model.transformer import CharTransformer

OPERATION = "_linear_pointwise"
"""Of torch.ops.mkldnn, by which torch's own compiler multiplies with packed weights."""


class PackedLinear(nn.Module):
    """A linear layer through oneDNN, which takes hardly longer for 4 rows than for one, and half as long as the default
    library."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed_ND = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed_ND, self.bias, "none", [], "")


def packed(transformer: CharTransformer) -> CharTransformer:
    """The same model, its parameters shared, with packed copies of the layers' matrices. The model itself where nothing
    is gained or known: not on a CPU, or without the library.

    Packing takes as long as writing some ten characters, and is of the weights as they are: once for each text.
    """
    device = transformer.embedding.weight.device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, OPERATION):
        return transformer
    copied = copy.deepcopy(transformer, {id(weight): weight for weight in transformer.parameters()})
    for block in copied.blocks:
        for parent in (block.attention, block.feed_forward):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, PackedLinear(linear))
    return copied
