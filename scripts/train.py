#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Train a model: python scripts/train.py --config configs/demo.yaml [--section.field=value ...]

For a GPU or several processes: accelerate launch --config_file configs/accelerate/FILE.yaml scripts/train.py ...
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns about looking for unused parameters

import charlm
from charlm import cli
from charlm.process import keep_freed_memory
from charlm.text import command, say


class Options(cli.WithConfig):
    """Train a deep character-level Transformer. The run is kept in run.dir."""


def main() -> None:
    config = cli.parse(Options).config
    keep_freed_memory()
    from charlm.report.finish import example_prompt  # not before --help and mistakes were answered

    run = charlm.train_and_report(config)
    if cli.is_main_process():
        say("Next:", command("evaluate.py", run))
        if prompt := example_prompt(config):
            say("     ", command("generate.py", run, "--prompt", prompt))


if __name__ == "__main__":
    cli.script(main)
