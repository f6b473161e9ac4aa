"""Requests of a page, and their answers in JSON."""

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field
from pydantic_core import to_jsonable_python

from charlm.config import Section, UserError
from charlm.config.types import Count, Index, NonNegative
from charlm.lens.lens import Lens, Reading, common
from charlm.lens.runs import MAX_LENGTH, MAX_TEXT, Runs

MOST_NEW = 4096
"""Symbols of an answer: a page shows the beginning of a long text while the rest is read."""
SHOWN, LIKELIEST = 8, 5
"""Likeliest symbols of the distributions of a symbol that was drawn, and of those of a page without a server."""
Json = dict[str, Any]


class Request(Section):
    """A question about a text, read by a checkpoint of a run; each uses some of the fields."""

    run: Annotated[int, Field(ge=0, le=1)] = 0
    checkpoint: str | None = None
    checkpoints: tuple[str | None, str | None] = (None, None)
    text: Annotated[str, AfterValidator(str), Field(max_length=MAX_TEXT)] = ""  # this order allows lone surrogates
    layer: Count = 1
    offset: Count = 1
    place: Index = 0
    since: Index = 0
    most: Annotated[int, Field(ge=1, le=MOST_NEW)] = MOST_NEW
    head: Index = 0
    unit: Index = 0
    symbol: Index = 0
    start: Index = 0
    length: Annotated[int, Field(ge=1, le=10 * MAX_LENGTH)] = 1
    temperature: NonNegative = 1.0
    top_k: Index | None = None
    seed: Annotated[Index, Field(lt=2**63)] = 0
    drafts: bool = False


def answer(runs: Runs, name: str, values: Mapping[str, Any]) -> Json | Iterator[Json]:
    """The answer to a request by its name, from `ANSWERS`; of "generate" an event for each symbol."""
    asked = Request.read(values)
    found = ANSWERS[name](runs.lens(asked.run, asked.checkpoint), asked, runs)
    return plain(found) if isinstance(found, dict) else map(plain, found)


def _numbers(array: np.ndarray) -> list[Any]:
    """Rounded to 6 digits, and None for ids and layers below 0."""
    whole = array.dtype.kind == "i"
    return (np.where(array < 0, None, array) if whole else array.astype(float).round(6)).tolist()


plain = partial(to_jsonable_python, inf_nan_mode="null", fallback=_numbers)
"""A value for JSON."""


def read(lens: Lens, asked: Request, runs: Runs) -> Json:
    ids = lens.ids(asked.text)
    reading = lens.read(ids[: max(asked.since + asked.most, common(ids, lens.reading.ids))])
    since = min(asked.since, len(reading.ids))
    if 0 < since < len(reading.ids):  # an edit may have cut a character in two
        since = int(lens.trained.vocabulary.begins(reading.ids[: since + 1])[-1])
    return reading_json(reading, asked.offset, since) | {"of": len(ids)}


def reading_json(reading: Reading, offset: int = 1, since: int = 0) -> Json:
    """A reading from a place on, and what layers expected there `offset` symbols before."""
    characters = reading.vocabulary.count_characters(reading.ids)
    rate = float(reading.bits.sum()) / characters if characters else None
    symbol = int(reading.next_logits.argmax())
    follows = {"symbol": symbol, "probability": math.exp(reading.next_logits[symbol])}
    grid = reading.grid(offset).items()
    return {
        "since": since,
        "symbols": reading.ids[since:],
        "pieces": reading.pieces(since),
        "bits": reading.bits[since:],
        "grid": {layer: {name: own[since:] for name, own in cells._asdict().items()} for layer, cells in grid},
        "decided": reading.decided(offset)[since:],
        "total": {"bits_per_character": rate, "characters": characters} | reading.sizes(),
        "next": follows if len(reading.ids) else None,
    }


def whole(lens: Lens, text: str) -> Json:
    """The reading of a text for a page without a server: all offsets, and the likeliest symbols for each place."""
    reading, count = lens.read(Request.read({"text": text}).text), min(LIKELIEST, lens.trained.vocabulary.size)
    found = lens.measured(
        reading.ids[:-1], 0, lambda states: torch.stack(lens.probabilities(states, lens.last).topk(count), dim=1)
    )
    values, symbols = found.reshape(-1, 2, count).swapaxes(0, 1)
    best = {"symbols": [[], *symbols.astype(int)], "probabilities": [[], *values]}
    parts = {offset: reading_json(reading, offset) for _, offset in reading.pairs}
    others = {offset: {name: own[name] for name in ("grid", "decided")} for offset, own in parts.items() if offset > 1}
    return plain(parts[1] | {"others": others, "likeliest": best})


def distribution(lens: Lens, asked: Request, runs: Runs) -> Json:
    best = _best(lens.distribution(asked.text, asked.place, asked.layer, asked.offset))
    return dict(zip(("symbols", "probabilities"), zip(*best, strict=True), strict=True))


def corpus(lens: Lens, asked: Request, runs: Runs) -> Json:
    found = runs.corpus(asked.run)
    start, data = found.stretch("valid", asked.start, asked.length)
    return {"text": data.decode("utf-8", "surrogateescape"), "start": start, "of": found.splits["valid"].symbols}


def compare(lens: Lens, asked: Request, runs: Runs) -> Json:
    """The cost of each character in two runs, whose vocabularies may differ."""
    readings = [runs.lens(run, own).read(asked.text) for run, own in enumerate(asked.checkpoints)]
    bits = [reading.bits_by_character() for reading in readings]
    if len(bits[0]) != len(bits[1]):
        raise UserError("text: the two runs cut it into different characters; compare others", "text")
    return {"difference": bits[1] - bits[0], "bits": bits, "pieces": list(filter(None, readings[0].pieces()))}


def generate(lens: Lens, asked: Request, runs: Runs) -> Iterator[Json]:
    """An event for each symbol, with its text when a character is whole, and a last one."""
    if asked.length > MAX_LENGTH:
        raise UserError(f"length={asked.length}: must be at most {MAX_LENGTH}", "length")
    how = asked.model_dump(include={"length", "temperature", "seed", "drafts"}) | {"top_k": asked.top_k or None}
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    for drawn in lens.generate(asked.text, **how):
        yield {
            "symbol": drawn.symbol,
            "piece": decoder.decode(lens.trained.vocabulary.symbols[drawn.symbol]),
            "draft": drawn.draft,
            "before": _best(drawn.before, SHOWN),
            "after": _best(drawn.after, SHOWN),
            "bits": -math.log2(drawn.before[drawn.symbol]),
        }
    yield {"done": True, "passes": drawn.passes, "symbols": asked.length, "piece": decoder.decode(b"", final=True)}


ANSWERS: dict[str, Callable[[Lens, Request, Runs], Json | Iterator[Json]]] = {
    "read": read,
    "distribution": distribution,
    "follow": lambda lens, a, runs: {"since": a.since, "layers": lens.follow(a.text, a.symbol, a.offset, a.since)},
    "attention": lambda lens, a, runs: {"weights": lens.attention(a.text, a.layer, a.head, a.place)},
    "unit": lambda lens, a, runs: {"since": a.since, "values": lens.unit(a.text, a.layer, a.unit, a.since)},
    "ngrams": lambda lens, a, runs: {"lengths": [own._asdict() for own in lens.knockouts(a.text, a.place)]},
    "corpus": corpus,
    "compare": compare,
    "adapted": lambda lens, a, runs: {"bits": lens.adapted(a.text), "pieces": lens.read(a.text).pieces()},
    "generate": generate,
}


def _best(probabilities_V: np.ndarray, count: int | None = None) -> list[tuple[int, float]]:
    symbols = np.argsort(-probabilities_V, kind="stable")[:count]
    return list(zip(symbols.tolist(), probabilities_V[symbols].tolist(), strict=True))
