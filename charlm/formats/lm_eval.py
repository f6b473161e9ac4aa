"""The model `charlm` for the lm-evaluation-harness; importing this adds it to that program's registry."""

import math
from typing import Any

import numpy as np

from charlm.config import UserError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError("lm-eval: the harness is missing: pip install 'charlm[lm-eval]'") from error

from charlm.data.windows import default_stride
from charlm.hardware import default_device
from charlm.inference.generation import stream
from charlm.inference.scoring import measure_text, nats_and_likeliest
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.load import load


@register_model("charlm")
class CharlmLM(LM):
    """A model that scores as `charlm.bits_per_character` does. Raises UserError for characters it cannot spell."""

    def __init__(self, run: str, stride: int | None = None, seed: int = 0, batch_size: str | int = 1, **how: Any):
        """`seed` is of the first text to write, each next one's is larger by 1; `how` is for `charlm.load`."""
        super().__init__()
        how.pop("max_batch_size", None)  # which the harness gives always, like a GPU that need not be there
        if str(how.get("device")).startswith("cuda") and default_device().type != "cuda":
            del how["device"]
        self.trained, self.seed = load(str(run), **how), seed
        self.context_length = self.trained.config.model.context_length
        stride = default_stride(self.context_length) if stride is None else stride
        self.options = {"stride": stride, "batch_size": None if "auto" in str(batch_size) else int(batch_size)}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Minus the nats of each continuation of a context, and whether all its symbols are the likeliest."""
        results = []
        for context, continuation in (request.args for request in requests):
            own_N = self._encode(continuation)
            ids = np.append(self._encode(context), own_N)[-max(self.context_length, len(own_N)) - 1 :]
            nats_N, likeliest_N = self._measure(ids)[:, len(ids) - len(own_N) :]
            results.append((-math.fsum(nats_N), bool(likeliest_N.all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Minus the nats of each text."""
        return [-math.fsum(self._measure(self._encode(*request.args))[0]) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that follows each context, up to a stop. Raises UserError for options that `stream` lacks."""
        return [self._write(*request.args, seed) for seed, request in enumerate(requests, self.seed)]

    def _write(self, context: str, given: dict[str, Any], seed: int) -> str:
        how: dict[str, Any] = normalize_gen_kwargs(given)
        how.setdefault("temperature", float(how.pop("do_sample")))
        stops, how["length"] = [stop for stop in how.pop("until") if stop], how.pop("max_gen_toks")
        text, kept = "", self.trained.vocabulary.decode(self._encode(context)[-self.context_length :])
        for piece in stream(self.trained, kept.decode(errors="ignore"), seed=seed, **how):
            text += piece
            if any(stop in text for stop in stops):
                return min((text.partition(stop)[0] for stop in stops), key=len)
        return text

    def _encode(self, text: str) -> np.ndarray:
        return self.trained.vocabulary.encode(text.encode())

    def _measure(self, ids: np.ndarray) -> np.ndarray:
        """Nats of all symbols, and 1 for the likeliest, float64 [2, N]."""
        if len(ids) == 0:
            return np.zeros((2, 0))
        layers, models = [self.trained.config.model.num_layers], (self.trained.transformer, self.trained.heads)
        with full_fp32_matmul(self.trained.device):
            return measure_text(*models, ids, layers=layers, measure=nats_and_likeliest, **self.options)[0]
