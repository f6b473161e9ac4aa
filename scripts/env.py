# PYTHON_ARGCOMPLETE_OK
"""Show versions and devices, for a report of a bug: python scripts/env.py"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section, TrainConfig
from charlm.text import say

VARIABLES = (
    *("CHARLM_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "HF_HOME", "HF_HUB_OFFLINE"),
    *("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND"),
)
"""Variables of the environment that change what charlm does."""


class Options(Section):
    """Show versions, devices and settings of this machine, for a report of a bug."""

    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document."""


def main() -> None:
    options = cli.parse(Options)
    import psutil  # not before --help and mistakes were answered
    import torch

    from charlm.hardware import default_device
    from charlm.runs.folder import environment
    from charlm.training.device import choose_precision

    found = {"charlm": charlm.__version__} | environment() | {"platform": platform.platform(), "python": sys.executable}
    found["machine"]["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    found["machine"]["threads"] = torch.get_num_threads()
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        capability = f"capability {device.major}.{device.minor}"
        found["machine"][f"GPU {number}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB, {capability}"
    found["machine"]["device"] = default_device().type
    found["versions"] |= {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found["precision"] = "{} ({})".format(*choose_precision(TrainConfig()))
    found["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if options.as_json:
        say(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        lines = value.items() if isinstance(value, dict) else [("", value)]
        say(f"{name}:", *(f"{key} {one}".strip() for key, one in lines), sep="\n  " if isinstance(value, dict) else " ")


if __name__ == "__main__":
    cli.script(main)
