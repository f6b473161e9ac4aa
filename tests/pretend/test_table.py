"""The tables' own arithmetic, on made-up measurements."""

import pytest
from benchmarks.pretend import table

from tiny import table_cells


@pytest.fixture
def measured(monkeypatch):
    """Every step: 1,000 kernels in each phase, 0.1 s on the device, or 0.01 s while windows are short."""

    def measure(task: str, **request) -> dict | list[dict]:
        names = ("forward", "backward", "update") if task == "steps" else ("validation",)
        phases = {name: {"kernels": 1000} for name in names}
        seconds = 0.01 if request.get("at") == [0.0] and request["configs"] == [table.FAST] else 0.1
        found = {"phases": phases, "kernels": 3000, "seconds": seconds, "moved": 10**9, "flops": 4945 * 10**10}
        found |= {"peak": 2**30, "waits": {"a": 2, "b": 1}, "unpinned": {}}
        return [found] if task == "steps" else found

    table.step.cache_clear()
    monkeypatch.setattr(table, "measure", measure)
    yield
    table.step.cache_clear()


def test_arithmetic(measured):
    """Guards against a step that takes the shorter of device and host, and a run's time without its parts."""
    host = (19 + 12 + 5.5) / 1000
    assert table.host_seconds(table.step("T12 batch 16")) == pytest.approx(host)
    assert table.characters_per_second("T12 batch 16") == pytest.approx(16 * 512 / 0.1005)
    assert table.utilisation("T12 batch 64") == pytest.approx(0.05 / 0.1005)
    # 2,400 steps of short windows, bound by the host, 5,600 of full ones, and ten validations
    expected = 2400 * (host + 0.0005) + 5600 * 0.1005 + 10 * 0.1
    assert table.minutes("enwik8_fast") == pytest.approx(expected / 60)


def test_tables(measured):
    """Guards against a case or a target that the tables leave out."""
    heard = []
    cells = table_cells(table.to_markdown(table.document(heard.append)))
    assert len(cells) == 2 + len(table.TARGETS) + 2 + len(table.CASES)
    assert ["T64: kernels of one update", "1,000", "150", "60"] in cells
    assert len(heard) == len(table.TARGETS) + len(table.CASES)
