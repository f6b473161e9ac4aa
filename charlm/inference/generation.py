"""Text generation.

Shapes: B texts, V vocabulary.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import overload

import torch
from tqdm import tqdm

from charlm.config import UserError
from charlm.data.vocabulary import EncodingError
from charlm.inference.sampling import Sampling
from charlm.inference.speculative import Draft, DraftStatistics, Speculation, build_drafter
from charlm.inference.stepping import next_logits, stepping
from charlm.model.cache import KVCache
from charlm.runs.trained import TrainedModel


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
    """The text that the model writes after `prompt`; the same seed gives the same text. Arguments as for `stream`.

    Several prompts, of any lengths, are continued together, which takes less time than one after the other; with drafts
    they are continued one after the other. Each text is the one it would be alone, except for rounding in the model:
    the first with `seed`, the next with `seed` + 1 and so on. `show_progress` shows a bar on stderr if that is a
    terminal.
    """
    prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
    if not prompts:
        raise UserError("prompt: give at least one")
    shown = partial(tqdm, desc="generating", leave=False, disable=None if show_progress else True)
    if draft is None and num_draft_tokens is None:
        sampling = Sampling(temperature, top_k, top_p)
        _check_extent(length, seed)
        data, ids = zip(*(_encode(trained, own) for own in prompts), strict=True)
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        steps = _write(stepping(trained), ids, length, sampling, generators)
        rows = zip(*shown(steps, total=length, unit=" symbols"), strict=True)
        texts = ["".join(_decode(trained, own, row)) for own, row in zip(data, rows, strict=True)]
    else:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "length": length}
        options |= {"draft": draft, "num_draft_tokens": num_draft_tokens, "statistics": statistics}
        texts = [
            "".join(stream(trained, own, seed=seed + row, **options))
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
    """The text that the model writes after `prompt`, piece by piece, without the prompt.

    While prompt and text fit into the model's context, every symbol is predicted from all before it. When the context
    is full, its newest half is kept and the older half forgotten. So a symbol costs one step of the model, and every
    context_length / 2 symbols one pass over half a context. The weights must not change before the text ends.

    Args:
        prompt: at least one symbol and at most context_length.
        length: symbols to write. Bytes that form no UTF-8 character become U+FFFD.
        temperature, top_k, top_p: see `Sampling`.
        draft: write several symbols per pass of the model, with drafts from "offsets", the last layer's heads for the
            symbols after the next, or from the exit at this layer. The text at temperature 0 is the same, symbol by
            symbol; other texts follow the same distribution, but differ from those of the same seed without drafts.
        num_draft_tokens: the most symbols to draft before a pass; by default as many as there are heads, or 5.
        statistics: counts how useful the drafts were.

    Raises:
        UserError: a value out of range; an empty prompt, one longer than the context, or one with a character that the
            vocabulary lacks; drafts from heads that the model lacks.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check_extent(length, seed)
    data, ids = _encode(trained, prompt)
    reader, generator = stepping(trained), torch.Generator().manual_seed(seed)
    if draft is not None:
        drafter = build_drafter(reader, draft, num_draft_tokens, sampling, generator)
        statistics = DraftStatistics() if statistics is None else statistics
        statistics.num_draft_tokens = drafter.num_draft_tokens
        speculation = Speculation(reader, ids, drafter, sampling, generator, statistics)
        steps = _write_with_drafts(speculation, length)
    elif num_draft_tokens is None:
        steps = (symbols for (symbols,) in _write(reader, [ids], length, sampling, [generator]))
    else:
        raise UserError(f"num_draft_tokens={num_draft_tokens}: requires draft, which names their source")
    return (piece for piece in _decode(trained, data, steps) if piece)


def _write(
    reader: TrainedModel,
    ids: Sequence[list[int]],
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Iterator[list[list[int]]]:
    """The symbol that each step adds to each text, as a list of one."""
    context_length = reader.config.model.context_length
    recent = [deque(own, maxlen=max(1, context_length // 2)) for own in ids]
    cache = KVCache(reader.config.model, len(ids), reader.device)
    unread = list(ids)
    for _ in range(length):
        for row, seen in enumerate(cache.lengths.tolist()):
            if seen + len(unread[row]) > context_length:
                cache.lengths[row] = 0
                unread[row] = list(recent[row])
        rows = zip(next_logits(reader, unread, cache).split(1), generators, strict=True)
        unread = [sampling.choose(logits_1V, generator)[0] for logits_1V, generator in rows]
        for symbols, symbol in zip(recent, unread, strict=True):
            symbols.extend(symbol)
        yield list(unread)


def _write_with_drafts(speculation: Speculation, length: int) -> Iterator[list[int]]:
    """The symbols that each pass of the model adds to the text."""
    while length:
        symbols = speculation.advance(length)
        length -= len(symbols)
        yield symbols


def _decode(trained: TrainedModel, prompt: bytes, steps: Iterable[list[int]]) -> Iterator[str]:
    """The text that each step adds: an empty string while a character is incomplete, be it the prompt's last."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(prompt)
    for symbols in steps:
        yield decoder.decode(trained.vocabulary.decode(symbols))
    yield decoder.decode(b"", final=True)


def _encode(trained: TrainedModel, prompt: str | bytes) -> tuple[bytes, list[int]]:
    """A prompt's bytes and ids."""
    try:
        data = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
        ids = trained.vocabulary.encode(data).tolist()
    except (EncodingError, UnicodeEncodeError) as error:
        raise UserError(f"prompt: {error}; use only what the vocabulary has") from error
    context_length = trained.config.model.context_length
    if not 1 <= len(ids) <= context_length:
        raise UserError(f"prompt: has {len(ids)} symbols; give at least 1, at most the context of {context_length}")
    return data, ids


def _check_extent(length: int, seed: int) -> None:
    if length < 1:
        raise UserError(f"length={length}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: must lie in [0, 2^63)")
