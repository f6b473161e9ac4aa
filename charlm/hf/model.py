"""charlm's network as a model of transformers, around `CharTransformer` and `Heads`.

Shapes: B texts, T new positions, S positions up to the newest, N slots of a cache, D d_model, V vocabulary.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from charlm.hf.config import CharlmConfig
from charlm.model.cache import Places
from charlm.runs.exported import EXPORT_CONFIG, TENSORS
from charlm.runs.tensors import load_tensors
from charlm.runs.trained import build_model, filled


class Past:
    """Padding and a cache of transformers, or one of them, in the place of a `KVCache`."""

    def __init__(
        self, cache: Cache | None, ids_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor | None, seen_BS: Tensor
    ):
        """`mask_BS` is false at padding; `seen_BS` are ids up to the newest, for n-grams, and -1 is padding."""
        num_new = num_slots = ids_BT.shape[1]
        self.cache, self.known, self.seen_BS = cache, 0, seen_BS
        self.lengths = 0  # the cache counts for itself
        if cache is not None:
            self.known, num_slots = int(cache.get_seq_length()), cache.get_mask_sizes(num_new, 0)[0]
        end, visible_B1TN = self.known + num_new, None
        if mask_BS is None and num_slots > end:  # a cache of fixed size
            mask_BS = ids_BT.new_ones(1, end, dtype=torch.bool)
        if mask_BS is not None:
            if mask_BS.shape[1:] != (end,):
                raise ValueError(f"attention_mask has shape {tuple(mask_BS.shape)}, not [texts, {end} positions]")
            slots_N = torch.arange(num_slots, device=ids_BT.device)
            own_T1, shown_B1N = slots_N[self.known : end, None], F.pad(mask_BS, (0, num_slots - end))[:, None]
            # Padding sees itself: attention to nothing is not a number.
            visible_B1TN = ((slots_N <= own_T1) & shown_B1N | (slots_N == own_T1))[:, None]
            self.seen_BS = seen_BS.masked_fill(~mask_BS[:, -seen_BS.shape[1] :], -1)
            if positions_BT is None:
                positions_BT = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)[:, self.known :]
        self.own = Places(slice(self.known, end), end, visible_B1TN)
        if positions_BT is not None:
            self.own = Places(positions_BT, int(positions_BT.max()) + 1, visible_B1TN)

    def places(self, num_new: int) -> Places:
        return self.own

    def layer(self, layer: int, places: Places) -> SimpleNamespace:
        """In the place of a `LayerCache`."""
        update = (lambda *new: new) if self.cache is None else partial(self.cache.update, layer_idx=layer - 1)
        return SimpleNamespace(places=places, extend=update)

    def extend_ids(self, ids_BT: Tensor, places: Places, num_earlier: int) -> Tensor:
        wanted = min(self.known, num_earlier) + ids_BT.shape[1]
        if self.seen_BS.shape[1] < wanted:
            raise ValueError("this model has n-grams: with a filled cache, give all ids up to the newest as seen_ids")
        return self.seen_BS[:, -wanted:]


class CharlmForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of charlm. Positions beyond its context raise ValueError: nothing is forgotten."""

    config_class = CharlmConfig
    base_model_prefix = "itself"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True

    def __init__(self, config: CharlmConfig):
        super().__init__(config)
        pairs, last_tower = map(tuple, config.heads["pairs"]), config.heads["last_tower"]
        modules = build_model(config.charlm, config.vocab_size, pairs, last_tower)
        self.transformer, self.heads = modules["transformer"], modules["heads"]
        for table in () if self.transformer.ngram_embedding is None else self.transformer.ngram_embedding.tables:
            table.sparse = False  # most optimizers refuse sparse gradients
        self.gradient_checkpointing = False  # the library switches it on and off
        self.generation_config.pad_token_id = config.vocab_size
        self.__dict__["itself"] = self  # where early exit looks for the config
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Self:
        """The model of a folder, or of OWNER/NAME on the hub; UserError if config.json needs other tensors."""
        folder, config = pretrained_model_name_or_path, kwargs.get("config")
        if folder is not None:
            if not Path(folder).is_dir():
                where = {key: kwargs.pop(key) for key in ("cache_dir", "revision", "token") if key in kwargs}
                folder = snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors"], **where)
            config = config if isinstance(config, CharlmConfig) else CharlmConfig.from_pretrained(folder)
            path = Path(folder, TENSORS)
            tensors, _ = load_tensors(path)
            kind = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
            filled(lambda: cls(config).to(kind), config.charlm.model, tensors, path, f"the model of {EXPORT_CONFIG}")
        return super().from_pretrained(folder, *args, **kwargs | {"use_safetensors": True})

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network draws its values itself."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.embedding = value

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return inputs if self.transformer.ngram_embedding is None else inputs | {"seen_ids": input_ids}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        return attention_mask  # `Past` makes the one for a cache of fixed size

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seen_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next symbol, [B, T, V], and with `labels` the mean loss in nats.

        Args:
            attention_mask: [B, S], 1 for symbols and 0 for padding on either side.
            past_key_values, cache: one of the library's caches; by default a new one, but none in training.
            output_hidden_states: also return the embedding and each layer's states; the last are normalised.
            seen_ids: [B, S], all ids up to the newest, which n-grams need if the cache is not empty.
        """
        depth, padding, past = self.config.num_hidden_layers, self.config.vocab_size, None
        past_key_values = cache if past_key_values is None else past_key_values  # version 5.24 calls it cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.gradient_checkpointing:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is not None:
            if self.transformer.ngram_embedding is not None:
                raise ValueError("inputs_embeds: this model has n-grams, which need input_ids")
            input_ids = inputs_embeds[..., 0].long()  # only its shape counts
        mask_BS = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        if (mask_BS, position_ids, past_key_values) != (None, None, None):
            seen_BS = input_ids if seen_ids is None else seen_ids
            seen_BS = seen_BS.masked_fill(seen_BS == padding, -1)
            past = Past(past_key_values, input_ids, mask_BS, position_ids, seen_BS)
        self.transformer.activation_checkpointing = self.gradient_checkpointing
        places, x_BTD = self.transformer.places(input_ids.shape[1], past), inputs_embeds
        if x_BTD is None:
            x_BTD = self.transformer.embed(input_ids.masked_fill(input_ids == padding, 0), places, past)
        show_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = set(range(1, depth + 1)) if show_all else {depth}
        states = self.transformer.run(x_BTD, 0, wanted, places, past)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.heads(states[depth][:, kept], depth)[:, :, 0], None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=padding, **kwargs)
        hidden_states = (x_BTD, *states.values()) if show_all else None
        return CausalLMOutputWithPast(loss, logits, past_key_values, hidden_states)

    def exit_logits(self, layer: int, offset: int = 1, **inputs: Tensor) -> Tensor:
        """Logits of a head, for the symbol `offset` steps ahead: [B, T, V]; KeyError if there is no such head."""
        states = self(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        return self.heads(states[layer], layer, (offset,))[:, :, 0]
