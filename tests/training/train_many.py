"""Run `charlm.train` once per list of flags: torchrun --nproc_per_node 2 train_many.py FLAGS.json"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import charlm

if __name__ == "__main__":
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        charlm.train(charlm.load_config(overrides=flags))
