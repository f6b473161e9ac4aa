"""Text from a model, one symbol at a time.

Shapes: B texts, V vocabulary, T symbols given at once.
"""

import codecs
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from charlm.config import UserError
from charlm.data.vocabulary import EncodingError
from charlm.inference.matmul import exact_matmul
from charlm.model.attention import KVCache
from charlm.runs.loading import TrainedModel


@overload
def generate(trained: TrainedModel, prompt: str | bytes, *, length: int, **options) -> str: ...
@overload
def generate(trained: TrainedModel, prompt: Sequence[str | bytes], *, length: int, **options) -> list[str]: ...
def generate(
    trained: TrainedModel,
    prompt: str | bytes | Sequence[str | bytes],
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str | list[str]:
    """The text that the model writes after `prompt`; the same seed gives the same text. See `stream`.

    Several prompts, of whatever lengths, are continued together, in less time than one after the other. Each has the
    text that it would have alone, the first with `seed`, the next with `seed` + 1 and so on, but for rounding in the
    model.
    """
    prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
    steps = _write(trained, prompts, length, temperature, top_k, top_p, seed)
    texts = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    return texts[0] if isinstance(prompt, str | bytes) else texts


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
    steps = _write(trained, [prompt], length, temperature, top_k, top_p, seed)
    return (piece for (piece,) in steps if piece)


def next_distribution(
    logits_V: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities that the next symbol is drawn from, float64 [V]; see `stream` for the arguments."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits_V = logits_V.double()
    # Subtracting the largest first keeps a tiny temperature from dividing infinity by infinity.
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return probabilities_V
    descending_V, symbols_V = probabilities_V.sort(descending=True, stable=True)
    if top_k is not None:
        descending_V[top_k:] = 0
        descending_V /= descending_V.sum()
    if top_p is not None:
        descending_V[1:][descending_V.cumsum(dim=-1)[:-1] >= top_p] = 0
        descending_V /= descending_V.sum()
    return probabilities_V.scatter_(0, symbols_V, descending_V)


def sample(
    logits_V: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """A symbol drawn from `next_distribution`; each takes one number of the generator, whatever the arguments."""
    cumulative_V = next_distribution(logits_V, temperature, top_k, top_p).cumsum(dim=-1)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * cumulative_V[-1]
    return int(torch.searchsorted(cumulative_V[:-1], drawn, right=True))


def _write(
    trained: TrainedModel,
    prompts: Sequence[str | bytes],
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[tuple[str, ...]]:
    """What each step adds to each text: nothing while a character is not whole."""
    _check_sampling(length, temperature, top_k, top_p, seed)
    if not prompts:
        raise UserError("prompt: there is none; give at least one")
    data, ids = zip(*(_encode(trained, prompt) for prompt in prompts), strict=True)
    context_length = trained.config.model.context_length

    def steps() -> Iterator[tuple[str, ...]]:
        decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
        for decoder, prompt in zip(decoders, data, strict=True):
            decoder.decode(prompt)  # a prompt of bytes may end within a character, which the text then completes
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        recent = [deque(own, maxlen=max(1, context_length // 2)) for own in ids]
        cache = KVCache(trained.config.model, len(prompts), trained.device)
        unread = list(ids)
        for _ in range(length):
            for row, seen in enumerate(cache.lengths.tolist()):
                if seen + len(unread[row]) > context_length:
                    cache.lengths[row] = 0
                    unread[row] = list(recent[row])
            logits_BV = _next_logits(trained, unread, cache)
            unread = [
                [sample(logits_V, temperature, top_k, top_p, generator)]
                for logits_V, generator in zip(logits_BV, generators, strict=True)
            ]
            for symbols, symbol in zip(recent, unread, strict=True):
                symbols.extend(symbol)
            yield tuple(
                decoder.decode(trained.vocabulary.decode(symbol))
                for decoder, symbol in zip(decoders, unread, strict=True)
            )
        yield tuple(decoder.decode(b"", final=True) for decoder in decoders)

    return steps()


def _encode(trained: TrainedModel, prompt: str | bytes) -> tuple[bytes, list[int]]:
    """A prompt's bytes and ids."""
    try:
        data = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
        ids = trained.vocabulary.encode(data).tolist()
    except (EncodingError, UnicodeEncodeError) as error:
        raise UserError(f"prompt: {error}; give one that the model can read") from error
    context_length = trained.config.model.context_length
    if not 1 <= len(ids) <= context_length:
        raise UserError(f"prompt: has {len(ids)} symbols; give at least 1, at most the context of {context_length}")
    return data, ids


@torch.inference_mode()
def _next_logits(trained: TrainedModel, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
    """Logits after `ids`, which follow what the cache holds of each text: [B, V] on the CPU."""
    if len({len(own) for own in ids}) > 1:  # all but the last of each apart, then the last of all together
        for row, own in enumerate(ids):
            if len(own) > 1:
                _last_hidden(trained, [own[:-1]], cache.row(row))
        ids = [own[-1:] for own in ids]
    return trained.heads(_last_hidden(trained, ids, cache), trained.config.model.num_layers)[:, 0, 0].cpu()


def _last_hidden(trained: TrainedModel, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
    """The last position's hidden states, [B, 1, D]; `ids` are equally many for each text."""
    with exact_matmul(trained.device, len(ids) * len(ids[0])):
        ids_BT = torch.tensor(ids, device=trained.device)
        return trained.transformer(ids_BT, cache=cache, num_last=1)[trained.config.model.num_layers]


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
