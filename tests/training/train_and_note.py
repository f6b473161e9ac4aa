"""Train with flags, and note every window: torchrun --nproc_per_node 2 train_and_note.py NOTES STOPS FLAGS

STOPS are the numbers of steps, with commas, after which the run is asked to stop; it goes on at once. Each process adds
[step, ids] of its windows to NOTES/RANK.jsonl, in order.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import charlm
from charlm.config import Stopped
from charlm.objective.objective import Objective
from charlm.training.loop import Training

NOTES, STOPS = Path(sys.argv[1]), [int(step) for step in sys.argv[2].split(",") if step]


class Noted(Training):
    """Training whose windows are noted, and which is asked to stop."""

    def step(self) -> None:
        forward = Objective.forward

        def noted(objective, windows_BW, *more):
            with (NOTES / f"{self.accelerator.process_index}.jsonl").open("a") as file:
                for ids in windows_BW.tolist():
                    print(json.dumps([self.state.step, ids]), file=file)
            return forward(objective, windows_BW, *more)

        Objective.forward = noted
        super().step()
        Objective.forward = forward
        if self.state.step in STOPS and self.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    for _ in range(len(STOPS) + 1):
        with suppress(Stopped):
            charlm.train(charlm.load_config(overrides=sys.argv[3:]), Noted)
