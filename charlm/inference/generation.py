"""Text from a model, one symbol at a time.

Shapes: V vocabulary, T symbols given at once.
"""

import codecs
import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.vocabulary import EncodingError
from charlm.model.attention import KVCache
from charlm.runs.loading import TrainedModel


def generate(
    trained: TrainedModel,
    prompt: str | bytes,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text that the model writes after `prompt`; the same seed gives the same text. See `stream`."""
    return "".join(stream(trained, prompt, length=length, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))


def stream(
    trained: TrainedModel,
    prompt: str | bytes,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """As `generate`, piece by piece as it is written, without the prompt.

    While prompt and text fit into the model's context, every symbol is predicted from all before it. When the context
    is full, its newest half is kept and the older half forgotten, so that a symbol costs one step of the model, and
    every context_length / 2 symbols one pass over half a context.

    Args:
        prompt: at least one symbol and at most context_length.
        length: symbols to write. Bytes that form no UTF-8 character become U+FFFD.
        temperature: divides the logits; 0 takes the likeliest symbol always.
        top_k: draw from the k likeliest symbols only.
        top_p: draw from the fewest likeliest symbols that together have at least this probability
            (Holtzman et al. 2020, "nucleus sampling"), after temperature and top_k.

    Raises:
        UserError: a value out of range; an empty prompt, one longer than the context, or one with a character that the
            vocabulary lacks.
    """
    _check_sampling(length, temperature, top_k, top_p, seed)
    data = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
    try:
        ids = trained.vocabulary.encode(data).tolist()
    except EncodingError as error:
        raise UserError(f"prompt: {error}; give one that the model can read") from error
    context_length = trained.config.model.context_length
    if not 1 <= len(ids) <= context_length:
        raise UserError(f"prompt: has {len(ids)} symbols; give at least 1, at most the context of {context_length}")
    generator = torch.Generator().manual_seed(seed)

    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(data)  # a prompt of bytes may end within a character, which the text then completes
        recent = deque(ids, maxlen=max(1, context_length // 2))
        cache = KVCache(trained.config.model, 1, trained.device)
        unread = ids
        for _ in range(length):
            if cache.length + len(unread) > context_length:
                cache.reset()
                unread = list(recent)
            logits_V = _next_logits(trained, unread, cache)
            unread = [sample(logits_V, temperature, top_k, top_p, generator)]
            recent.extend(unread)
            if piece := decoder.decode(trained.vocabulary.decode(unread)):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    return pieces()


def next_distribution(
    logits_V: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities that the next symbol is drawn from, float64 [V]; see `stream` for the arguments."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    descending, symbols = logits_V.double().sort(descending=True, stable=True)
    # Subtracting the largest first keeps a tiny temperature from dividing infinity by infinity.
    probabilities = ((descending - descending[0]) / temperature).softmax(dim=-1)
    if top_k is not None:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        probabilities[1:][probabilities.cumsum(dim=-1)[:-1] >= top_p] = 0
        probabilities /= probabilities.sum()
    return torch.empty_like(probabilities).scatter_(0, symbols, probabilities)


def sample(
    logits_V: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """A symbol drawn from `next_distribution`; each takes one number of the generator, whatever the arguments."""
    cumulative = next_distribution(logits_V, temperature, top_k, top_p).cumsum(dim=-1)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    return int(torch.searchsorted(cumulative[:-1], drawn, right=True))


@torch.inference_mode()
def _next_logits(trained: TrainedModel, ids: list[int], cache: KVCache) -> Tensor:
    """Logits after `ids`, which follow what the cache holds: [V] on the CPU."""
    last_layer = trained.config.model.num_layers
    hidden_1TD = trained.transformer(torch.tensor([ids], device=trained.device), cache=cache)[last_layer]
    return trained.heads(hidden_1TD[:, -1:], last_layer)[0, 0, 0].cpu()


def _check_sampling(length: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if length < 1:
        raise UserError(f"length={length}: must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: must be finite and at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: must lie in [0, 2^63)")
