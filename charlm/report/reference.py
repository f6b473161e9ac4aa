"""The page of every configuration option: python -m charlm.report.reference > docs/configuration.md

Texts are the docstrings of the fields, which `--help` prints, too.
"""

import ast
import dataclasses
import inspect
import json
import os
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from charlm.config import Config, Depth
from charlm.values import text_of

INTRODUCTION = """\
<!-- written by: python -m charlm.report.reference > docs/configuration.md -->

# Configuration

Every option, with what it may be and what it is unless you set it. The same texts: `python scripts/train.py --help`,
which with a `--config` shows that file's values as the defaults. What they make together, before anything runs:
`python scripts/explain.py --config configs/demo.yaml`.

An option is a line of a YAML file, or a flag of `scripts/train.py`, `explain.py`, `prepare.py` and `ablate.py`:

```yaml
model:
  num_layers: 12
  ngrams: [2, 3, 4]
aux.layers.enabled: false     # dots do as well as indentation
train: {steps: 1e5, micro_batch_size: null}
```

```sh
python scripts/explain.py --config configs/enwik8_t12.yaml --model.num_layers=6 --aux.layers.enabled=false
python scripts/explain.py --config configs/demo.yaml --config configs/methods/keras.yaml --aux.layers.at="[1/3, 2/3]"
```

- A file says only what differs from the defaults. Of several `--config` the later wins, option by option, and flags
  win over files, wherever they stand.
- `true` and `false` are written out, `--run.resume=true`; whole numbers may be written `100_000` or `1e5`; `null`,
  `none` and `~` are no value; a path is taken from the folder that the command is typed in.
- Lists and mappings are YAML, in quotes because of the shell: `"--model.ngrams=[2, 3, 4]"`,
  `--aux.layers.weights="{4: 0.3}"`. A list may go without its brackets: `--model.ngrams=2,3,4`. A layer is its number,
  1 the lowest, or a fraction of the depth, `1/3` or `0.5`; `1.0` is the last.
- *Progress* is the number of completed optimizer steps over `train.steps`, from 0 to 1.
- What cannot work ends the command before anything is computed, with one message: option, value, way out, and the line
  of the file that it comes from. A wrong name is answered with similar ones.
- A run keeps its resolved options as `RUN/config.yaml`, which is a file for `--config` like any other.

From Python: `charlm.load_config("configs/demo.yaml", {"train.steps": 60})`.
"""
WORDS = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text", Path: "path"}


def page(config: type = Config) -> str:
    """The Markdown of all sections, each with its options; a section's own sections follow it."""
    return "\n".join([INTRODUCTION, *_sections(config, "")])


def _sections(kind: type, name: str) -> Iterator[str]:
    if name:
        options = (option for option in _options(kind, f"{name}.") if option)
        yield "\n".join([f"## {name}", "", inspect.getdoc(kind), "", *options, ""])
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _sections(field.type, f"{name}.{field.name}".lstrip("."))


def _options(kind: type, prefix: str, indent: str = "") -> Iterator[str]:
    """An entry for each field; below it, indented, what the records in its lists and mappings have."""
    texts = docstrings(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            continue
        text = texts[field.name].replace("\n", f"\n{indent}  ")
        yield f"{indent}- **`{prefix}{field.name}`**: {in_words(field.type)}; {_default(field)}.\n{indent}  {text}"
        for record in filter(dataclasses.is_dataclass, get_args(field.type)):
            yield from _options(record, "", f"{indent}  ")


def docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, inherited fields included."""
    texts = {}
    for origin in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(origin)).body
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = inspect.cleandoc(text)
    return texts


def in_words(kind: Any, plural: str = "") -> str:
    """What may be written for a value of type `kind`; `plural` is "s" for several of them."""
    options = get_args(kind)
    if kind is types.NoneType:
        return "`null`"
    if kind == Depth:
        return f"layer{plural}"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if get_origin(kind) is dict:
        return f"mapping of {' to '.join('name' if option is str else in_words(option) for option in options)}"
    if get_origin(kind) is tuple:
        count = "" if options[-1] is Ellipsis else f"{len(options)} "
        return f"list of {count}{in_words(options[0], 's')}"
    if options:  # of a union
        if set(get_args(Depth)) < set(options):
            options = (Depth, *(option for option in options if option not in get_args(Depth)))
        return " or ".join(map(in_words, options))
    if dataclasses.is_dataclass(kind):
        return f"{kind.__name__.removesuffix('Config').lower()}{plural}"
    return f"{WORDS[kind]}{plural}"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "to be given"
    text = text_of(value)
    return f"default `{text if text.isprintable() else json.dumps(text)}`"


if __name__ == "__main__":
    os.environ.pop("CHARLM_CACHE", None)  # the page is for everyone
    print(page(), end="")
