"""The auxiliary losses."""

from dataclasses import dataclass, field
from typing import Literal

from charlm.config.errors import require

Decay = Literal["constant", "linear", "cosine", "cutoff"]


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """What every auxiliary loss has: a switch and a schedule, whose clock runs from 0 at `start` to 1 at `end`."""

    enabled: bool = True
    """false removes exactly this loss's rows from the table of terms."""
    start: float = 0.0
    """Progress at which the schedule's clock starts; before it the weight is full."""
    end: float = 1.0
    """Progress at which the schedule's clock has run out."""

    _section = "aux"

    def __post_init__(self):
        require(0 <= self.start <= 1, f"{self._section}.start", self.start, "must lie in [0, 1]")
        require(0 <= self.end <= 1, f"{self._section}.end", self.end, "must lie in [0, 1]")
        require(self.start <= self.end, f"{self._section}.start", self.start, f"must not exceed end={self.end}")


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(AuxLossConfig):
    """Prediction at all positions of a window, not only at the last (Al-Rfou et al. 2018, "Multiple Positions")."""

    schedule: Decay = "constant"
    """The share w of the loss that all positions carry; the last position alone carries the rest, 1 - w.
    constant: w stays 1; linear, cosine: w falls to 0; cutoff: w is 1 until the clock runs out, then 0."""

    _section = "aux.positions"


@dataclass(frozen=True, kw_only=True)
class LayersConfig(AuxLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal["staggered", "linear", "cosine", "constant", "cutoff"] = "staggered"
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper); the others act on all layers alike."""
    every: int = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[int, ...] | None = None
    """Heads on these layers (1 = the lowest) in place of every k-th, as a YAML list: [3, 6, 9]."""
    weight: float = 1.0
    """Weight of each intermediate layer's loss against the last layer's."""

    _section = "aux.layers"

    def __post_init__(self):
        super().__post_init__()
        require(self.every >= 1, "aux.layers.every", self.every, "must be at least 1")
        require(0 <= self.weight < float("inf"), "aux.layers.weight", self.weight, "must be finite and at least 0")
        require(self.at is None or len(set(self.at)) == len(self.at), "aux.layers.at", self.at, "names a layer twice")


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(AuxLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Decay = "constant"
    """How the extra targets' weight decays."""
    num_targets: int = 2
    """Characters predicted at each position: the next one and num_targets - 1 after it."""
    weight: float = 0.5
    """Weight of each extra target, multiplied into its layer's loss."""

    _section = "aux.targets"

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.num_targets <= 1000, "aux.targets.num_targets", self.num_targets, "must lie in [1, 1000]")
        require(0 <= self.weight < float("inf"), "aux.targets.weight", self.weight, "must be finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class AuxConfig:
    """The auxiliary losses; `scripts/explain.py` prints the table of terms that they make."""

    positions: PositionsConfig = field(default_factory=PositionsConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    reduction: Literal["sum", "mean"] = "sum"
    """Add the losses of the active layers, or average them. The paper does not say."""
    main_weight: float = 1.0
    """Weight of the last layer's loss."""

    def __post_init__(self):
        require(
            0 <= self.main_weight < float("inf"), "aux.main_weight", self.main_weight, "must be finite and at least 0"
        )
