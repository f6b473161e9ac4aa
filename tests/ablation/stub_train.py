"""In place of scripts/train.py: python stub_train.py --config FILE. The learning rate chooses how it behaves."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

source = Path(sys.argv[2])
config = yaml.safe_load(source.read_text())
train, folder = config["train"], Path(config["run"]["dir"])
folder.mkdir(exist_ok=True)
shutil.copy(source, folder / "config.yaml")
(folder / "provenance.json").write_text('{"corpus": {}}')
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
attempt = source.with_suffix(".log").read_text().count("threads")
metrics = (folder / "metrics.jsonl").open("a")


def row(step: int, **more: object) -> None:
    metrics.write(json.dumps({"step": step, **more}) + "\n")
    metrics.flush()


if train["learning_rate"] == 0.666:
    print("Traceback\nerror: train.learning_rate=0.666: number of the beast\nsecond line\n")
    sys.exit(2)
if train["learning_rate"] == 0.25 and attempt == 1:  # waits for SIGTERM, the first time
    saved = []
    signal.signal(signal.SIGTERM, lambda *_: saved.append(1))
    row(1, characters_per_second=100.0)
    while not saved:
        time.sleep(0.02)
    row(2, characters_per_second=100.0)
    sys.exit(0)
if train["learning_rate"] == 0.75:
    os.kill(os.getpid(), signal.SIGKILL)
for step in range(1, train["steps"] + 1):
    row(step, characters_per_second=64.0 * step)
bits = 2 + train["learning_rate"] + train["seed"] / 100
row(train["steps"], valid={"bits_per_character": bits, "bits_per_byte": bits - 1})
