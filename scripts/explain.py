# PYTHON_ARGCOMPLETE_OK
"""Show what a configuration means, before anything is trained.

python scripts/explain.py --config configs/enwik8_t12.yaml --aux.layers.enabled=false
python scripts/explain.py --config configs/text8_t64.yaml --json --picture weights.png
python scripts/explain.py --config configs/enwik8_t64.yaml --on h100 --processes 8 --price 2.5
"""

import json
import sys
from bisect import bisect_right
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli
from charlm.config import Config, UserError, steps_of
from charlm.config.types import Count, Positive, seconds_of
from charlm.files import OutputPath
from charlm.text import say


class Device(NamedTuple):
    """An accelerator, by its data sheet."""

    memory: float
    """GB."""
    matrix_rate: float
    """TFLOP/s of dense products in bf16."""
    bandwidth: float
    """TB/s."""


DEVICES = {
    "h100": Device(80, 989, 3.35),
    "h200": Device(141, 989, 4.8),
    "a100": Device(80, 312, 2.04),
    "l4": Device(24, 121, 0.3),
    "4090": Device(24, 165, 1.01),
    "m-series": Device(36, 28, 0.4),
}
"""SXM of data centres; an M3 Max of 48 GB, of which a GPU may take three quarters."""
USABLE, RATE, BANDWIDTH = 0.95, 0.6, 0.85
"""Shares of the data sheet's figures."""
LAUNCHES, HEADS_LAUNCHES, BETWEEN = 1.2e-3, 0.25e-3, 0.5e-3
"""Seconds of the host: of a block, of the heads of a layer, and of a step."""
MOST = 2**20
"""Windows of a micro-batch."""
ASSUMPTIONS = {
    "- memory": f"by arithmetic; {1 - USABLE:.0%} of a device are lost to fragmentation",
    "- speed": f"{RATE:.0%} of the matrix rate, {BANDWIDTH:.0%} of the bandwidth; the host launches a",
    "-": f"block in {LAUNCHES * 1e3:g} ms and a layer's heads in {HEADS_LAUNCHES * 1e3:g}; blocks not compiled,",
    "- -": "exchange between devices hidden; all losses stay on; never checked on a GPU",
    "- run": "with validations; without start, checkpoints and failures",
}


class Options(cli.WithConfig):
    """Show the table of terms, the parameters and the FLOPs of a configuration, and what it would take on GPUs."""

    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document."""
    picture: OutputPath | None = None
    """Also draw the weights over training into this file (.png, .svg, .pdf)."""
    on: Literal["h100", "h200", "a100", "l4", "4090", "m-series"] | None = None
    """Predict memory, speed and time on this device, which need not be here."""
    memory: Positive | None = None
    """GB of the device. With matrix_rate and bandwidth it describes one that has no name here."""
    matrix_rate: Positive | None = None
    """TFLOP/s of the device's dense matrix products in bf16."""
    bandwidth: Positive | None = None
    """TB/s of the device's memory."""
    processes: Count = 1
    """Devices, a process each."""
    price: Positive | None = None
    """Price of a device for an hour."""

    def device(self) -> Device | None:
        """The device to predict for. Raises UserError if a part of its description is missing."""
        given = {name: getattr(self, name) for name in Device._fields}
        known = DEVICES[self.on]._asdict() if self.on else {}
        described = known | {name: value for name, value in given.items() if value is not None}
        if not described and self.processes == 1 and self.price is None:
            return None
        for name in Device._fields:
            if name not in described:
                raise UserError(f"{name}: is missing; give it, or name a device with --on", name)
        return Device(**described)


def main() -> None:
    options = cli.parse(Options)
    device = options.device()
    from charlm.data.sources import check_outside
    from charlm.report.explain import explain
    from charlm.report.figures import weights
    from charlm.report.style import PICTURE, save
    from charlm.training.origin import resolved

    config = resolved(options.config, continues=False)
    explanation = explain(config)
    predicted = {} if device is None else predict(config, device, options.processes, options.price)
    if options.picture is not None:
        check_outside(config.data, "picture", options.picture)
        save(weights(config, PICTURE), options.picture)
    if options.as_json:
        say(json.dumps(explanation.to_dict() | ({"prediction": predicted} if predicted else {}), indent=2))
    else:
        sys.stdout.reconfigure(errors="replace")  # bars keep their width
        say("\n\n".join([explanation.to_text(), *([to_text(predicted)] if predicted else [])]))


def predict(config: Config, device: Device, processes: int = 1, price: float | None = None) -> dict[str, Any]:
    """What the run would take. Pairs are without and with activation checkpointing.

    Raises:
        UserError: not one window fits into a device.
    """
    from charlm.data.windows import default_stride
    from charlm.objective.count import step_memory
    from charlm.report.explain import meta_objective

    train, context = config.train, config.model.context_length
    objective, _ = meta_objective(config)
    settings = [config.replace(train=train.replace(activation_checkpointing=on)) for on in (False, True)]
    own = -(-train.batch_size // processes)
    asked = train.micro_batch_size if isinstance(train.micro_batch_size, int) else own

    def peak(windows: int, setting: Config) -> int:
        return step_memory(setting, objective, windows, processes)

    room, sizes = USABLE * device.memory * 1e9, range(1, MOST)
    largest = [bisect_right(sizes, room, key=partial(peak, setting=setting)) for setting in settings]
    windows = min(own, asked, largest[train.activation_checkpointing])
    if windows == 0:
        way_out = "use train.activation_checkpointing=true, train.sharding=fsdp2 or a smaller model"
        raise UserError(f"memory={device.memory:g}: not one window fits into a device; {way_out}", "memory")
    on_device, on_host = step_seconds(config, objective, device, own, passes=-(-own // windows))
    speed = processes * own * context / (max(on_device, on_host) + BETWEEN)
    if train.time is not None:
        seconds = float(seconds_of(train.time))
    else:
        validations = train.steps // steps_of(train.valid_every, train.planned)
        # A forward pass is a third of the work; each process scores the whole.
        scored = validations * train.valid_symbols * context / default_stride(context) * processes / 3
        seconds = (train.steps * train.batch_size * context + scored) / speed
    return {
        "processes": processes,
        "device": device._asdict(),
        "windows_at_once": windows,
        "peak_bytes": [peak(windows, setting) for setting in settings],
        "largest_micro_batch": largest,
        "characters_per_second": speed,
        "bound_by": "device" if on_device > on_host else "host",
        "days": seconds / 86400,
        "money": None if price is None else price * processes * seconds / 3600,
        "assumptions": list(ASSUMPTIONS.values()),
    }


def step_seconds(config: Config, objective: Any, device: Device, windows: int, passes: int = 1) -> tuple[float, float]:
    """Seconds of a step of a process's windows: those of the device, and those of the host."""
    from charlm.objective.count import step_work

    flops, moved = step_work(config, objective, windows * config.model.context_length)
    on_device = flops / (RATE * device.matrix_rate * 1e12) + moved / (BANDWIDTH * device.bandwidth * 1e12)
    exits = len(objective.active_rows(0.0))
    on_host = config.model.num_layers * LAUNCHES + exits * HEADS_LAUNCHES
    return on_device, passes * on_host * (4 / 3 if config.train.activation_checkpointing else 1)


def to_text(predicted: dict[str, Any]) -> str:
    """A prediction, for people."""
    memory = [f"{size / 2**30:.2f} GiB" for size in predicted["peak_bytes"]]
    windows = [f"{count:,}" for count in predicted["largest_micro_batch"]]
    days = predicted["days"]
    money = "" if predicted["money"] is None else f", for {predicted['money']:,.2f}"
    lines = {
        "devices": "{}, each of {memory:g} GB, {matrix_rate:g} TFLOP/s, {bandwidth:g} TB/s".format(
            predicted["processes"], **predicted["device"]
        ),
        "peak memory": f"{memory[0]} of each, {memory[1]} checkpointed, {predicted['windows_at_once']} windows at once",
        "largest micro-batch": f"{windows[0]} windows, {windows[1]} checkpointed",
        "speed": f"{predicted['characters_per_second']:,.0f} characters/s, bound by the {predicted['bound_by']}",
        "whole run": (f"{days:.3g} days" if days >= 1 else f"{24 * days:.3g} hours") + money,
    }
    return "\n".join(f"{name.replace('- -', '-'):<20} {text}" for name, text in (lines | ASSUMPTIONS).items())


if __name__ == "__main__":
    cli.script(main)
