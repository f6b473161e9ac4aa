"""Run `charlm.train` once per list of flags: torchrun --nproc_per_node 2 train_many.py FLAGS.json

Fails if a thread of a process group outlives it: at the end of Python such a thread can abort the process.
"""

import atexit
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import charlm
from launched import register_documented_task


def check_threads() -> None:
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    left = [name for name in names if "gloo" in name]
    if left:
        print("threads left:", *left, file=sys.stderr, flush=True)
        os._exit(3)


if __name__ == "__main__":
    atexit.register(check_threads)  # runs after what training registers
    register_documented_task(Path(sys.argv[1]).parent)
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        charlm.train(charlm.load_config(overrides=flags))
