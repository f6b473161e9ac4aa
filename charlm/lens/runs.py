"""The runs that a page shows, and the models of their checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from charlm.config import UserError
from charlm.data.corpus import Corpus, prepared_corpus
from charlm.lens.lens import Lens
from charlm.report.explain import silent_from
from charlm.report.metrics import short_names
from charlm.report.page.tables import differences
from charlm.runs.checkpoints import checkpoint_folders
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.text import visible

MOST_HELD = 2
"""Models in memory at a time."""
MAX_TEXT, MAX_LENGTH = 100_000, 2_000
"""Characters of a text, and symbols of what is written after it."""


class Runs:
    """Up to two runs, or exported models: the best checkpoints are loaded at once, others when needed."""

    def __init__(self, paths: Sequence[Path | str], device: torch.device | str | None = None):
        """Raises UserError if a path is no run or model, or a file is damaged."""
        self.paths, self.device = list(paths), device
        self.watch: Callable[[], None] = lambda: None
        """That of every lens, see `Lens`."""
        best = [self._load(path, "best") for path in self.paths]
        self.best = [str(lens.trained.step) for lens in best]
        self.held = dict(zip(enumerate(self.best), best, strict=True))
        """Lenses by run and checkpoint, the one used last at the end."""
        self.configs = [lens.trained.config for lens in best]
        self.corpora = [prepared_corpus(config.data) for config in self.configs]

    def lens(self, run: int = 0, checkpoint: str | None = None) -> Lens:
        """The lens of a checkpoint, by its step, or of the best one. Raises UserError if there is none."""
        if run >= len(self.paths):
            raise UserError(f"run={run}: there are {len(self.paths)}; count from 0", "run")
        key = run, checkpoint or self.best[run]
        lens = self.held.pop(key, None)
        while lens is None and len(self.held) >= MOST_HELD:  # before another is loaded
            self.held.pop(next(iter(self.held)))
        if lens is None:
            is_export = not checkpoint_folders(Run(self.paths[run]))
            lens = self._load(self.paths[run], "best" if is_export and key[1] == self.best[run] else key[1])
        self.held[key] = lens
        return lens

    def _load(self, path: Path | str, checkpoint: str) -> Lens:
        lens = Lens(load(path, checkpoint, self.device))
        lens.watch = lambda: self.watch()
        return lens

    def corpus(self, run: int) -> Corpus:
        """The run's corpus, if it is prepared; else UserError."""
        if (corpus := self.corpora[run] if run < len(self.corpora) else None) is None:
            raise UserError(f"run={run}: has no prepared corpus here; scripts/prepare.py makes it", "run")
        return corpus

    def facts(self, live: bool) -> dict[str, Any]:
        """What a page needs to know before it reads a text, JSON-able; `live` pages have a server."""
        runs, names = [], short_names(list(map(Path, self.paths)))
        for place, (path, best) in enumerate(zip(self.paths, self.best, strict=True)):
            lens, steps = self.lens(place), list(checkpoint_folders(Run(path)))
            symbols = lens.trained.vocabulary.symbols
            texts = [symbol.decode("utf-8", "ignore") or None for symbol in symbols]  # None for a part of a character
            runs.append(lens.config.model_dump(include={"context_length", "num_layers", "num_heads", "d_ff", "ngrams"}))
            runs[-1] |= {
                "name": names[place],
                "checkpoint": best,
                "checkpoints": [{"name": str(step), "step": step} for step in steps or [int(best)]],
                "heads": lens.heads.pairs,
                "silent": silent_from(self.configs[place]) if steps else {},
                "vocabulary": {"size": len(symbols), "names": list(map(visible, symbols)), "texts": texts},
                "can_draft": lens.draft is not None,
                "corpus": self.corpora[place] is not None,
            }
        table = differences(self.configs) if len(self.paths) > 1 else []
        differs, limits = [[option, *values] for option, values in table], {"text": MAX_TEXT, "length": MAX_LENGTH}
        return {"runs": runs, "differs": differs, "limits": limits, "live": live, "corpus": any(self.corpora)}
