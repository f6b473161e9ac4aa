"""The lens as one types: a key at the end, a key in the middle, and the first paint of a text.

These are the answers of its server. They include the JSON, with the sizes by gzip and xz, but not the way to the
browser and its work.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine
from charlm.config import UserError
from charlm.lens.answers import MOST_NEW, answer
from charlm.lens.runs import Runs
from charlm.text import counted, markdown_table

SYMBOLS = 2000
"""Before the first timed key."""
KEYS, PAINTS = 300, 5
"""Timed keys: more than a window moves by, so that some find the context full."""
FIRST = 256
"""Symbols that the page asks for first; then it asks for the rest."""
ROWS = {
    "a key at the end": "keystroke",
    "a key in the middle: what is near it": "middle",
    "all that follows it": "middle_whole",
    "a text: its beginning": "first_paint",
    "all of it": "whole",
}


def run(path: Path, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The seconds of each key and paint, on the clock and of the processor, for JSON.

    Raises UserError if the run's corpus is not prepared or too short."""
    runs = Runs([path], device)
    lens = runs.lens()
    ids = runs.corpus(0).splits["valid"].ids
    if len(ids) < SYMBOLS + KEYS:
        raise UserError(f"run={path}: its validation text has fewer than {SYMBOLS + KEYS:,} symbols", "run")
    texts = [
        lens.trained.vocabulary.decode(ids[:end]).decode("utf-8", "surrogateescape")
        for end in range(SYMBOLS, SYMBOLS + KEYS)
    ]
    say(
        f"{KEYS} keys at the end of {SYMBOLS:,} symbols, {PAINTS} keys in their middle, {PAINTS} first paints; {device}"
    )

    def seconds(text: str, since: int) -> list[tuple[float, float]]:
        """Until the first answer, and until the last."""
        started, found = (time.perf_counter(), time.process_time()), []
        for most in (FIRST, MOST_NEW):
            json.dumps(answer(runs, "read", {"text": text, "since": since, "most": most}))
            found.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            since += most
        return found

    seconds(texts[0], 0)  # kernels
    paints, middles, middle = [], [], len(texts[0]) // 2
    for number in range(PAINTS):
        lens.read("")
        paints.append(seconds(texts[0], 0))
        middles.append(seconds(f"{texts[0][:middle]}{number}{texts[0][middle:]}", middle))
    seconds(texts[0], 0)
    keys = [seconds(text, SYMBOLS + number)[0] for number, text in enumerate(texts[1:])]
    found = {"keystroke": keys}
    for name, whole, both in (("middle", "middle_whole", middles), ("first_paint", "whole", paints)):
        found[name], found[whole] = zip(*both, strict=True)
    model = lens.config.model_dump(include={"num_layers", "d_model", "context_length"})
    shape = {"model": model | {"heads": len(lens.heads.pairs)}, "symbols": SYMBOLS, "machine": machine(device)}
    shape |= {"threads": torch.get_num_threads()}
    return {"benchmark": "lens", "run": str(path)} | shape | {"seconds": found}


def to_markdown(found: dict[str, Any]) -> str:
    """The table, in milliseconds."""
    rows = []
    for name, key in ROWS.items():
        seconds, busy = np.array(found["seconds"][key]).T * 1000
        figures = np.median(seconds), np.quantile(seconds, 0.95), seconds.max(), np.median(busy), busy.max()
        rows.append([name, *(f"{figure:.1f}" for figure in figures)])
    model = found["model"]
    words = f"{model['num_layers']} layers of {model['d_model']}, {model['heads']} prediction heads"
    words += f", context {model['context_length']}"
    header = ["milliseconds", "median", "95 %", "most", "of the processor", "most"]
    title = f"**The lens on {found['symbols']:,} symbols** ({words})"
    threads = counted(found["threads"], "thread")
    return f"{title}\n\n{markdown_table(header, rows)}\n\n{threads}; {found['machine']}."
