"""Copies of a model's weights in another layout, made once and kept for as long as the weights stay as they are."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

from charlm.model.transformer import CharTransformer

Copy = TypeVar("Copy")


def kept(build: Callable[[CharTransformer], Copy]) -> Callable[[CharTransformer], Copy]:
    """`build`, whose last result for each model is given again until a weight changes.

    It takes as long as writing some ten characters. The result must not refer to the model, or neither would ever go.
    """
    copies: WeakKeyDictionary[CharTransformer, tuple[tuple[int, ...], Copy]] = WeakKeyDictionary()

    @wraps(build)
    def copy_of(transformer: CharTransformer) -> Copy:
        versions = tuple(number for weight in transformer.parameters() for number in (id(weight), weight._version))
        if transformer not in copies or copies[transformer][0] != versions:
            copies[transformer] = (versions, build(transformer))
        return copies[transformer][1]

    return copy_of
