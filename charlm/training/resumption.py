"""Going on with a run that stopped: what may have changed since."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from charlm.config import Config, UserError, flatten
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.objective.terms import Term

MAY_CHANGE = {
    "data.path",
    "data.cache_dir",
    "data.hub_id",
    "train.steps",
    "train.micro_batch_size",
    "train.mixed_precision",
    "train.matmul_precision",
    "train.attention",
    "train.cross_entropy",
    "train.activation_checkpointing",
    "train.compile",
    "train.sharding",
    "train.deterministic",
    "train.log_every",
    "train.valid_every",
    "train.valid_symbols",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.diagnose_every",
    "train.max_skipped",
}
"""Options that a resumed run may set anew, beside those of `run`. Every other one belongs to what is being trained."""


def check_resumable(old: Config, new: Config) -> list[str]:
    """The accepted changes from `old` to `new`, as lines to print.

    Raises:
        UserError: an option changed that may not; the message names every one of them.
    """
    before, after = flatten(asdict(old), "."), flatten(asdict(new), ".")
    names = {**before, **after}  # a mapping, of tasks or of weights by layer, has more or fewer leaves
    changed = [name for name in names if before.get(name) != after.get(name) and not name.startswith("run.")]
    lines = [f"{name}: {before.get(name)} -> {after.get(name)}" for name in changed]
    refused = [line for name, line in zip(changed, lines, strict=True) if name not in MAY_CHANGE]
    if refused:
        raise UserError(
            "the run cannot be resumed with a changed "
            + "; ".join(refused)
            + ". Put it back, or start another --run.dir"
        )
    return lines


def check_same_corpus(recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError if the text or its vocabulary is not the one that the run was trained on."""
    if recorded["sha256"] != current["sha256"]:
        raise UserError(
            f"the run was trained on another corpus: sha256 was {recorded['sha256']}, now {current['sha256']}; "
            "point data.path or data.hub_id at the same text, or start another --run.dir"
        )
    if vocabulary_from_dict(recorded["vocabulary"]) != vocabulary_from_dict(current["vocabulary"]):
        raise UserError(
            "the run was trained with another vocabulary of this text; prepare it with the release of sentencepiece "
            "that the run had, or start another --run.dir"
        )


def rescaled_rows(terms: Sequence[Term], step: int, old_steps: int, new_steps: int) -> list[str]:
    """What another number of total steps does to the table at `step`, as lines to print: progress is a share of it."""
    before, after = (
        {term.name for term in terms if term.weight.at_next_turn(step / steps) > 0.0}
        for steps in (old_steps, new_steps)
    )
    changes = (("waking", sorted(after - before)), ("falling silent", sorted(before - after)))
    return [
        f"at step {step} progress is now {step / new_steps:.3f}; {what}: {', '.join(names)}"
        for what, names in changes
        if names
    ]
