"""The page in words and numbers: results, protocols, options, origins."""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np

from charlm.config import Config, Mark, flatten, has_mark
from charlm.config import differences as differences_of
from charlm.config.errors import shown
from charlm.data.windows import default_stride
from charlm.report.metrics import Metrics, number
from charlm.report.page.probe import Probe
from charlm.report.style import engineering

NONE = "-"
Table = list[tuple[str, list[str]]]  # names of rows, and their values for each run


def results(runs: Sequence[Metrics], probes: Sequence[Probe]) -> list[dict[str, str]]:
    """The row of each run, by column; columns without any value are left out."""
    rows = [_result(run, probe) for run, probe in zip(runs, probes, strict=True)]
    filled = [name for name in rows[0] if any(row[name] != NONE for row in rows)]
    return [{name: row[name] for name in filled} for row in rows]


def protocols(run: Metrics, probe: Probe) -> dict[str, dict[str, str]]:
    """How the run was validated, by itself and by this page, and its origin."""
    record = run.provenance
    context_length = run.config.model.context_length
    found = {
        "Validation": {
            "split": "valid",
            "symbols": validated(run),
            "stride": str(default_stride(context_length)),
            "context": str(context_length),
            "precision": "that of training",
            "corpus": f"{record.get('corpus/name')} (SHA-256 {record.get('corpus/sha256')})",
        }
    }
    for (name, source), share in zip(run.config.data.mixture.items(), run.config.data.shares, strict=False):
        origin = f"{source.corpus} (SHA-256 {record.get(f'corpus/sources/{name}/sha256')})"
        _, bits = run.points(f"valid/bits_per_character/{name}")
        newest = "".join(f", {last:.4f} bits per character at the last validation" for last in bits[-1:])
        found["Validation"][f"source {name}"] = f"{share:.1%} of the windows, {origin}{newest}"
    if score := probe.score:
        sizes = f"{score.characters:,} characters, {score.bytes:,} bytes"
        found["Validation, by this page"] = {
            "split": score.split,
            "symbols": f"the first {score.symbols:,}: {sizes}",
            "stride": str(score.stride),
            "context": str(score.context_length),
            "precision": score.precision,
            "checkpoint": score.checkpoint,
            "corpus": f"{score.corpus} (SHA-256 {score.corpus_sha256})",
        }
    found["Origin"] = {
        "began with": _pairs(run, "started_from/"),
        "commit": str(record.get("git_commit") or "not recorded"),
        "versions": _pairs(run, "versions/"),
        "machine": _pairs(run, "machine/"),
        "command": " ".join(map(str, record.get("command") or ["not recorded"])),
        "folder": str(run.folder.path.resolve()),
    }
    return found


def mismatch(runs: Sequence[Metrics]) -> tuple[str, Table] | None:
    """Why runs do not compare, and what differs; None if they do."""
    rows = {
        "text": [f"SHA-256 {str(run.provenance.get('corpus/sha256'))[:12]}…" for run in runs],
        "splits": [_sizes(run) for run in runs],
        "vocabulary": [vocabulary(run) for run in runs],
        "validated on": [validated(run) for run in runs],
    }
    differing = {name: values for name, values in rows.items() if len(set(values)) > 1}
    if "text" in differing:
        why = "read different texts"
    elif "splits" in differing:
        why = "hold out different parts of one text"
    # The first symbols of two vocabularies are not the same text.
    elif differing and not all(words.startswith("all") for words in rows["validated on"]):
        why = "validated on different parts of the split"
    else:
        return None
    words = f"These runs {why}: their bits per character cannot be compared."
    return words, list(differing.items())


def differences(configs: Sequence[Config]) -> Table:
    """The options that differ between configs and affect what a run learns."""
    first, *others = configs
    columns = [flatten(config.model_dump(), ".") for config in configs]
    names = dict.fromkeys(name for other in others for name in differences_of(first, other))
    names = [name for name in names if not has_mark(name, Mark.NO_EFFECT)]
    return [(name, [shown(column.get(name, NONE)) for column in columns]) for name in names]


def vocabulary(run: Metrics) -> str:
    """The name of a run's vocabulary, and the beginning of its SHA-256."""
    name, digest = (run.provenance.get(f"corpus/vocabulary/{key}") for key in ("name", "sha256"))
    return f"{name or NONE}" + (f" (SHA-256 {str(digest)[:12]}…)" if digest else "")


def validated(run: Metrics) -> str:
    """The symbols that a run validates on."""
    whole = number(run.provenance.get("corpus/splits/valid/symbols"))
    asked = run.config.train.valid_symbols
    if asked >= whole:
        return f"all {whole:,.0f}"
    return f"the first {asked:,}" + (f" of {whole:,.0f}" if whole > 0 else "")


def _result(run: Metrics, probe: Probe) -> dict[str, str]:
    paths = ("bits_per_character", "characters_per_second", "memory", "seconds", "skipped")
    bits, speeds, memory, seconds, skipped = (run.points(path)[1] for path in paths)
    by_page = NONE
    if score := probe.score:
        by_page = f"{score.bits_per_character:.4f} ± {score.standard_error or 0:.4f}"
    return {
        "steps": f"{run.step:,} of {run.config.train.steps:,}",
        "characters seen": engineering()(float(f"{run.step * run.characters_per_step:.3g}")),
        "training bpc": f"{bits[-1]:.3f}" if len(bits) else NONE,
        "best validation bpc": f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else NONE,
        "validation bpc, by this page": by_page,
        "training time": str(timedelta(seconds=round(seconds.max()))) if len(seconds) else NONE,
        "characters/s": f"{np.median(speeds):,.0f}" if len(speeds) else NONE,
        "memory": f"{memory[-1] / 2**30:.2f} GiB" if len(memory) else NONE,
        "skipped updates": f"{len(skipped):,}" if len(skipped) else NONE,
    }


def _sizes(run: Metrics) -> str:
    paths = [f"corpus/splits/{split}/bytes" for split in ("train", "valid", "test")]
    sizes = [f"{number(run.provenance.get(path)):,.0f}" for path in paths]
    return " + ".join(sizes) + " bytes"


def _pairs(run: Metrics, part: str) -> str:
    record = run.provenance.items()
    found = [f"{path.removeprefix(part)} {own}" for path, own in record if path.startswith(part)]
    return ", ".join(found) or "not recorded"
