"""Train with flags, and let one process be killed once, half-way: torchrun --nproc_per_node 2 train_and_die.py FLAGS"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import charlm
from charlm import cli
from charlm.objective.objective import Objective


def die_half_way(forward):
    def dying(self, windows_BW, progress, layers):
        if progress >= 0.5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, windows_BW, progress, layers)

    return dying


if __name__ == "__main__":
    Objective.forward = die_half_way(Objective.forward)
    cli.script(lambda: charlm.train(charlm.load_config(overrides=sys.argv[1:])))
