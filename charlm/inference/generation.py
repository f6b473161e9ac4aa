"""Text generation. Shapes: B texts, V vocabulary."""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator

from charlm.config import UserError
from charlm.config.types import Count, Index, NonNegative
from charlm.data.windows import default_stride
from charlm.inference.early_exit import ExitReader
from charlm.inference.sampling import Sampling
from charlm.inference.scoring import progress_bar
from charlm.inference.speculative import Draft, DraftStatistics, Speculation, choose_num_drafts
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache
from charlm.runs.trained import TrainedModel


class Writing(Sampling):
    """Options of `generate`, which describes them."""

    length: Count
    seed: Annotated[Index, Field(lt=2**63)] = 0
    draft: Draft | None = None
    num_draft_tokens: Count | None = None
    exit_entropy: Annotated[NonNegative, Field(allow_inf_nan=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.draft is None and self.num_draft_tokens is not None:
            raise self.mistake("num_draft_tokens", "requires draft, which names their source")
        if self.draft is not None and self.exit_entropy is not None:
            raise self.mistake("exit_entropy", "cannot be combined with draft; leave one out")
        return self


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
    exit_entropy: float | None = None,
    show_progress: bool = False,
) -> str | list[str]:
    """The text that the model writes after `prompt`; the same seed gives the same text.

    When the context is full, its older half is forgotten, and the newer half is read again.

    Several prompts are continued together or, with drafts or early exit, in turn. The first text is that
    of `seed` alone, the next that of `seed` + 1, except for rounding.

    Args:
        prompt: at least one symbol and at most context_length.
        length: symbols to write. Bytes that form no UTF-8 character become U+FFFD.
        temperature, top_k, top_p: see `Sampling`.
        draft: write several symbols per pass, drafted by the heads for later symbols ("offsets"), or the
            exit at a layer. The distribution, or text at temperature 0, is the same.
        num_draft_tokens: the most symbols to draft at once; by default one per head, or 5.
        statistics: counts drafts or exits.
        exit_entropy: the first layer with less entropy, in bits, predicts (see `ExitReader`).

    Raises UserError for a value out of range, an unreadable prompt, or drafts without heads.
    """
    prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
    if not prompts:
        raise UserError("prompt: give at least one", option="prompt")
    encoded = [_encode(trained, own) for own in prompts]
    groups = [[own] for own in encoded]
    if draft is None and exit_entropy is None:
        groups = [encoded]
    options = {"length": length, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options |= {"draft": draft, "num_draft_tokens": num_draft_tokens, "exit_entropy": exit_entropy}
    texts = []
    with progress_bar(len(groups) * length, "generating", show_progress) as bar:
        for group in groups:
            steps = []
            for step in write(trained, group, statistics, seed=seed + len(texts), **options):
                steps.append(step)
                bar.update(len(step[0]))
            rows = zip(*steps, strict=True)
            for own, row in zip(group, rows, strict=True):
                texts.append("".join(_decode(trained, own, row)))
    return texts[0] if isinstance(prompt, str | bytes) else texts


def stream(trained: TrainedModel, prompt: str | bytes, **options) -> Iterator[str]:
    """The text that the model writes after `prompt`, piece by piece; as `generate`."""
    ids = _encode(trained, prompt)
    steps = write(trained, [ids], **options)
    pieces = _decode(trained, ids, (symbols for (symbols,) in steps))
    return (piece for piece in pieces if piece)


def write(
    trained: TrainedModel, ids: Sequence[list[int]], statistics: DraftStatistics | None = None, **options
) -> Iterator[Sequence[list[int]]]:
    """The symbols that each step adds to each text; a single text, if there are drafts."""
    how = Writing.read(options)
    statistics = statistics or DraftStatistics()
    reader = Reader(trained)
    if how.exit_entropy is not None:
        reader = ExitReader(trained, how.exit_entropy, statistics.exits)
    generators = [torch.Generator().manual_seed(how.seed + row) for row in range(len(ids))]
    if how.draft is None:
        return _write_plainly(reader, ids, how, generators)
    num_drafts = choose_num_drafts(reader, how.draft, how.num_draft_tokens)
    statistics.num_draft_tokens = num_drafts
    speculation = Speculation(reader, how.draft, num_drafts, how, *generators, statistics, list(*ids))
    return ([symbols] for symbols in speculation.write(how.length))


def _write_plainly(
    reader: Reader, ids: Sequence[list[int]], how: Writing, generators: Sequence[torch.Generator]
) -> Iterator[list[list[int]]]:
    """The symbol that each step adds to each text, as a list of one."""
    context_length = reader.config.context_length
    recent = [deque(own, maxlen=default_stride(context_length)) for own in ids]
    cache = KVCache(reader.config, len(ids), reader.device)
    unread = list(ids)
    for _ in range(how.length):
        for row, seen in enumerate(cache.lengths.tolist()):
            if seen + len(unread[row]) > context_length:
                cache.lengths[row] = 0
                unread[row] = list(recent[row])
        logits_BV = reader.next_logits(unread, cache)
        rows = zip(logits_BV.split(1), generators, strict=True)
        unread = [how.choose(logits_1V, generator)[0] for logits_1V, generator in rows]
        for symbols, symbol in zip(recent, unread, strict=True):
            symbols.extend(symbol)
        yield list(unread)


def _decode(trained: TrainedModel, prompt: list[int], steps: Iterable[list[int]]) -> Iterator[str]:
    """The text that each step adds; empty while a character is incomplete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(trained.vocabulary.decode(prompt))
    for symbols in steps:
        yield decoder.decode(trained.vocabulary.decode(symbols))
    yield decoder.decode(b"", final=True)


def _encode(trained: TrainedModel, prompt: str | bytes) -> list[int]:
    ids = trained.ids(prompt, "prompt").tolist()
    most = trained.config.model.context_length
    if not 1 <= len(ids) <= most:
        raise UserError(f"prompt: has {len(ids)} symbols; give 1 to {most}", "prompt")
    return ids
