"""Keys and values of the positions that were read so far, for generation.

Shapes: B batch, T new positions, S positions up to the newest, H heads, C head size, L layers.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from charlm.config import ModelConfig


class Places(NamedTuple):
    """Slots in a cache for the next T positions of each row."""

    positions: slice | Tensor
    """A slice where all rows are equally long, else [B, T]."""
    end: int
    """S, the length of the longest row afterwards."""
    visible_B1TS: Tensor | None
    """The positions that each new one attends to; None: plain causal attention."""


class LayerCache(NamedTuple):
    """One layer's buffers, [B, H, context_length, C], and where the next positions go."""

    keys: Tensor
    values: Tensor
    places: Places

    def extend(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those of all positions up to them."""
        positions, end, _ = self.places
        for buffer, new_BHTC in ((self.keys, keys_BHTC), (self.values, values_BHTC)):
            if isinstance(positions, slice):
                buffer[:, :, positions] = new_BHTC
            else:
                buffer.scatter_(2, positions[:, None, :, None].expand(new_BHTC.shape), new_BHTC)
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Buffers of keys and values, [L, B, H, context_length, C], and of ids, [B, context_length].

    Buffers never move. Every row has its own length; lowering it forgets the newest positions.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        head_size = config.d_model // config.num_heads
        shape = (config.num_layers, batch_size, config.num_heads, config.context_length, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, config.context_length, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        """[B], on the CPU, where shapes are decided."""

    @property
    def length(self) -> int:
        return max(self.lengths.tolist())

    def row(self, row: int) -> "KVCache":
        """A view of one row: it shares the buffers and the length."""
        view = copy.copy(self)
        view.keys = self.keys[:, row : row + 1]
        view.values = self.values[:, row : row + 1]
        view.ids = self.ids[row : row + 1]
        view.lengths = self.lengths[row : row + 1]
        return view

    def places(self, num_new: int) -> Places:
        """Slots for the next `num_new` positions of each row."""
        lengths = self.lengths.tolist()
        end = max(lengths) + num_new
        equal = min(lengths) == max(lengths)
        if equal and not 1 < num_new <= 16:  # where a mask is faster than attention in blocks
            return Places(slice(end - num_new, end), end, None)
        positions_BT = (self.lengths[:, None] + torch.arange(num_new)).to(self.keys.device)
        visible_BTS = torch.arange(end, device=self.keys.device) <= positions_BT[:, :, None]
        return Places(slice(end - num_new, end) if equal else positions_BT, end, visible_BTS[:, None])

    def layer(self, layer: int, places: Places) -> LayerCache:
        """The buffers of a layer, from 1, for positions that go to `places`."""
        return LayerCache(self.keys[layer - 1], self.values[layer - 1], places)

    def extend_ids(self, ids_BT: Tensor, places: Places, num_earlier: int) -> Tensor:
        """Store new ids; return them after up to `num_earlier` earlier ones, -1 for none."""
        if isinstance(places.positions, slice):
            self.ids[:, places.positions] = ids_BT
            return self.ids[:, max(0, places.positions.start - num_earlier) : places.end]
        self.ids.scatter_(1, places.positions, ids_BT)
        offsets = torch.arange(-num_earlier, ids_BT.shape[1], device=ids_BT.device)
        wanted_BS = places.positions[:, :1] + offsets
        return self.ids.gather(1, wanted_BS.clamp(min=0)).masked_fill(wanted_BS < 0, -1)
