"""Options of learning while reading."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from charlm.config.types import BelowOne, Count, NonNegative, Positive, Section

ExpertName = Literal["heads", "counts", "match", "train"]
"""Names of `charlm.inference.experts.Experts`."""


def fixed(experts: Iterable[str]) -> bool:
    """Whether experts count the training split alone: then they learn nothing from the text that they predict."""
    return {"counts", "match", "train"}.intersection(experts) == {"train"}


class AdaptConfig(Section):
    """Learning from a text while it is read (dynamic evaluation; Krause et al. 2018)."""

    rule: Literal["sgd", "rms"] = "rms"
    """rms: each gradient is divided by the root of its mean square (Krause et al. 2018, section 4), here over
    the text so far. sgd: plain gradient descent, which needs rates such as 0.1."""
    parameters: Literal["all", "heads", "ngrams"] = "all"
    """all: every parameter that predicts. heads: the head and the norms. ngrams: the n-gram tables."""
    rate: Positive = 3e-4
    """Learning rate of everything but the n-gram tables."""
    ngram_rate: NonNegative = 0.02
    """Learning rate of the n-gram tables, which a row-wise RMSprop moves; 0 leaves them."""
    decay: BelowOne = 0.0
    """Share of the way back to the trained weights that each step goes, n-gram tables excepted (Krause et al.
    2018, equation 6)."""
    steps: Annotated[Count, Field(le=100)] = 1
    """Steps on each window."""
