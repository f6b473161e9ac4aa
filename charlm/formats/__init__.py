"""Formats of exported models. What one needs is imported when it is asked for."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from charlm.config import UserError

if TYPE_CHECKING:
    from charlm.runs.trained import TrainedModel

Format = Literal["charlm", "transformers", "transformers-stock", "onnx"]
WRITERS = {
    "charlm": ("runs.exported", "save_model", ""),
    "transformers": ("formats.transformers", "save_model", "hf"),
    "transformers-stock": ("formats.transformers", "save_stock", "hf"),
    "onnx": ("formats.onnx", "save_model", "onnx"),
}
"""The module and the function of each, and the extra that brings what they need."""


def save_model(trained: "TrainedModel", folder: Path | str, format: Format, name: str | None = None) -> Path:
    """Export a model to a new folder; UserError if it exists, or the format cannot express the model."""
    module, function, extra = WRITERS[format]
    try:
        return getattr(import_module(f"charlm.{module}"), function)(trained, folder, name)
    except ImportError as error:
        raise UserError(f"format={format}: {error}; pip install 'charlm[{extra}]'", "format") from None
