"""Rates, ratios and utilisation from the seconds of a race, as JSON and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.race import TrialResult
from benchmarks.setups import AS_IT_COMES, DRAFT_FACTS
from charlm.text import markdown_table

PRODUCT = "matrix product"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def middle_half(values: dict[str, float], spec: str) -> str:
    """The quartiles of a spread, as text."""
    return f"{values['lower_quartile']:{spec}} to {values['upper_quartile']:{spec}}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Our rate over theirs, round by round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def mebibytes(size: int) -> str:
    """A size in bytes, as text."""
    return f"{size / 2**20:,.0f} MiB"


def fastest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The trial of the highest median rate."""
    return max(trials, key=lambda trial: np.median(trial.rates()), default=None)


@dataclass(frozen=True)
class RaceResult:
    """One race: charlm and its peers, and the matrix products timed between them."""

    title: str
    trials: list[TrialResult]
    products: list[TrialResult]
    device: str = "cpu"

    @property
    def own(self) -> TrialResult:
        """charlm with all its losses; the fastest if several set-ups train on them, as for each peer."""
        return fastest([trial for trial in self.trials if trial.setup.auxiliary])

    @property
    def peers(self) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.setup.library != "charlm"]

    def ratio(self, ours: TrialResult, theirs: TrialResult) -> dict[str, float]:
        """Our rate over theirs."""
        return spread(paired(ours.rates(), theirs.rates()))

    def product_rates(self, trial: TrialResult) -> list[float] | None:
        """FLOP per second of the matrix product in the arithmetic of the trial, round by round.

        On a CPU "medium" is another way to the same arithmetic, so the faster of the two is the limit. On a GPU it is
        TF32, which limits only those who use it.
        """
        medium = trial.setup.library == "charlm" or trial.setup.matmul_precision == "medium"
        all_count = trial.setup.precision == "bf16" or self.device == "cpu"
        same = [
            product.rates("flop_per_step")
            for product in self.products
            if product.setup.precision == trial.setup.precision
            and (all_count or (product.setup.matmul_precision == "medium") == medium)
        ]
        return [max(rates) for rates in zip(*same, strict=True)] if same else None

    def utilisation(self, trial: TrialResult) -> dict[str, float] | None:
        """FLOP per second of the model over those of the matrix product."""
        products = self.product_rates(trial)
        if products is None or "flop_per_step" not in trial.facts:
            return None
        return spread(paired(trial.rates("flop_per_step"), products))

    def headline(self) -> dict[str, Any]:
        """The main figures of charlm's own line, as medians."""
        tuned = fastest([peer for peer in self.peers if peer.setup.label != AS_IT_COMES])
        plain = fastest([peer for peer in self.peers if peer.setup.label == AS_IT_COMES])
        utilisation = self.utilisation(self.own)
        return {
            "ratio_to_fastest_tuned_peer": self.ratio(self.own, tuned)["median"] if tuned else None,
            "fastest_tuned_peer": tuned.name if tuned else None,
            "ratio_to_fastest_peer_as_it_comes": self.ratio(self.own, plain)["median"] if plain else None,
            "fastest_peer_as_it_comes": plain.name if plain else None,
            "model_flops_utilisation": utilisation["median"] if utilisation else None,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            **self.headline(),
            "contestants": [self._trial_dict(trial) for trial in self.trials],
            "pairwise_ratios": {
                ours.name: {theirs.name: self.ratio(ours, theirs) for theirs in self.trials if theirs is not ours}
                for ours in self.trials
            },
            "matrix_product_flop_per_second": {
                f"{product.setup.precision}, {product.setup.matmul_precision}": spread(product.rates("flop_per_step"))
                for product in self.products
            },
        }

    def _trial_dict(self, trial: TrialResult) -> dict[str, Any]:
        flop = trial.facts.get("flop_per_step")
        return {
            "name": trial.name,
            "library": trial.setup.library,
            "setup": trial.setup.label,
            "precision": trial.setup.precision,
            "parameters": trial.facts["parameters"],
            "flop_per_character": flop / trial.facts["characters_per_step"] if flop else None,
            "characters_per_second": spread(trial.rates()) | {"rounds": trial.rates()},
            "model_flops_utilisation": self.utilisation(trial),
            "peak_memory_bytes": trial.peak_memory,
            "first_turn_seconds": trial.first_turn,
        } | {name: trial.facts[name] for name in DRAFT_FACTS if name in trial.facts}

    def to_markdown(self) -> str:
        """The race as a table: charlm's own lines, then the peers, the fastest first."""
        header = [
            "", "set-up", "precision", "parameters", "characters per second", "middle half", "of the matrix rate",
            "peak memory", "charlm is faster by",
        ]  # fmt: skip
        own = [trial for trial in self.trials if trial not in self.peers]
        peers = sorted(self.peers, key=lambda trial: -np.median(trial.rates()))
        columns = list(zip(header, *map(self._row, own + peers), strict=True))
        header, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
        return f"**{self.title}**\n\n{markdown_table(header, rows)}"

    def _row(self, trial: TrialResult) -> list[str]:
        rate, utilisation = spread(trial.rates()), self.utilisation(trial)
        return [
            trial.setup.library,
            trial.setup.label,
            trial.setup.precision,
            f"{trial.facts['parameters'] / 1e6:.2f}M",
            f"{rate['median']:,.0f}",
            middle_half(rate, ",.0f"),
            f"{utilisation['median']:.0%}" if utilisation else "",
            mebibytes(trial.peak_memory),
            "" if trial is self.own else f"{self.ratio(self.own, trial)['median']:.2f}",
        ]


def drafts_table(race: RaceResult) -> str:
    """Generation with drafts beside plain generation."""
    header = [
        "",
        "characters per second",
        "middle half",
        "times plain",
        "middle half",
        "characters per pass",
        "accepted",
    ]
    (plain,) = (trial for trial in race.trials if trial.setup.draft is None)
    rows = []
    for trial in race.trials:
        rate = spread(trial.rates())
        row = [trial.setup.label, f"{rate['median']:,.0f}", middle_half(rate, ",.0f"), "", "", "1.00", ""]
        if "acceptance_rate" in trial.facts:
            ratio, facts = race.ratio(trial, plain), trial.facts
            row[3:] = [
                f"{ratio['median']:.2f}",
                middle_half(ratio, ".2f"),
                f"{facts['characters_per_pass']:.2f}",
                f"{facts['acceptance_rate']:.0%} of {facts['num_draft_tokens']}",
            ]
        rows.append(row)
    return f"**{race.title}**\n\n{markdown_table(header, rows)}"
