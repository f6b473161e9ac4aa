"""The card of a shared model: what it is, its scores with their protocols, and how to use it."""

from typing import Any

from charlm.config.load import to_yaml
from charlm.runs.trained import TrainedModel

CARD = """\
---
library_name: charlm
pipeline_tag: text-generation
tags:
- character-level
---

# {name}

A character-level Transformer in the style of [Al-Rfou et al. 2018](https://arxiv.org/abs/1808.04444), trained with
charlm: {layers} layers of width {width}, context {context}, {parameters:,} parameters, vocabulary {vocabulary} of
{symbols:,} symbols. It was trained for {step:,} steps on {corpus} (SHA-256 {sha256}) and is checkpoint {checkpoint}.

## Measured

{figures}

## Use

```python
import charlm

trained = charlm.load("{name}")  # the folder, or OWNER/NAME on the hub; no code of others is run
print(charlm.generate(trained, "The ", length=200))
corpus = charlm.load_corpus(trained.config.data)
print(charlm.bits_per_character(trained, corpus, split="test"))
```

## Trained with

What differs from charlm's defaults:

```yaml
{options}
```
"""


def model_card(trained: TrainedModel, name: str) -> str:
    """The text of README.md for a model called `name`."""
    model = trained.config.model
    return CARD.format(
        name=name,
        layers=model.num_layers,
        width=model.d_model,
        context=model.context_length,
        parameters=sum(parameter.numel() for parameter in trained.modules.parameters()),
        vocabulary=trained.vocabulary.name,
        symbols=trained.vocabulary.size,
        step=trained.step,
        corpus=trained.corpus["name"],
        sha256=trained.corpus["sha256"],
        checkpoint=trained.checkpoint,
        figures="\n".join(map(_figure, trained.scores)) or "Nothing yet: `scripts/export.py --score test` measures it.",
        options=trained_with(trained).rstrip(),
    )


def trained_with(trained: TrainedModel) -> str:
    """YAML of the options of model, objective and training that differ from the defaults."""
    if trained.options is not None:
        return trained.options
    return to_yaml(trained.config.model_dump(include={"model", "aux", "train"}, exclude_defaults=True))


def _figure(score: dict[str, Any]) -> str:
    """One line of the card: a score with its protocol."""
    bits, others = score.get("bits_per_character"), dict(score)
    for name in ("bits_per_character", "bits_per_byte", "layers", "mixture", "seconds"):
        others.pop(name, None)
    per_byte = f" ({score['bits_per_byte']:.4f} per byte)" if isinstance(score.get("bits_per_byte"), float) else ""
    protocol = ", ".join(f"{name} {value}" for name, value in others.items() if value is not None)
    return f"- **{bits:.4f}** bits per character{per_byte}: {protocol}" if isinstance(bits, float) else f"- {protocol}"
