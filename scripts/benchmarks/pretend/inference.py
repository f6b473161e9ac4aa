"""What runs without gradients, or beside training, on the pretended device."""

from benchmarks.pretend.device import pretended_gpu  # isort: skip (before torch)

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.pretend.runs import any_corpus, untrained
from benchmarks.pretend.training import figures
from charlm.compression.container import model_digest, probe
from charlm.compression.streams import Streams, choose_settings
from charlm.config import Config
from charlm.data.corpus import Corpus
from charlm.inference.early_exit import early_exit
from charlm.inference.evaluation import bits_per_character
from charlm.inference.generation import generate
from charlm.inference.scoring import measure_text, nats_and_entropies
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.runs.trained import exit_layers, truncate
from charlm.training.diagnose import bits_per_head, gradient_figures, spread_windows

BF16 = torch.bfloat16


class Checks:
    """Each method but the first is a check."""

    def __init__(self, config: Config, objective: Objective, corpus: Corpus):
        self.objective, self.corpus = objective, corpus
        self.ids = corpus.splits["valid"].ids
        self.trained = untrained(config, objective, corpus)

    def evaluation(self) -> None:
        bits_per_character(self.trained, self.corpus, split="valid", limit=5_000, precision="bf16")

    def exits(self) -> None:
        early_exit(self.trained, self.corpus, limit=2_000)

    def layers_and_entropies(self) -> None:
        measure_text(
            self.objective.transformer,
            self.objective.heads,
            self.ids[:5_000],
            stride=64,
            layers=exit_layers(self.trained),
            measure=nats_and_entropies,
        )

    def bits_of_heads(self) -> None:
        bits_per_head(self.objective, self.ids[:5_000], 5_000, BF16)

    def gradients(self) -> None:
        windows = spread_windows(self.ids, 4, self.objective.window_length)
        gradient_figures(self.objective, torch.from_numpy(windows), 0.0, autocast_dtype=BF16)

    def generation(self) -> None:
        generate(self.trained, "hello", length=3)

    def generation_past_the_context(self) -> None:
        context_length = self.trained.config.model.context_length
        generate(self.trained, "h" * context_length, length=3)

    def generation_of_several(self) -> None:
        generate(self.trained, ["hello", "a longer prompt"], length=3)

    def drafts_by_offsets(self) -> None:
        generate(self.trained, "hello", length=6, draft="offsets")

    def drafts_by_exit(self) -> None:
        generate(self.trained, "hello", length=6, draft=1, num_draft_tokens=2)

    def generation_by_exits(self) -> None:
        generate(self.trained, "hello", length=4, exit_entropy=1.0)

    def truncated(self) -> None:
        generate(truncate(self.trained, 1), "hello", length=2)

    def compression(self) -> None:
        settings = choose_settings(self.trained, 1_000, streams=4, precision="bf16")
        model_digest(self.trained)
        probe(self.trained, settings)
        for _ in Streams(self.trained, settings).walk(np.zeros(20, np.int64), tqdm(disable=True)):
            pass


def measure_inference(config: Config, check: str, lacking: bool = False) -> dict[str, Any]:
    """The work of one of `Checks`."""
    corpus = any_corpus()
    with pretended_gpu(lacking) as meter:
        with torch.device("cuda"):
            objective = build_objective(config, corpus.vocabulary.size).eval()
        checks = Checks(config, objective, corpus)
        meter.reset("inference")
        getattr(checks, check)()
        return figures(meter.record)
