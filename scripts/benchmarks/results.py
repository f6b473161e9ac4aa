"""From the seconds of a race to medians, ratios and utilisation; to JSON and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.race import Entry
from benchmarks.setups import AS_IT_COMES
from charlm.markdown import markdown_table

PRODUCT = "matrix product"
DRAFT_FACTS = ("num_draft_tokens", "acceptance_rate", "characters_per_pass")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Our rate over theirs, round by round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class RaceResult:
    """One race: charlm and its peers, and the matrix products that were timed between them."""

    title: str
    entries: list[Entry]
    products: list[Entry]
    device: str = "cpu"

    @property
    def own(self) -> Entry:
        """charlm with all that it trains on; where several set-ups do, the fastest, as of each peer."""
        whole = [entry for entry in self.entries if entry.contestant.auxiliary]
        return max(whole, key=lambda entry: np.median(entry.rates()))

    def fastest(self, *, tuned: bool) -> Entry | None:
        """The peer of the highest median rate, among those as they come or those with tricks."""
        peers = [
            entry
            for entry in self.entries
            if entry.contestant.library != "charlm" and (entry.contestant.setup != AS_IT_COMES) == tuned
        ]
        return max(peers, key=lambda entry: np.median(entry.rates()), default=None)

    def ratio(self, ours: Entry, theirs: Entry) -> dict[str, float]:
        """How many times as fast."""
        return spread(paired(ours.rates(), theirs.rates()))

    def product_rates(self, entry: Entry) -> list[float] | None:
        """FLOP per second of the matrix product in this contestant's arithmetic, round by round.

        On a CPU "medium" is another way to the same arithmetic, so the faster of the two is the limit; on a GPU it is
        TF32, and the limit of those alone who use it.
        """
        medium = entry.contestant.library == "charlm" or entry.contestant.matmul_precision == "medium"
        same = [
            product.rates("flop_per_step")
            for product in self.products
            if product.contestant.precision == entry.contestant.precision
            and (
                entry.contestant.precision == "bf16"
                or self.device == "cpu"
                or (product.contestant.matmul_precision == "medium") == medium
            )
        ]
        return [max(rates) for rates in zip(*same, strict=True)] if same else None

    def utilisation(self, entry: Entry) -> dict[str, float] | None:
        """FLOP per second of the model over those of the matrix product."""
        products = self.product_rates(entry)
        if products is None or "flop_per_step" not in entry.facts:
            return None
        return spread(paired(entry.rates("flop_per_step"), products))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return (
            {"title": self.title}
            | self.headline()
            | {
                "contestants": [self._contestant(entry) for entry in self.entries],
                "pairwise_ratios": {
                    ours.name: {theirs.name: self.ratio(ours, theirs) for theirs in self.entries if theirs is not ours}
                    for ours in self.entries
                },
                "matrix_product_flop_per_second": {
                    f"{product.contestant.precision}, {product.contestant.matmul_precision}": spread(
                        product.rates("flop_per_step")
                    )
                    for product in self.products
                },
            }
        )

    def headline(self) -> dict[str, Any]:
        """The figures that matter, of charlm's own line, as plain medians."""
        tuned, plain = self.fastest(tuned=True), self.fastest(tuned=False)
        utilisation = self.utilisation(self.own)
        return {
            "ratio_to_fastest_tuned_peer": self.ratio(self.own, tuned)["median"] if tuned else None,
            "fastest_tuned_peer": tuned.name if tuned else None,
            "ratio_to_fastest_peer_as_it_comes": self.ratio(self.own, plain)["median"] if plain else None,
            "fastest_peer_as_it_comes": plain.name if plain else None,
            "model_flops_utilisation": utilisation["median"] if utilisation else None,
        }

    def _contestant(self, entry: Entry) -> dict[str, Any]:
        characters = entry.facts["characters_per_step"]
        flop = entry.facts.get("flop_per_step")
        return {
            "name": entry.name,
            "library": entry.contestant.library,
            "setup": entry.contestant.setup,
            "precision": entry.contestant.precision,
            "parameters": entry.facts["parameters"],
            "flop_per_character": flop / characters if flop else None,
            "characters_per_second": spread(entry.rates()) | {"rounds": entry.rates()},
            "model_flops_utilisation": self.utilisation(entry),
            "peak_memory_bytes": entry.peak_memory,
            "first_turn_seconds": entry.first_turn,
        } | {name: entry.facts[name] for name in DRAFT_FACTS if name in entry.facts}

    def to_markdown(self) -> str:
        """The race as a table, the fastest first after charlm's own lines."""
        header = [
            "", "set-up", "precision", "parameters", "characters per second", "middle half", "of the matrix rate",
            "peak memory", "charlm is faster by",
        ]  # fmt: skip
        own = [entry for entry in self.entries if entry.contestant.library == "charlm"]
        others = [entry for entry in self.entries if entry not in own]
        others.sort(key=lambda entry: -np.median(entry.rates()))
        rows = [self._row(entry) for entry in own + others]
        columns = [number for number in range(len(header)) if any(row[number] for row in rows)]
        return f"**{self.title}**\n\n" + markdown_table(
            [header[number] for number in columns], [[row[number] for number in columns] for row in rows]
        )

    def _row(self, entry: Entry) -> list[str]:
        rate, utilisation = spread(entry.rates()), self.utilisation(entry)
        ratio = self.ratio(self.own, entry)["median"]
        return [
            entry.contestant.library,
            entry.contestant.setup,
            entry.contestant.precision,
            f"{entry.facts['parameters'] / 1e6:.2f}M",
            f"{rate['median']:,.0f}",
            f"{rate['lower_quartile']:,.0f} to {rate['upper_quartile']:,.0f}",
            f"{utilisation['median']:.0%}" if utilisation else "",
            f"{entry.peak_memory / 2**20:,.0f} MiB",
            "" if entry is self.own else f"{ratio:.2f}",
        ]


def drafts_table(result: RaceResult) -> str:
    """Ways to drafts beside plain generation."""
    header = [
        "",
        "characters per second",
        "middle half",
        "times plain",
        "middle half",
        "characters per pass",
        "accepted",
    ]
    (plain,) = (entry for entry in result.entries if entry.contestant.draft is None)
    rows = []
    for entry in result.entries:
        rate, ratio = spread(entry.rates()), result.ratio(entry, plain)
        drafted = "acceptance_rate" in entry.facts
        rows.append(
            [
                entry.contestant.setup,
                f"{rate['median']:,.0f}",
                f"{rate['lower_quartile']:,.0f} to {rate['upper_quartile']:,.0f}",
                f"{ratio['median']:.2f}" if drafted else "",
                f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}" if drafted else "",
                f"{entry.facts['characters_per_pass']:.2f}" if drafted else "1.00",
                f"{entry.facts['acceptance_rate']:.0%} of {entry.facts['num_draft_tokens']}" if drafted else "",
            ]
        )
    return f"**{result.title}**\n\n" + markdown_table(header, rows)
