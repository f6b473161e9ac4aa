"""Text from a model.

Shapes: B texts, V vocabulary.
"""

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import overload

import torch
from tqdm import tqdm

from charlm.config import UserError
from charlm.data.vocabulary import EncodingError
from charlm.inference.cached import next_logits
from charlm.inference.sampling import Sampling, sample
from charlm.inference.speculative import Draft, DraftStatistics, Speculation, build_drafter
from charlm.inference.stepping import stepping
from charlm.model.cache import KVCache
from charlm.runs.load import TrainedModel


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
    draft: Draft | None = None,
    num_draft_tokens: int | None = None,
    statistics: DraftStatistics | None = None,
    show_progress: bool = False,
) -> str | list[str]:
    """The text that the model writes after `prompt`; the same seed gives the same text. See `stream`.

    Several prompts, of whatever lengths, are continued together, in less time than one after the other, but with drafts
    one after the other. Each has the text that it would have alone, the first with `seed`, the next with `seed` + 1 and
    so on, but for rounding in the model. With `show_progress` a bar is shown on stderr if that is a terminal.
    """
    prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
    if not prompts:
        raise UserError("prompt: there is none; give at least one")
    sampling = Sampling(temperature, top_k, top_p)
    shown = partial(tqdm, desc="generating", leave=False, disable=None if show_progress else True)
    if draft is None and num_draft_tokens is None:
        steps = shown(_write(trained, prompts, length, sampling, seed), total=length + 1, unit=" symbols")
        texts = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    else:
        texts = [
            "".join(_write_with_drafts(trained, own, length, sampling, seed + row, draft, num_draft_tokens, statistics))
            for row, own in enumerate(shown(prompts, unit=" texts"))
        ]
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
    draft: Draft | None = None,
    num_draft_tokens: int | None = None,
    statistics: DraftStatistics | None = None,
) -> Iterator[str]:
    """As `generate`, piece by piece as it is written, without the prompt.

    While prompt and text fit into the model's context, every symbol is predicted from all before it. When the context
    is full, its newest half is kept and the older half forgotten, so that a symbol costs one step of the model, and
    every context_length / 2 symbols one pass over half a context. The weights must stay as they are until its end.

    Args:
        prompt: at least one symbol and at most context_length.
        length: symbols to write. Bytes that form no UTF-8 character become U+FFFD.
        temperature, top_k, top_p: see `Sampling`.
        draft: write several symbols per pass of the model, with drafts from "offsets", the last layer's heads for the
            symbols after the next, or from the exit at this layer. The text at temperature 0 is the same to the last
            symbol; others are drawn from the same distribution, but are not those of the same seed without drafts.
        num_draft_tokens: the most symbols to draft before a pass; by default as many as there are heads, or 5.
        statistics: counts what the drafts were good for.

    Raises:
        UserError: a value out of range; an empty prompt, one longer than the context, or one with a character that the
            vocabulary lacks; drafts from heads that the model lacks.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if draft is None and num_draft_tokens is None:
        return (piece for (piece,) in _write(trained, [prompt], length, sampling, seed) if piece)
    pieces = _write_with_drafts(trained, prompt, length, sampling, seed, draft, num_draft_tokens, statistics)
    return (piece for piece in pieces if piece)


def _write(
    trained: TrainedModel, prompts: Sequence[str | bytes], length: int, sampling: Sampling, seed: int
) -> Iterator[tuple[str, ...]]:
    """What each step adds to each text: nothing while a character is not whole."""
    _check_extent(length, seed)
    data, ids = zip(*(_encode(trained, prompt) for prompt in prompts), strict=True)
    context_length = trained.config.model.context_length

    def steps() -> Iterator[tuple[str, ...]]:
        decoders = [_Decoder(trained, prompt) for prompt in data]
        reader = stepping(trained)
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        recent = [deque(own, maxlen=max(1, context_length // 2)) for own in ids]
        cache = KVCache(trained.config.model, len(prompts), trained.device)
        unread = list(ids)
        for _ in range(length):
            for row, seen in enumerate(cache.lengths.tolist()):
                if seen + len(unread[row]) > context_length:
                    cache.lengths[row] = 0
                    unread[row] = list(recent[row])
            logits_BV = next_logits(reader, unread, cache)
            unread = [
                [sample(logits_V, sampling.temperature, sampling.top_k, sampling.top_p, generator)]
                for logits_V, generator in zip(logits_BV, generators, strict=True)
            ]
            for symbols, symbol in zip(recent, unread, strict=True):
                symbols.extend(symbol)
            yield tuple(decoder(symbol) for decoder, symbol in zip(decoders, unread, strict=True))
        yield tuple(decoder.end() for decoder in decoders)

    return steps()


def _write_with_drafts(
    trained: TrainedModel,
    prompt: str | bytes,
    length: int,
    sampling: Sampling,
    seed: int,
    draft: Draft | None,
    num_draft_tokens: int | None,
    statistics: DraftStatistics | None,
) -> Iterator[str]:
    """What each pass of the model adds to the text."""
    _check_extent(length, seed)
    if draft is None:
        raise UserError(f"num_draft_tokens={num_draft_tokens}: needs drafts; say from where with draft")
    data, ids = _encode(trained, prompt)
    generator = torch.Generator().manual_seed(seed)
    reader = stepping(trained)
    drafter = build_drafter(reader, draft, num_draft_tokens, sampling, generator)
    counted = DraftStatistics() if statistics is None else statistics
    counted.num_draft_tokens = drafter.num_draft_tokens

    def steps() -> Iterator[str]:
        decoder = _Decoder(trained, data)
        speculation = Speculation(reader, ids, drafter, sampling, generator, counted)
        missing = length
        while missing:
            symbols = speculation.advance(missing)
            missing -= len(symbols)
            yield decoder(symbols)
        yield decoder.end()

    return steps()


class _Decoder:
    """Symbols to text, a character when it is whole. A prompt of bytes may end within one, which the text completes."""

    def __init__(self, trained: TrainedModel, prompt: bytes):
        self.vocabulary = trained.vocabulary
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.decoder.decode(prompt)

    def __call__(self, symbols: list[int]) -> str:
        return self.decoder.decode(self.vocabulary.decode(symbols))

    def end(self) -> str:
        """What stands for a character that was never whole."""
        return self.decoder.decode(b"", final=True)


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


def _check_extent(length: int, seed: int) -> None:
    if length < 1:
        raise UserError(f"length={length}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: must lie in [0, 2^63)")
