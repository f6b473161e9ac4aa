"""The runs that a page shows, and the models of their checkpoints."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from charlm.config import Config, UserError
from charlm.data.corpus import Corpus, prepared_corpus
from charlm.lens.lens import Lens
from charlm.objective.terms import build_terms
from charlm.report.metrics import short_names
from charlm.report.page.tables import differences
from charlm.runs.checkpoints import checkpoint_folders
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.text import visible

MOST_HELD = 2
"""Models in memory at a time."""
MAX_TEXT, MAX_LENGTH = 100_000, 2_000
"""Symbols of a text, and of what is written after it."""


class Runs:
    """Up to two runs, or exported models, whose best checkpoints are loaded at once and others when needed."""

    def __init__(self, paths: Sequence[Path | str], device: torch.device | str | None = None):
        """Raises UserError if a path is no run or model, or a file is damaged."""
        self.paths, self.device = list(paths), device
        self.held: OrderedDict[tuple[int, str], Lens] = OrderedDict()
        best = [Lens(load(path, "best", device)) for path in self.paths]
        self.best = [str(lens.trained.step) for lens in best]
        self.held |= dict(zip(enumerate(self.best), best, strict=True))
        self.configs = [lens.trained.config for lens in best]
        self.corpora = [prepared_corpus(config.data) for config in self.configs]

    def lens(self, run: int = 0, checkpoint: str | None = None) -> Lens:
        """The lens of a checkpoint, by its step, or of the best one. Raises UserError if there is none."""
        if run >= len(self.paths):
            raise UserError(f"run={run}: there are {len(self.paths)}; count from 0", "run")
        key = run, checkpoint or self.best[run]
        if key not in self.held:
            while len(self.held) >= MOST_HELD:  # before another is loaded
                self.held.popitem(last=False)
            self.held[key] = Lens(load(self.paths[run], key[1], self.device))
        self.held.move_to_end(key)
        return self.held[key]

    def corpus(self, run: int) -> Corpus:
        """The run's corpus, if it is prepared; else UserError."""
        if (corpus := self.corpora[run] if run < len(self.corpora) else None) is None:
            raise UserError(f"run={run}: has no prepared corpus here; scripts/prepare.py makes it", "run")
        return corpus

    def facts(self, live: bool) -> dict[str, Any]:
        """What a page needs to know before it reads a text, JSON-able; `live` pages have a server."""
        names = short_names(list(map(Path, self.paths)))
        table = differences(self.configs) if len(self.paths) > 1 else []
        return {
            "runs": [self._facts(run, name) for run, name in enumerate(names)],
            "differs": [[option, *values] for option, values in table],
            "limits": {"text": MAX_TEXT, "length": MAX_LENGTH},
            "live": live,
            "corpus": any(self.corpora),
        }

    def _facts(self, run: int, name: str) -> dict[str, Any]:
        lens = self.lens(run)
        model = lens.config
        folders = checkpoint_folders(Run(self.paths[run]))
        steps = folders if int(self.best[run]) in folders else [int(self.best[run])]
        return {
            "name": name,
            "checkpoint": self.best[run],
            "checkpoints": [{"name": str(step), "step": step} for step in steps],
            "context_length": model.context_length,
            "stride": lens.stride,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "d_ff": model.d_ff,
            "heads": lens.heads.pairs,
            "silent": silent(Run(self.paths[run]), lens.trained.config),
            "ngrams": sorted(model.ngrams),
            "vocabulary": {
                "size": lens.trained.vocabulary.size,
                "names": list(map(visible, lens.trained.vocabulary.symbols)),
                "texts": list(map(_text, lens.trained.vocabulary.symbols)),
            },
            "can_draft": lens.draft is not None,
            "can_adapt": False,
            "corpus": self.corpora[run] is not None,
        }


def silent(run: Run, config: Config) -> dict[str, int]:
    """The step from which each head was not trained any more, by "layer/offset"; others are left out."""
    progress, step = max(((row.get("progress", 0.0), row["step"]) for row in run.metrics()), default=(0.0, 0))
    if not progress:
        return {}
    steps = round(step / progress)  # the config does not say how many fit into train.time
    stops: dict[str, list[float]] = {}
    for term in build_terms(config.aux, config.model.num_layers, steps):
        if term.task is None:
            stop = 1.0 if term.weight.stops_at is None else term.weight.stops_at
            stops.setdefault(f"{term.layer}/{term.offset}", []).append(stop)
    return {head: round(max(own) * steps) for head, own in stops.items() if max(own) < 1}


def _text(symbol: bytes) -> str | None:
    """A symbol as text; None for a part of a character."""
    try:
        return symbol.decode()
    except UnicodeDecodeError:
        return None
