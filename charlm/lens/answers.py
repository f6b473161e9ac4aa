"""Requests of a page, and their answers in JSON."""

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from charlm.config import Section, UserError
from charlm.config.types import Count, Index, NonNegative
from charlm.lens.lens import Lens
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


def answer(runs: Runs, name: str, values: Mapping[str, Any]) -> Json | Iterator[Json]:
    """The answer to a request by its name, from `ANSWERS`; of "generate" an event for each symbol.

    Raises UserError for values that cannot be.
    """
    found = ANSWERS[name](runs, Request.read(values))
    return plain(found) if isinstance(found, dict) else map(plain, found)


def plain(value: Any) -> Any:
    """A value for JSON: rounded to 6 digits, and None for NaN, and for ids and layers below 0."""
    match value._asdict() if hasattr(value, "_asdict") else value:
        case dict(found):
            return {str(key): plain(own) for key, own in found.items()}
        case np.ndarray() | list() | tuple() as found:
            return list(map(plain, found.tolist() if isinstance(found, np.ndarray) else found))
        case float(found):
            return None if math.isnan(found) else round(found, 6)
        case int(found) if found < 0:
            return None
    return value


def reading_json(reading: Reading, offset: int = 1, since: int = 0) -> Json:
    """A reading from a place on."""
    characters = reading.vocabulary.count_characters(reading.ids)
    rate = float(reading.bits.sum()) / characters if characters else None
    symbol = int(reading.next_logits.argmax())
    follows = {"symbol": symbol, "probability": math.exp(reading.next_logits[symbol])}
    return {
        "since": since,
        "symbols": reading.ids[since:],
        "pieces": reading.pieces(since),
        "bits": reading.bits[since:],
        **grid_json(reading, offset, since),
        "total": {"bits_per_character": rate, "characters": characters} | reading.sizes(),
        "next": follows if len(reading.ids) else None,
    }


def grid_json(reading: Reading, offset: int, since: int = 0) -> Json:
    """The symbols that layers expected at the places from `since` on, and the layer that decided."""
    grid = reading.grid(offset).items()
    cells = {layer: {name: values[since:] for name, values in own._asdict().items()} for layer, own in grid}
    return {"grid": cells, "decided": reading.decided(offset)[since:]}


def whole(lens: Lens, text: str) -> Json:
    """The reading of a text for a page without a server: all offsets, and the likeliest symbols for each place."""
    reading = lens.read(Request.read({"text": text}).text)
    offsets = sorted({offset for _, offset in reading.pairs if offset > 1})
    count = min(LIKELIEST, reading.vocabulary.size)
    best = lens.expected(reading.ids[:-1], [lens.last], 1, 0, lambda own_MV: torch.stack(own_MV.topk(count), dim=1))
    values, symbols = best[lens.last].reshape(-1, 2, count).swapaxes(0, 1)
    likeliest = {"symbols": [[], *symbols.astype(int)], "probabilities": [[], *values]}
    others = {offset: grid_json(reading, offset) for offset in offsets}
    return plain(reading_json(reading) | {"others": others, "likeliest": likeliest})


def read(runs: Runs, asked: Request) -> Json:
    lens = _lens(runs, asked)
    ids = lens.ids(asked.text)
    reading = lens.read(ids[: asked.since + MOST_NEW])
    since = min(asked.since, len(reading.ids))
    if 0 < since < len(reading.ids):  # an edit may have cut a character in two
        since = int(reading.starts[reading.starts <= since][-1])
    return reading_json(reading, asked.offset, since) | {"of": len(ids)}


def distribution(runs: Runs, asked: Request) -> Json:
    best = _best(_lens(runs, asked).distribution(asked.text, asked.place, asked.layer, asked.offset))
    return dict(zip(("symbols", "probabilities"), zip(*best, strict=True), strict=True))


def corpus(runs: Runs, asked: Request) -> Json:
    found = runs.corpus(asked.run)
    start, data = found.stretch("valid", asked.start, asked.length)
    return {"text": data.decode("utf-8", "surrogateescape"), "start": start, "of": found.splits["valid"].symbols}


def compare(runs: Runs, asked: Request) -> Json:
    """The cost of each character in two runs, whose vocabularies may differ."""
    readings = [runs.lens(run, own).read(asked.text) for run, own in enumerate(asked.checkpoints)]
    bits = [reading.bits_by_character() for reading in readings]
    if len(bits[0]) != len(bits[1]):
        raise UserError("text: the two runs cut it into different characters; compare others", "text")
    pieces = [piece for piece in readings[0].pieces() if piece]
    return {"difference": bits[1] - bits[0], "bits": bits, "pieces": pieces}


def generate(runs: Runs, asked: Request) -> Iterator[Json]:
    """An event for each symbol, with its text when a character is whole, and a last one."""
    lens = _lens(runs, asked)
    if asked.length > MAX_LENGTH:
        raise UserError(f"length={asked.length}: must be at most {MAX_LENGTH}", "length")
    how = asked.model_dump(include={"length", "temperature", "seed", "drafts"}) | {"top_k": asked.top_k or None}
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    for drawn in lens.generate(asked.text, **how):
        piece = decoder.decode(lens.trained.vocabulary.symbols[drawn.symbol])
        spread = {"before": _best(drawn.before, SHOWN), "after": _best(drawn.after, SHOWN)}
        cost = {"bits": -math.log2(drawn.before[drawn.symbol])}
        yield {"symbol": drawn.symbol, "piece": piece, "draft": drawn.draft} | spread | cost
    piece = decoder.decode(b"", final=True)
    yield {"done": True, "passes": drawn.passes, "symbols": asked.length, "piece": piece}


ANSWERS: dict[str, Callable[[Runs, Request], Json | Iterator[Json]]] = {
    "read": read,
    "distribution": distribution,
    "follow": lambda runs, a: {"since": a.since, "layers": _lens(runs, a).follow(a.text, a.symbol, a.offset, a.since)},
    "attention": lambda runs, a: {"weights": _lens(runs, a).attention(a.text, a.layer, a.head, a.place)},
    "unit": lambda runs, a: {"since": a.since, "values": _lens(runs, a).unit(a.text, a.layer, a.unit, a.since)},
    "ngrams": lambda runs, a: {"lengths": _lens(runs, a).knockouts(a.text, a.place)},
    "corpus": corpus,
    "compare": compare,
    "generate": generate,
}


def _lens(runs: Runs, asked: Request) -> Lens:
    return runs.lens(asked.run, asked.checkpoint)


def _best(probabilities_V: np.ndarray, count: int | None = None) -> list[tuple[int, float]]:
    symbols = np.argsort(-probabilities_V, kind="stable")[:count]
    return list(zip(symbols.tolist(), probabilities_V[symbols].tolist(), strict=True))
