"""The architecture."""

from dataclasses import dataclass
from typing import Literal

from charlm.config.errors import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The deep character Transformer. Defaults are T12 of Al-Rfou et al. 2018 without its dropout."""

    num_layers: int = 12
    """L, the number of layers."""
    num_heads: int = 2
    """H, attention heads per layer; must divide d_model."""
    d_model: int = 512
    """D, the width of the hidden states."""
    d_ff: int = 2048
    """Width of the feed-forward layer."""
    context_length: int = 512
    """T, the most characters that a prediction can look back on."""
    positions: Literal["per_layer", "input", "rotary"] = "per_layer"
    """per_layer: a learned table is added to the input of every layer (the paper); input: to the first layer's
    only; rotary: queries and keys are rotated (Su et al. 2021)."""
    ngrams: tuple[int, ...] = ()
    """Lengths of n-grams whose embeddings are added to the character's, from hashed tables (Pagnoni et al. 2024, Byte
    Latent Transformer, section 3.2.1), as a YAML list: [2, 3, 4]. They cost memory and hardly any arithmetic."""
    ngram_buckets: int = 32_768
    """Rows of each n-gram table."""
    ngram_width: int = 64
    """Columns of each n-gram table; a matrix takes the rows of all tables together to d_model."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sublayer (pre) or after its residual sum (post). The paper does not say."""
    activation: Literal["relu", "gelu", "relu_squared"] = "relu"
    """Of the feed-forward layer. relu_squared is So et al. 2021 (Primer)."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """How the matrices that write to the residual stream start: scaled by 1 / sqrt(2L) (Radford et al. 2019), or at
    zero, so that every sublayer starts by adding nothing (Zhang et al. 2019, Fixup)."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights."""
    activation_dropout: float = 0.0
    """Dropout after the feed-forward activation."""
    residual_dropout: float = 0.0
    """Dropout on what each sublayer adds to the residual stream."""

    def __post_init__(self):
        for name in (
            "num_layers",
            "num_heads",
            "d_model",
            "d_ff",
            "context_length",
            "ngram_buckets",
            "ngram_width",
        ):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        # Deeper than any, and shallow enough for the table of terms to be counted.
        require(self.num_layers <= 10_000, "model.num_layers", self.num_layers, "must be at most 10,000")
        require(
            self.d_model % self.num_heads == 0,
            "model.d_model",
            self.d_model,
            f"must be divisible by model.num_heads={self.num_heads}",
        )
        require(
            self.positions != "rotary" or self.d_model // self.num_heads % 2 == 0,
            "model.positions",
            "rotary",
            f"needs an even head size; d_model / num_heads is {self.d_model // self.num_heads}",
        )
        require(
            all(2 <= n <= 64 for n in self.ngrams) and len(set(self.ngrams)) == len(self.ngrams),
            "model.ngrams",
            list(self.ngrams),
            "must be different lengths from 2 to 64",
        )
        for name in ("attention_dropout", "activation_dropout", "residual_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "must lie in [0, 1)")
