"""Steps of the real training loop on the pretended device."""

from benchmarks.pretend.device import Meter, Record, Work, pretended_gpu  # isort: skip (before torch)

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.pretend.runs import any_corpus, opened
from charlm.config import Config
from charlm.training.loop import Training


@contextmanager
def launched(processes: int) -> Iterator[None]:
    """Inside, this is the first of several processes; what they exchange has the right shape and no content."""
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
    environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, environ if processes > 1 else {}):
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        yield


@contextmanager
def metered(config: Config, processes: int = 1, lacking: bool = False) -> Iterator[tuple[Training, Meter]]:
    """A run about to make its first step, and the meter, which tells forward, backward and update apart."""
    with launched(processes), pretended_gpu(lacking) as meter, opened(config, any_corpus()) as run:
        for owner, name, phase in ((run.route, "backward", "backward"), (run.updates, "apply", "update")):
            setattr(owner, name, counted(meter, phase, getattr(owner, name)))
        yield run, meter


def counted(meter: Meter, phase: str, function: Callable) -> Callable:
    """`function`, whose work counts for a phase of its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with meter.during(phase):
            return function(*args, **kwargs)

    return call


def measure_steps(
    config: Config, at: Sequence[float] = (0.0,), log: bool = False, processes: int = 1, lacking: bool = False
) -> list[dict[str, Any]]:
    """The second of two steps at each progress: the first makes buffers. With `log`, the log's own waits, too.

    The batch is that of all `processes`, the figures are those of one.
    """
    with metered(config, processes, lacking) as (run, meter):
        run.average.update(config.train, config.train.steps)  # makes its buffers
        found = []
        for progress in at:
            run.state.step = int(progress * config.train.steps)
            for _ in range(2):
                meter.reset("forward")
                run.step()
            found.append(figures(meter.record, progress=progress, compiled=meter.compiled))
            if log:
                meter.reset("log")
                run.log()
                found[-1]["waits_of_log"] = dict(meter.record.waits)
        return found


def measure_validation(config: Config) -> dict[str, Any]:
    """The validation of a run."""
    with metered(config) as (run, meter):
        meter.reset("validation")
        with mock.patch.object(run, "save"):
            run.validate()
        return figures(meter.record)


def figures(record: Record, **others: Any) -> dict[str, Any]:
    """A record as JSON."""
    total = sum(record.work.values(), Work())
    return others | {
        "phases": {phase: vars(work) for phase, work in record.work.items()},
        "operations": {name: vars(work) for name, work in record.operations.items()},
        **vars(total),
        "peak": record.peak,
        "waits": dict(record.waits),
        "unpinned": dict(record.unpinned),
    }
