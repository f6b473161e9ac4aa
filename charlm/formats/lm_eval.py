"""charlm's models in the lm-evaluation-harness: `python -m charlm.formats.lm_eval` is its command line.

The harness reads no entry points: importing this adds the model `charlm` to its registry.
"""

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError("charlm.formats.lm_eval needs the harness: pip install 'charlm[lm-eval]'") from error

from charlm.config import UserError
from charlm.data.windows import default_stride
from charlm.hardware import default_device
from charlm.inference.generation import stream
from charlm.inference.scoring import measure_text, nats
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.load import load
from charlm.text import fitted

KNOWN = {"do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p"}
"""Options of generation."""


def nats_and_likeliest(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The cost of each target, and 1 where it is the likeliest symbol, [2, M]."""
    likeliest_M = log_probabilities_MV.argmax(dim=-1) == targets_M
    return torch.cat([nats(log_probabilities_MV, targets_M), likeliest_M[None]])


@register_model("charlm")
class CharlmLM(LM):
    """Scores as `charlm.bits_per_character`: the first symbol of a text has equal probabilities."""

    def __init__(self, run: str, stride: int | None = None, seed: int = 0, batch_size: str | int = 1, **how: Any):
        """`seed` is that of the first text to write, and each next one's is larger by 1; `how` is for `charlm.load`."""
        super().__init__()
        how.pop("max_batch_size", None)  # of the harness, as the device of machines without a GPU
        if str(how.get("device")).startswith("cuda") and default_device().type != "cuda":
            del how["device"]
        self.trained, self.seed = load(str(run), **how), seed
        self.context_length = self.trained.config.model.context_length
        stride = default_stride(self.context_length) if stride is None else stride
        batch_size = None if batch_size == "auto" else int(batch_size)
        self.options = {"layers": [self.trained.config.model.num_layers], "stride": stride, "batch_size": batch_size}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The negative nats of each continuation of a context, and whether each symbol is the likeliest.

        The context keeps its last symbols. Raises UserError for characters that the vocabulary lacks.
        """
        results = []
        for context, continuation in tqdm([request.args for request in requests], "loglikelihood"):
            own_N = self._encode(continuation)
            ids = np.append(self._encode(context), own_N)[-max(self.context_length, len(own_N)) - 1 :]
            nats_N, likeliest_N = self._measure(ids)[:, len(ids) - len(own_N) :]
            results.append((-math.fsum(nats_N), bool(likeliest_N.all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The negative nats of each text."""
        texts = [self._encode(*request.args) for request in requests]
        return [-math.fsum(self._measure(ids)[0]) for ids in tqdm(texts, "loglikelihood_rolling")]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that follows each context, up to a stop. Raises UserError for an unknown option."""
        texts = []
        for context, options in tqdm([request.args for request in requests], "generate_until"):
            how: dict[str, Any] = normalize_gen_kwargs(options)
            for name in how.keys() - KNOWN:
                raise UserError(f"gen_kwargs: {name}={how[name]}: must be one of {', '.join(sorted(KNOWN))}", name)
            kept = self.trained.vocabulary.decode(self._encode(context)[-self.context_length :])
            sampling = {name: how[name] for name in ("top_k", "top_p") if name in how}
            sampling["temperature"] = how.get("temperature", float(how["do_sample"]))
            length, seed, text = how["max_gen_toks"], self.seed + len(texts), ""
            for piece in stream(self.trained, kept.decode(errors="ignore"), length=length, seed=seed, **sampling):
                text += piece
                if any(stops := [stop in text and stop for stop in how["until"]]):
                    text = min((text.partition(stop)[0] for stop in stops if stop), key=len)
                    break
            texts.append(text)
        return texts

    def _encode(self, text: str) -> np.ndarray:
        return self.trained.vocabulary.encode(text.encode())

    def _measure(self, ids: np.ndarray) -> np.ndarray:
        """`nats_and_likeliest` of all symbols, float64 [2, N]."""
        if len(ids) == 0:
            return np.zeros((2, 0))
        with full_fp32_matmul(self.trained.device):
            models = self.trained.transformer, self.trained.heads
            return measure_text(*models, ids, measure=nats_and_likeliest, **self.options)[0]


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print(fitted(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
