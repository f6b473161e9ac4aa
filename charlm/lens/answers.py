"""What a page asks, and the JSON that it gets."""

from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from charlm.config import Section, UserError
from charlm.config.types import Count, Index, NonNegative
from charlm.lens.lens import Lens, Watch
from charlm.lens.reading import Reading
from charlm.lens.runs import MAX_LENGTH, MAX_TEXT, Runs

MOST_NEW = 4096
"""Symbols of an answer: a page shows the beginning of a long text while the rest is read."""
SHOWN, LIKELIEST = 8, 5
"""Likeliest symbols of the distributions of a symbol that was drawn, and of those of a page without a server."""
Json = dict[str, Any]
Place = Annotated[int, Field(ge=0, le=MAX_TEXT + 1)]


class Request(Section):
    """A question about a text, read by a checkpoint of a run; each uses some of the fields."""

    run: Annotated[int, Field(ge=0, le=1)] = 0
    checkpoint: str | None = None
    checkpoints: tuple[str | None, str | None] = (None, None)
    text: str = ""
    layer: Count = 1
    offset: Count = 1
    place: Place = 0
    since: Place = 0
    head: Index = 0
    unit: Index = 0
    symbol: Index = 0
    start: Index = 0
    length: Annotated[int, Field(ge=1, le=10 * MAX_LENGTH)] = 1
    temperature: NonNegative = 1.0
    top_k: Index | None = None
    seed: Annotated[Index, Field(lt=2**63)] = 0
    drafts: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
            raise self.mistake("text", f"has more than {MAX_TEXT:,} bytes")
        return self


def answer(runs: Runs, name: str, values: Mapping[str, Any], watch: Watch) -> Json | Iterator[Json]:
    """The answer to a request by its name, from `ANSWERS`; of "generate" an event for each symbol.

    Raises UserError for values that cannot be, and what `watch` raises.
    """
    found = ANSWERS[name](runs, Request.read(values), watch)
    return plain(found) if isinstance(found, dict) else map(plain, found)


def plain(value: Any) -> Any:
    """A value for JSON: rounded to 6 digits, and None for NaN, and for ids and layers below 0."""
    if isinstance(value, dict):
        return {str(key): plain(own) for key, own in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    if isinstance(value, np.ndarray):
        known = value >= 0 if value.dtype.kind == "i" else np.isfinite(value)
        numbers = value.tolist() if value.dtype.kind == "i" else value.astype(float).round(6).tolist()
        return numbers if known.all() else [number if own else None for number, own in zip(numbers, known, strict=True)]
    return value


def reading_json(reading: Reading, offset: int = 1, since: int = 0) -> Json:
    """A reading from a place on."""
    characters = reading.vocabulary.count_characters(reading.ids)
    rate = float(reading.bits.sum()) / characters if characters else None
    logits_V = reading.next_logits
    best = int(logits_V.argmax())
    return {
        "since": since,
        "symbols": reading.ids[since:],
        "pieces": reading.pieces(since),
        "bits": reading.bits[since:],
        **grid_json(reading, offset, since),
        "total": {"bits_per_character": rate, "characters": characters} | reading.sizes(),
        "next": {"symbol": best, "probability": float(np.exp(logits_V[best]))} if len(reading.ids) else None,
    }


def grid_json(reading: Reading, offset: int, since: int = 0) -> Json:
    """What layers expected at the places from `since` on, and which one decided."""
    grid = reading.grid(offset).items()
    cells = {layer: {name: values[since:] for name, values in own._asdict().items()} for layer, own in grid}
    return {"grid": cells, "decided": reading.decided(offset)[since:]}


def whole(lens: Lens, text: str) -> Json:
    """The reading of a text for a page without a server: all offsets, and the likeliest symbols for each place."""
    reading = lens.read(text)
    offsets = sorted({offset for _, offset in reading.pairs if offset > 1})
    count = min(LIKELIEST, reading.vocabulary.size)
    best = lens.expected(reading.ids[:-1], [lens.last], 1, 0, lambda own_MV: torch.stack(own_MV.topk(count), dim=1))
    values, symbols = best[lens.last].reshape(-1, 2, count).swapaxes(0, 1)
    likeliest = {"symbols": [[], *symbols.astype(int)], "probabilities": [[], *values]}
    others = {offset: grid_json(reading, offset) for offset in offsets}
    return plain(reading_json(reading) | {"others": others, "likeliest": likeliest})


def read(runs: Runs, asked: Request, watch: Watch) -> Json:
    lens = runs.lens(asked.run, asked.checkpoint)
    ids = lens.ids(asked.text)
    reading = lens.read(ids[: asked.since + MOST_NEW], watch)
    since = min(asked.since, len(reading.ids))
    if 0 < since < len(reading.ids):  # an edit may have cut a character in two
        since = int(reading.starts[reading.starts <= since][-1])
    return reading_json(reading, asked.offset, since) | {"of": len(ids)}


def distribution(runs: Runs, asked: Request, watch: Watch) -> Json:
    lens = runs.lens(asked.run, asked.checkpoint)
    probabilities_V = lens.distribution(asked.text, asked.place, asked.layer, asked.offset)
    symbols = np.argsort(-probabilities_V, kind="stable")
    return {"symbols": symbols, "probabilities": probabilities_V[symbols]}


def corpus(runs: Runs, asked: Request, watch: Watch) -> Json:
    """A stretch of the validation split, cut to whole characters."""
    found = runs.corpus(asked.run)
    ids = found.splits["valid"].ids
    end = min(asked.start + asked.length, len(ids))
    starts = asked.start + np.flatnonzero(found.vocabulary.starts(ids[asked.start : end + 1]))
    first, last = (int(starts[0]), int(starts[-1])) if len(starts) else (end, end)
    data = found.vocabulary.decode(ids[first : end if end == len(ids) else last])
    return {"text": data.decode("utf-8", "surrogateescape"), "start": first, "of": len(ids)}


def compare(runs: Runs, asked: Request, watch: Watch) -> Json:
    """The cost of each character in two runs, whose vocabularies may differ."""
    readings = [runs.lens(run, own).read(asked.text, watch) for run, own in enumerate(asked.checkpoints)]
    bits = [reading.bits_by_character() for reading in readings]
    if len(bits[0]) != len(bits[1]):
        raise UserError("text: the two runs cut it into different characters; compare others", "text")
    pieces = [piece for piece in readings[0].pieces() if piece]
    return {"difference": bits[1] - bits[0], "bits": bits, "pieces": pieces}


def generate(runs: Runs, asked: Request, watch: Watch) -> Iterator[Json]:
    """An event for each symbol, with its text when a character is whole, and a last one."""
    lens = runs.lens(asked.run, asked.checkpoint)
    if asked.length > MAX_LENGTH:
        raise UserError(f"length={asked.length}: must be at most {MAX_LENGTH}", "length")
    how = asked.model_dump(include={"length", "temperature", "seed", "drafts"}) | {"top_k": asked.top_k or None}
    decoder, passes = getincrementaldecoder("utf-8")("surrogateescape"), 0
    for drawn in lens.generate(asked.text, watch=watch, **how):
        passes, cost = drawn.passes, float(-np.log2(drawn.before[drawn.symbol]))
        piece = decoder.decode(lens.trained.vocabulary.symbols[drawn.symbol])
        shown = {"before": _best(drawn.before), "after": _best(drawn.after)}
        yield {"symbol": drawn.symbol, "piece": piece, "bits": cost, "draft": drawn.draft} | shown
    yield {"done": True, "passes": passes, "symbols": asked.length, "piece": decoder.decode(b"", final=True)}


def _best(probabilities_V: np.ndarray) -> list[list[Any]]:
    symbols = np.argsort(-probabilities_V, kind="stable")[:SHOWN]
    return [[int(symbol), round(float(probabilities_V[symbol]), 6)] for symbol in symbols]


def _asking(method: Callable[..., Any], name: str, *options: str, watched: bool = False) -> Callable[..., Json]:
    """An answer that is what a method of `Lens` gives for the text and some fields of the request."""

    def found(runs: Runs, asked: Request, watch: Watch) -> Json:
        values = {option: getattr(asked, option) for option in options} | ({"watch": watch} if watched else {})
        return {"since": asked.since, name: method(runs.lens(asked.run, asked.checkpoint), asked.text, **values)}

    return found


ANSWERS: dict[str, Callable[[Runs, Request, Watch], Json | Iterator[Json]]] = {
    "read": read,
    "distribution": distribution,
    "follow": _asking(Lens.follow, "layers", "symbol", "offset", "since", watched=True),
    "attention": _asking(Lens.attention, "weights", "layer", "head", "place"),
    "unit": _asking(Lens.unit, "values", "layer", "unit", "since", watched=True),
    "ngrams": _asking(Lens.knockouts, "lengths", "place"),
    "corpus": corpus,
    "compare": compare,
    "generate": generate,
}
