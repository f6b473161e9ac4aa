"""Graphs of compiled blocks while windows change their length, on the CPU, with a backend that only counts."""

from typing import Any
from unittest import mock

import torch
import torch._dynamo as dynamo

from benchmarks.pretend.runs import any_corpus, opened
from charlm.config import Config

ROUNDS = 2


def measure_graphs(config: Config) -> dict[str, Any]:
    """New graphs at each event of a run whose blocks are compiled, and the breaks by their reasons.

    An event is repeated, since a compiler that has met two lengths may take the third for a variable.
    """
    compiled, graphs = torch.compile, []

    def counting(module: torch.fx.GraphModule, _: list) -> Any:
        graphs.append(module)
        return module.forward

    def compile_counted(*args: Any, **options: Any) -> Any:
        return compiled(*args, **(options | {"backend": counting}))

    dynamo.reset()
    dynamo.utils.counters.clear()
    with mock.patch("torch.compile", compile_counted), opened(config, any_corpus()) as run:
        grown = int(config.train.full_context_from * config.train.steps)
        events = {"short windows": (0, run.step), "full windows": (grown, run.step)}
        events["validation"] = grown, run.validate
        found = {}
        for turn in range(ROUNDS):
            for name, (step, act) in events.items():
                run.state.step = step
                for time in range(2):
                    before = len(graphs)
                    with mock.patch.object(run, "save"):
                        act()
                    found[f"{name}, turn {turn + 1}, time {time + 1}"] = len(graphs) - before
        reasons = dynamo.utils.counters["graph_break"].items()
        breaks = {reason.splitlines()[0]: count for reason, count in reasons}
        return {"new_graphs": found, "breaks": breaks, "compiled": len(graphs)}
