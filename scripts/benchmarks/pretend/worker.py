"""A process that measures one thing on the pretended device: JSON in by its argument, JSON out.

A process of its own, because the guard must be loaded before torch, and torch's patches must not reach anything else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION")
"""Variables that would choose another device or precision."""


class Refused(Exception):
    """The measured program failed on the pretended device, as it would on a real one."""


def run(*arguments: str) -> str:
    """The standard output of Python in a new process that knows this folder's packages.

    Raises:
        Refused: with the end of the program's own message.
    """
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    for name in LAUNCHER:
        environ.pop(name, None)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environ)
    if done.returncode:
        raise Refused(done.stderr[-3000:])
    return done.stdout


def measure(task: str, **options: Any) -> Any:
    """The answer of a new process to a task of `main`.

    Raises:
        Refused: with the end of the program's own message.
    """
    output = run("-m", "benchmarks.pretend.worker", task, json.dumps(options))
    return json.loads(output.splitlines()[-1])


def main(task: str, options: dict[str, Any]) -> Any:
    """Measure."""
    from charlm.config.load import load_config

    config = load_config([ROOT / "configs" / name for name in options.pop("configs")], options.pop("set", {}))
    if task == "graphs":
        from benchmarks.pretend import graphs

        return graphs.measure_graphs(config, **options)
    if task == "inference":
        from benchmarks.pretend import inference

        return inference.measure_inference(config, **options)
    from benchmarks.pretend import training

    return {"steps": training.measure_steps, "validation": training.measure_validation}[task](config, **options)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
