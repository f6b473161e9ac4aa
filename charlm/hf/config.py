"""The options of a model for transformers: config.json of an exported folder, checked as charlm checks it."""

from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from charlm.config import Config, UserError
from charlm.config.load import load_config
from charlm.runs.exported import EXPORT_CONFIG, ModelRecord, config_of

UNTRAINED = {
    **{"format": 1, "hedge_weights": None, "checkpoint": "none", "step": 0, "trained_with": ""},
    "corpus": {"name": "unknown", "sha256": "unknown"},
}
"""What the record of a model says that charlm has not trained."""


class CharlmConfig(PreTrainedConfig):
    """Options of `CharlmForCausalLM`. Raises ValueError or UserError for those that cannot work.

    CharlmConfig(options={"model": {"num_layers": 6}}) is a model with one head, for the next byte.
    """

    model_type = "charlm"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 256
    """V. The id V, beyond the vocabulary, is padding."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of charlm by section, as in a YAML file."""
    heads: dict[str, Any] | None = None
    """Arguments of `Heads`; by default only the last layer predicts, and only the next symbol."""
    num_hidden_layers: int | None = None
    """The layer that predicts, by default the last; it needs a head for the next symbol."""
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("transformers_weights", None)  # would name another file than the one that is checked
        super().__post_init__(**UNTRAINED | kwargs)
        self.scores: list[Any] = []  # the weights may have changed since
        self.heads = self.heads or {"pairs": [[self.charlm.model.num_layers, 1]], "last_tower": False}
        record = {name: getattr(self, name) for name in (*UNTRAINED, "options", "heads", "scores")}
        model = config_of(ModelRecord.model_validate(record), Path(EXPORT_CONFIG)).model
        self.hidden_size, self.num_attention_heads = model.d_model, model.num_heads
        self.max_position_embeddings = model.context_length
        self.num_hidden_layers = self.num_hidden_layers or model.num_layers
        if [self.num_hidden_layers, 1] not in self.heads["pairs"]:
            text = f"num_hidden_layers={self.num_hidden_layers}: has no head for the next symbol"
            raise UserError(text, "num_hidden_layers")

    @property
    def charlm(self) -> Config:
        """The options as charlm has them."""
        return load_config((), self.options)
