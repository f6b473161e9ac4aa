"""charlm: deep character-level Transformers with auxiliary losses (Al-Rfou et al. 2018).

    import charlm

    config = charlm.load_config("configs/demo.yaml", {"train.steps": 60})
    run = charlm.train(config)
    trained = charlm.load(run)
    print(charlm.bits_per_character(trained, charlm.load_corpus(config.data)))

Importing charlm is cheap: torch is loaded when a name that needs it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.compression.coder import compress, decompress
    from charlm.config import Config, ConfigError, UserError
    from charlm.config.load import load_config
    from charlm.data.corpus import load_corpus
    from charlm.inference.adaptation import adapted
    from charlm.inference.evaluation import bits_per_character
    from charlm.inference.generation import generate
    from charlm.inference.speculative import DraftStatistics
    from charlm.lens.lens import Lens
    from charlm.objective.tasks import auxiliary_task
    from charlm.report.explain import explain
    from charlm.report.finish import train_and_report
    from charlm.runs.hub import push_to_hub
    from charlm.runs.load import load
    from charlm.training.loop import train

__version__ = "0.1.0"
_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "DraftStatistics": "inference.speculative",
    "Lens": "lens.lens",
    "UserError": "config",
    "adapted": "inference.adaptation",
    "auxiliary_task": "objective.tasks",
    "bits_per_character": "inference.evaluation",
    "compress": "compression.coder",
    "decompress": "compression.coder",
    "explain": "report.explain",
    "generate": "inference.generation",
    "load": "runs.load",
    "load_config": "config.load",
    "load_corpus": "data.corpus",
    "push_to_hub": "runs.hub",
    "train": "training.loop",
    "train_and_report": "report.finish",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
