"""Options of the architecture."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from charlm.config.types import BelowOne, Count, Section, Whole


class ModelConfig(Section):
    """The Transformer. The defaults are T12 of Al-Rfou et al. 2018 without its dropout."""

    num_layers: Annotated[int, Field(ge=1, le=10_000), Whole] = 12
    """Number of layers, L."""
    num_heads: Count = 2
    """Attention heads per layer, H; must divide d_model."""
    d_model: Count = 512
    """Width of the hidden states, D."""
    d_ff: Count = 2048
    """Width of the feed-forward layer."""
    context_length: Count = 512
    """Number of characters that a prediction sees, T."""
    position_encoding: Literal["per_layer", "input", "rotary"] = "per_layer"
    """per_layer: a learned table is added to the input of every layer (the paper). input: of the first
    layer only. rotary: queries and keys are rotated (Su et al. 2021)."""
    ngrams: tuple[Annotated[int, Field(ge=2, le=64), Whole], ...] = ()
    """Lengths of n-grams, such as [2, 3, 4]. Each has a hashed table of embeddings, which are added to
    the character's (Pagnoni et al. 2024, Byte Latent Transformer, section 3.2.1)."""
    ngram_buckets: Count = 32_768
    """Rows of each n-gram table."""
    ngram_width: Count = 64
    """Columns of each n-gram table; one matrix projects all to d_model."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sublayer, or after its residual sum. The paper does not say which."""
    activation: Literal["relu", "gelu", "relu_squared"] = "relu"
    """Activation of the feed-forward layer. relu_squared is So et al. 2021 (Primer)."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """Matrices that write to the residual stream start scaled by 1 / sqrt(2L) (Radford et al. 2019),
    or at zero (Zhang et al. 2019, Fixup)."""
    head_bias: bool = True
    """Whether classifiers have a bias. Stock formats of other libraries have none (docs/sharing.md)."""
    attention_dropout: BelowOne = 0.0
    """Dropout on the attention weights."""
    activation_dropout: BelowOne = 0.0
    """Dropout after the activation of the feed-forward layer."""
    residual_dropout: BelowOne = 0.0
    """Dropout on what each sublayer adds to the residual stream."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.num_heads:
            text = f"must be divisible by model.num_heads={self.num_heads}"
            raise self.mistake("d_model", text, "num_heads")
        head_size = self.d_model // self.num_heads
        if self.position_encoding == "rotary" and head_size % 2:
            text = f"needs an even head size; d_model / num_heads is {head_size}"
            raise self.mistake("position_encoding", text, "d_model", "num_heads")
        if len(set(self.ngrams)) < len(self.ngrams):
            raise self.mistake("ngrams", "contains a length twice")
        return self
