"""What a page says of its runs in words and numbers: results, protocols, options, where they come from."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from charlm.config import Config
from charlm.config_files import to_yaml
from charlm.inference.evaluation import Score
from charlm.report.page.metrics import Recorded
from charlm.report.page.probe import Measured
from charlm.values import text_of

NONE = "-"
PLACES = ("run.dir", "run.resume", "run.resume_from", "run.auto_resume", "run.report", "data.cache_dir")
"""Options that say where a run is, how it was continued and shown, and make no difference to what it learns."""


def results(runs: Sequence[Recorded], measured: Sequence[Measured | None]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of the table, a row for each run; a column that no run has is left out."""
    heads = [
        "steps", "characters seen", "training bpc", "best validation bpc", "validation bpc, by this page",
        "training time", "characters/s", "memory", "skipped updates",
    ]  # fmt: skip
    rows = [_result(run, own) for run, own in zip(runs, measured, strict=True)]
    kept = [place for place in range(len(heads)) if any(row[place] != NONE for row in rows)]
    return [heads[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _result(run: Recorded, measured: Measured | None) -> list[str]:
    bits = _last(run.of_training("bits_per_character")[1])
    speeds = run.of_training("characters_per_second")[1]
    memory = _last(run.of_training("memory")[1])
    seconds = max([*run.seconds(run.train), *run.seconds(run.valid)], default=float("nan"), key=np.nan_to_num)
    score = measured.score if measured else None
    return [
        f"{run.step:,} of {run.config.train.steps:,}",
        _short(run.step * run.characters_per_step),
        NONE if bits is None else f"{bits:.3f}",
        f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else NONE,
        NONE if score is None else f"{score.bits_per_character:.4f} ± {score.standard_error or 0:.4f}",
        duration(seconds) if seconds == seconds else NONE,
        f"{statistics.median(speeds[np.isfinite(speeds)]):,.0f}" if np.isfinite(speeds).any() else NONE,
        NONE if memory is None else f"{memory / 2**30:.2f} GiB",
        f"{run.num_skipped:,}" if run.num_skipped else NONE,
    ]


def validations(runs: Sequence[Recorded], measured: Sequence[Measured | None]) -> str:
    """What tells the table's two figures of the validation split apart."""
    own = " or ".join(sorted({_validated(run) for run in runs}))
    scored = sorted({f"{each.score.symbols:,}" for each in measured if each is not None and each.score is not None})
    again = f"; this page scored the best checkpoint once more, on the first {' or '.join(scored)}" if scored else ""
    return f"The best validation is the run's own, in the precision of training, on {own} symbols{again}."


def headline(run: Recorded) -> str:
    """A run in a sentence."""
    done = run.step >= run.config.train.steps
    state = f"{run.step:,} steps" if done else f"step {run.step:,} of {run.config.train.steps:,}, going on or stopped"
    if run.best is None:
        return f"{state}; not validated yet"
    return f"{state}; best validation {run.best[1]:.4f} bits per character at step {run.best[0]:,}"


def validation_protocol(run: Recorded) -> list[tuple[str, str]]:
    """How a run was validated: what its curve and its best figure mean."""
    corpus = run.provenance["corpus"]
    return [
        ("split", "valid"),
        ("symbols", _validated(run)),
        ("stride", f"{max(1, run.config.model.context_length // 2)}"),
        ("context", f"{run.config.model.context_length}"),
        ("precision", "that of training"),
        ("corpus", f"{corpus.get('name')} (SHA-256 {corpus.get('sha256')})"),
    ]


def page_protocol(score: Score) -> list[tuple[str, str]]:
    """How a page scored the validation split."""
    return [
        ("split", score.split),
        ("symbols", f"the first {score.symbols:,}: {score.characters:,} characters, {score.bytes:,} bytes"),
        ("stride", f"{score.stride}"),
        ("context", f"{score.context_length}"),
        ("precision", score.precision),
        ("checkpoint", score.checkpoint),
        ("corpus", f"{score.corpus} (SHA-256 {score.corpus_sha256})"),
    ]


def origin(run: Recorded) -> list[tuple[str, str]]:
    """Versions, commit, command and machine that a run was started with."""
    record = run.provenance
    versions, machine, command = (record.get(name) for name in ("versions", "machine", "command"))
    return [
        ("commit", str(record.get("git_commit") or "not recorded")),
        ("versions", _pairs(versions)),
        ("machine", _pairs(machine)),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else "not recorded"),
        ("folder", str(run.run.path.resolve())),
    ]


def mismatch(runs: Sequence[Recorded]) -> tuple[str, list[tuple[str, list[str]]]] | None:
    """Why bits per character of runs do not compare, and what differs between them; None where they do.

    Vocabularies may differ, as it is the characters of the text that bits are divided by; but then the first so many
    symbols are not the same text.
    """
    described = [("text", _text), ("splits", _splits), ("vocabulary", vocabulary), ("validated on", _validated)]
    rows = [(name, [describe(run) for run in runs]) for name, describe in described]
    scored = {"all" if _validates_all(run) else (vocabulary(run), _validated(run)) for run in runs}
    if len({str(run.provenance["corpus"].get("sha256")) for run in runs}) > 1:
        why = "These runs read different texts: their bits per character cannot be compared."
    elif len({_splits(run) for run in runs}) > 1:
        why = "These runs hold out different parts of one text: their bits per character cannot be compared."
    elif len(scored) > 1:
        why = "These runs validated on different parts of the split: their validations cannot be compared."
    else:
        return None
    return why, [(name, values) for name, values in rows if len(set(values)) > 1]


def options(config: Config) -> dict[str, str]:
    """Every option of a config by its dotted name."""
    return _flat(yaml.safe_load(to_yaml(config)))


def differences(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """What differs between configs: an option, and its value in each of them. Places on disk are left out."""
    columns = [options(config) for config in configs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, NONE) for column in columns]) for name in names if name not in PLACES]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def duration(seconds: float) -> str:
    """Such as 1 h 03 min, 4 min 10 s, 12 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def vocabulary(run: Recorded) -> str:
    """What symbols a run reads."""
    record = run.provenance["corpus"].get("vocabulary")
    if not isinstance(record, dict):
        return NONE
    digest = record.get("sha256")
    return f"{record.get('name')}" + (f" (SHA-256 {str(digest)[:12]}…)" if digest else "")


def _text(run: Recorded) -> str:
    corpus = run.provenance["corpus"]
    return f"{corpus.get('name')} (SHA-256 {str(corpus.get('sha256'))[:12]}…)"


def _splits(run: Recorded) -> str:
    sizes = [run.corpus_split(name).get("bytes") for name in ("train", "valid", "test")]
    return " + ".join(f"{size:,}" if isinstance(size, int) else NONE for size in sizes) + " bytes"


def _validates_all(run: Recorded) -> bool:
    whole = run.corpus_split("valid").get("symbols")
    return isinstance(whole, int) and run.config.train.valid_symbols >= whole


def _validated(run: Recorded) -> str:
    whole = run.corpus_split("valid").get("symbols")
    if _validates_all(run):
        return f"all {whole:,}"
    return f"the first {run.config.train.valid_symbols:,}" + (f" of {whole:,}" if isinstance(whole, int) else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = text_of(value)
    return flat


def _pairs(record: Any) -> str:
    if not isinstance(record, dict):
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in record.items())


def _last(values: np.ndarray) -> float | None:
    found = values[np.isfinite(values)]
    return float(found[-1]) if len(found) else None


def _short(count: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"
