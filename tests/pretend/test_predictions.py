"""What `explain --on` predicts, against what the real loop asks of a pretended GPU."""

import pytest
import torch
from benchmarks.pretend import table
from benchmarks.pretend.guard import missing

from charlm.objective.build import build_objective
from charlm.objective.count import step_memory
from tiny import script_names

explain = script_names("explain")
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("name", table.CASES)
def test_memory_and_speed(name):
    """Guards against arithmetic that the step has outgrown: memory promised to whoever rents a GPU, and its speed."""
    case = table.CASES[name]
    config, found = case.read(), table.step(name)
    with torch.device("meta"):
        objective = build_objective(config, 256)
    assert step_memory(config, objective, case.batch, case.processes) == pytest.approx(found["peak"], rel=0.05)
    seconds = explain.step_seconds(config, objective, explain.DEVICES["h100"], case.batch)
    assert max(seconds) + explain.BETWEEN == pytest.approx(table.step_seconds(found), rel=0.45)
