"""The page in words and numbers: results, protocols, options, origins."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from charlm.config import Config, Mark, flatten, has_mark
from charlm.config import differences as differences_of
from charlm.config.errors import written
from charlm.data.windows import default_stride
from charlm.inference.evaluation import Score
from charlm.report.metrics import Metrics
from charlm.report.page.probe import Probe
from charlm.report.style import engineering

NONE = "-"


def results(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> tuple[list[str], list[list[str]]]:
    """The heads of the table, and a row for each run; columns that are empty for every run are left out."""
    rows = [_result(run, probe) for run, probe in zip(runs, probes, strict=True)]
    heads = [head for head in rows[0] if any(row[head] != NONE for row in rows)]
    return heads, [[row[head] for head in heads] for row in rows]


def _result(run: Metrics, probe: Probe | None) -> dict[str, str]:
    bits, speeds, memory = (
        values[np.isfinite(values)]
        for _, values in map(run.of_training, ("bits_per_character", "characters_per_second", "memory"))
    )
    score = probe.score if probe else None
    return {
        "steps": f"{run.step:,} of {run.config.train.steps:,}",
        "characters seen": engineering()(float(f"{run.step * run.characters_per_step:.3g}")),
        "training bpc": f"{bits[-1]:.3f}" if len(bits) else NONE,
        "best validation bpc": f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else NONE,
        "validation bpc, by this page": f"{score.bits_per_character:.4f} ± {score.standard_error or 0:.4f}"
        if score
        else NONE,
        "training time": str(timedelta(seconds=round(run.longest))) if run.longest else NONE,
        "characters/s": f"{np.median(speeds):,.0f}" if len(speeds) else NONE,
        "memory": f"{memory[-1] / 2**30:.2f} GiB" if len(memory) else NONE,
        "skipped updates": f"{len(run.skipped):,}" if run.skipped else NONE,
    }


def validations(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> str:
    """The difference between the table's two figures of the validation split."""
    own = " or ".join(sorted({validated(run) for run in runs}))
    scored = sorted({f"{probe.score.symbols:,}" for probe in probes if probe is not None and probe.score is not None})
    again = f"; this page scored the best checkpoint again, on the first {' or '.join(scored)}" if scored else ""
    return f"The best validation is the run's own, in the precision of training, on {own} symbols{again}."


def headline(run: Metrics) -> str:
    """A run in a sentence."""
    done = run.step >= run.config.train.steps
    state = f"{run.step:,} steps" if done else f"step {run.step:,} of {run.config.train.steps:,}, going on or stopped"
    if run.best is None:
        return f"{state}; not validated yet"
    return f"{state}; best validation {run.best[1]:.4f} bits per character at step {run.best[0]:,}"


def validation_protocol(run: Metrics) -> dict[str, str]:
    """The protocol of a run's own validations."""
    corpus, context_length = run.provenance["corpus"], run.config.model.context_length
    return {
        "split": "valid",
        "symbols": validated(run),
        "stride": f"{default_stride(context_length)}",
        "context": f"{context_length}",
        "precision": "that of training",
        "corpus": f"{corpus.get('name')} (SHA-256 {corpus.get('sha256')})",
    }


def page_protocol(score: Score) -> dict[str, str]:
    """The protocol of the page's own score."""
    return {
        "split": score.split,
        "symbols": f"the first {score.symbols:,}: {score.characters:,} characters, {score.bytes:,} bytes",
        "stride": f"{score.stride}",
        "context": f"{score.context_length}",
        "precision": score.precision,
        "checkpoint": score.checkpoint,
        "corpus": f"{score.corpus} (SHA-256 {score.corpus_sha256})",
    }


def origin(run: Metrics) -> dict[str, str]:
    """The code, command and machine that a run was started with."""
    command = run.provenance.get("command")
    return {
        "commit": str(run.provenance.get("git_commit") or "not recorded"),
        "versions": _pairs(run.provenance.get("versions")),
        "machine": _pairs(run.provenance.get("machine")),
        "command": " ".join(map(str, command)) if isinstance(command, list) else "not recorded",
        "folder": str(run.folder.path.resolve()),
    }


def mismatch(runs: Sequence[Metrics]) -> tuple[str, list[tuple[str, list[str]]]] | None:
    """Why the runs' bits per character do not compare, and what differs; None if they do.

    Runs of different vocabularies compare, as bits are divided by the characters of the text, but only if both
    validate on all of the split: the first symbols of two vocabularies are not the same text.
    """
    rows = {
        "text": [f"SHA-256 {str(run.provenance['corpus'].get('sha256'))[:12]}…" for run in runs],
        "splits": [_sizes(run) for run in runs],
        "vocabulary": [vocabulary(run) for run in runs],
        "validated on": [validated(run) for run in runs],
    }
    differing = [(name, values) for name, values in rows.items() if len(set(values)) > 1]
    names = {name for name, _ in differing}
    if "text" in names:
        return "These runs read different texts: their bits per character cannot be compared.", differing
    if "splits" in names:
        why = "These runs hold out different parts of one text: their bits per character cannot be compared."
        return why, differing
    if names and not all(map(_validates_all, runs)):
        return "These runs validated on different parts of the split: their validations cannot be compared.", differing
    return None


def differences(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """The options that differ between configs and affect what a run learns, with the value of each."""
    first, *others = configs
    columns = [flatten(config.model_dump(), ".") for config in configs]
    names = dict.fromkeys(name for other in others for name in differences_of(first, other))
    names = [name for name in names if not has_mark(name, Mark.NO_EFFECT)]
    return [(name, [written(column[name]) if name in column else NONE for column in columns]) for name in names]


def vocabulary(run: Metrics) -> str:
    """The vocabulary of a run."""
    record = run.provenance["corpus"].get("vocabulary")
    if not isinstance(record, dict):
        return NONE
    digest = record.get("sha256")
    return f"{record.get('name')}" + (f" (SHA-256 {str(digest)[:12]}…)" if digest else "")


def validated(run: Metrics) -> str:
    """The symbols that a run validates on."""
    whole = run.corpus_split("valid").get("symbols")
    if _validates_all(run):
        return f"all {whole:,}"
    return f"the first {run.config.train.valid_symbols:,}" + (f" of {whole:,}" if isinstance(whole, int) else "")


def _validates_all(run: Metrics) -> bool:
    whole = run.corpus_split("valid").get("symbols")
    return isinstance(whole, int) and run.config.train.valid_symbols >= whole


def _sizes(run: Metrics) -> str:
    sizes = [run.corpus_split(split).get("bytes") for split in ("train", "valid", "test")]
    return " + ".join(f"{size:,}" if isinstance(size, int) else NONE for size in sizes) + " bytes"


def _pairs(record: Any) -> str:
    if not isinstance(record, dict):
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in record.items())
