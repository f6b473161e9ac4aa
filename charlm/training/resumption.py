"""Checks whether a run can be resumed with another config or corpus."""

from collections.abc import Sequence
from typing import Any

from charlm.config import Config, Mark, UserError, differences, has_mark
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.objective.terms import Term


def check_resumable(old: Config, new: Config) -> list[str]:
    """Lines to print about the changes from `old` to `new`.

    Raises:
        UserError: options changed that may not; the message names all of them.
    """
    changed = differences(old, new)
    lines = {name: f"{name}: {before} -> {after}" for name, (before, after) in changed.items()}
    refused = [name for name in changed if not has_mark(name, Mark.MAY_CHANGE)]
    if refused:
        text = "; ".join(lines[name] for name in refused)
        raise UserError(
            f"the run cannot be resumed with a changed {text}. Put it back, or start another --run.dir", refused[0]
        )
    return [line for name, line in lines.items() if not name.startswith("run.")]


def check_same_corpus(recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError if text or vocabulary differ from those that the run was trained on."""
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
    """Lines to print about terms that become active or silent at `step` because train.steps changed."""
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
