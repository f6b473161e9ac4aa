#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Train a model: python scripts/train.py --config configs/demo.yaml [--section.field=value ...]

For a GPU or several processes: accelerate launch --config_file configs/accelerate/FILE.yaml scripts/train.py ...
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns about looking for unused parameters

import charlm
from charlm import cli
from charlm.process import keep_freed_memory
from charlm.text import command, say

PROMPTS = (r"(?<=\s)[^\W\d_]\w*(?: \w+)?", r"\w+", r"[^\s\ufffd-]")
"""Patterns of prompts, the best first: two words, any word, any sign."""
SEARCHED = 20_000
"""Symbols that are searched for a prompt."""


class Options(cli.WithConfig):
    """Train a deep character-level Transformer. The run is kept in run.dir."""


def main() -> None:
    config = cli.parse(Options).config
    keep_freed_memory()
    run = charlm.train_and_report(config)
    if cli.is_main_process():
        say("Next:", command("evaluate.py", run))
        if prompt := example_prompt(charlm.load_config(run / "config.yaml")):
            say("     ", command("generate.py", run, "--prompt", prompt))


def example_prompt(config: charlm.Config) -> str | None:
    """Some words of the run's validation split that can be typed and fit the context."""
    from charlm.data.corpus import prepared_corpus  # not before --help and mistakes were answered

    if (corpus := prepared_corpus(config.data)) is None:
        return None
    text = corpus.vocabulary.decode(corpus.splits["valid"].ids[:SEARCHED]).decode(errors="replace")
    for pattern in PROMPTS:
        for found in re.finditer(pattern, text):
            prompt = found[0]
            while len(corpus.vocabulary.encode(prompt.encode())) > config.model.context_length:
                prompt = prompt[:-1]
            if prompt and prompt.isprintable():
                return prompt
    return None


if __name__ == "__main__":
    cli.script(main)
