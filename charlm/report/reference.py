"""The page of every configuration option: python -m charlm.report.reference > docs/configuration.md

Texts are the docstrings of the fields, which `--help` prints, too; types and limits come from the JSON schema.
"""

import inspect
import os
from collections.abc import Iterator

from charlm.config import Config, Section
from charlm.config.load import sections_of
from charlm.config.wording import in_words, members_of, shown

INTRODUCTION = """\
<!-- written by: python -m charlm.report.reference > docs/configuration.md -->

# Configuration

This page lists every option with its possible values and its default. `python scripts/train.py --help` prints the same
texts; with a `--config` it shows that file's values as the defaults. Before anything runs,
`python scripts/explain.py --config configs/demo.yaml` shows the losses, parameters and arithmetic that result.

Set an option in a YAML file, or with a flag of `scripts/train.py`, `explain.py`, `prepare.py` or `ablate.py`:

```yaml
model:
  num_layers: 12
  ngrams: [2, 3, 4]
aux.layers.enabled: false     # dots work like indentation
train: {steps: 1e5, micro_batch_size: null}
```

```sh
python scripts/explain.py --config configs/enwik8_t12.yaml --model.num_layers=6 --aux.layers.enabled=false
python scripts/explain.py --config configs/demo.yaml --config configs/methods/keras.yaml --aux.layers.at="[1/3, 2/3]"
```

- A file holds only the options that differ from the defaults. If you give several `--config`, later files win over
  earlier ones, option by option. Flags always win over files. `reset: true` in a section of a file drops what earlier
  files set there.
- Write `true` and `false` in full: `--run.resume=true`. Whole numbers may be written `100_000` or `1e5`. `null`, `none`
  and `~` mean no value. A path is relative to the folder in which you type the command.
- Lists and mappings are YAML; quote them for the shell: `"--model.ngrams=[2, 3, 4]"`,
  `--aux.layers.weights="{4: 0.3}"`. A list may omit its brackets: `--model.ngrams=2,3,4`. A layer is its number (1 is
  the lowest) or a fraction of the depth, `1/3` or `0.5`; `1.0` is the last layer.
- *Progress* is the number of completed optimizer steps divided by `train.steps`, from 0 to 1.
- An option that cannot work ends the command before anything is computed. One message names the option, its value, a
  way out, and the file and line that it comes from. For a wrong name it suggests similar ones.
- A run keeps its resolved options in `RUN/config.yaml`, which you can use with `--config` like any other file.

From Python: `charlm.load_config("configs/demo.yaml", {"train.steps": 60})`.
"""


def page(config: type[Section] = Config) -> str:
    """The Markdown of all sections, each with its options; a section's own sections follow it."""
    sections = [_section(name, kind) for name, kind in sections_of(config).items() if name]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, kind: type[Section]) -> str:
    return "\n".join([f"## {name}", "", inspect.getdoc(kind), "", *_entries(kind, f"{name}."), ""])


def _entries(kind: type[Section], prefix: str, indent: str = "") -> Iterator[str]:
    """An entry for each field; below it, indented, those of the records in its lists and mappings."""
    schemas = kind.model_json_schema()["properties"]
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            continue
        default = f"default `{shown(info.get_default(call_default_factory=True))}`"
        text = info.description.replace("\n", f"\n{indent}  ")
        yield f"{indent}- **`{prefix}{name}`**: `{in_words(schemas[name])}`; " + (
            f"required.\n{indent}  {text}" if info.is_required() else f"{default}.\n{indent}  {text}"
        )
        for record in _records(info.annotation):
            yield from _entries(record, "", f"{indent}  ")


def _records(annotation: object) -> Iterator[type[Section]]:
    """The sections among the parts of a list or a mapping."""
    for part in getattr(annotation, "__args__", ()):
        for member in members_of(part):
            if isinstance(member, type) and issubclass(member, Section):
                yield member


if __name__ == "__main__":
    os.environ.pop("CHARLM_CACHE", None)  # the page is for everyone
    print(page(), end="")
