"""What a config stands for: its table of terms, parameters and FLOPs, before anything is trained.

Shapes: T positions, D d_model, V vocabulary, L layers.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from charlm.config import Config
from charlm.data.corpus import prepared_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.objective import head_pairs
from charlm.objective.schedules import Schedule
from charlm.objective.terms import Term, build_terms

PROGRESSES = (0.0, 0.25, 0.5, 0.75, 1.0)
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out. `to_dict` is for programs, `to_text` for people."""

    config: Config
    vocabulary_size: int
    vocabulary_is_known: bool
    """False where it depends on a corpus that is not prepared yet: then the size is that of bytes."""
    terms: tuple[Term, ...]
    """The table, ordered by layer, offset and positions."""
    parameters: dict[str, int]
    """training: the transformer and every head of the table; inference: the transformer and the one head it keeps."""
    flops_per_character: dict[str, int]
    """training_start, training_end and inference; see `training_flops` and `inference_flops`."""

    def to_dict(self) -> dict:
        """JSON-able. `terms[].weights` are pairs [progress, weight]; at progress 1 the limit from the left."""
        train, context_length = self.config.train, self.config.model.context_length
        return {
            "parameters": self.parameters,
            "flops_per_character": self.flops_per_character,
            "steps": train.steps,
            "characters_per_step": train.batch_size * context_length,
            "context_length": context_length,
            "vocabulary_size": self.vocabulary_size,
            "vocabulary_is_known": self.vocabulary_is_known,
            "terms": [
                {
                    "name": term.name,
                    "layer": term.layer,
                    "offset": term.offset,
                    "positions": term.positions,
                    "weights": [[p, term.weight(p) if p < 1.0 else term.weight.limit] for p in PROGRESSES],
                    "stops_at_step": stops_at_step(term.weight, train.steps),
                }
                for term in self.terms
            ],
        }

    def to_text(self, width: int = 80) -> str:
        """The figures, then a line per term: its weight at the start, where it stops, and a drawing `width` wide."""
        return "\n".join([*_summary(self), "", *_table(self.terms, self.config.train.steps, width)])


def explain(config: Config) -> Explanation:
    """Build the model of `config` on the meta device, where it takes no memory, and count.

    Raises:
        ConfigError: at some point of training every loss has weight zero.
    """
    model = config.model
    corpus = prepared_corpus(config.data) if config.data.vocabulary != ByteVocabulary.name else None
    vocabulary_size = corpus.vocabulary.size if corpus else ByteVocabulary.size
    terms = build_terms(config.aux, model.num_layers)
    with torch.device("meta"):
        transformer = CharTransformer(model, vocabulary_size)
        heads = Heads(model, vocabulary_size, head_pairs(terms, model.num_layers))
        last_head = Heads(model, vocabulary_size, [(model.num_layers, 1)])
    starting = [term for term in terms if term.weight(0.0) != 0.0]
    ending = [term for term in terms if term.weight.stops_at is None]
    return Explanation(
        config=config,
        vocabulary_size=vocabulary_size,
        vocabulary_is_known=corpus is not None or config.data.vocabulary == ByteVocabulary.name,
        terms=terms,
        parameters={
            "training": _num_parameters(transformer, heads),
            "inference": _num_parameters(transformer, last_head),
        },
        flops_per_character={
            "training_start": training_flops(transformer, heads, starting),
            "training_end": training_flops(transformer, heads, ending),
            "inference": inference_flops(transformer, last_head),
        },
    )


def training_flops(transformer: CharTransformer, heads: Heads, active_terms: Iterable[Term]) -> int:
    """Floating-point operations of one training step per character of its windows' T inputs.

        6 * (matrix parameters of the layers that run + those of the heads that run) + 12 * layers * D * T

    A matrix product costs 2 operations per parameter forward and 4 backward. Attention makes two products of 2 * D * T
    per layer and position, counted in full although half of it is masked. Only layers up to the highest active one
    run. A layer's heads run at all T positions if one of its rows does, else at the last alone, 1 / T of them.
    Embeddings and position tables are looked up, norms and activations are small: neither counts.
    """
    terms = list(active_terms)
    T, D = transformer.config.context_length, transformer.config.d_model
    depth = max(term.layer for term in terms)
    everywhere = {term.layer for term in terms if term.positions == "all"}
    head_parameters = sum(
        _matrix_parameters(heads.exits[f"layer{layer}"][f"offset{offset}"]) / (1 if layer in everywhere else T)
        for layer, offset in {(term.layer, term.offset) for term in terms}
    )
    return round(6 * (_trunk_parameters(transformer, depth) + head_parameters) + 12 * depth * D * T)


def inference_flops(transformer: CharTransformer, head: Heads) -> int:
    """Floating-point operations per character generated with a KV cache that is full, so an upper bound:

    2 * matrix parameters + 4 * L * D * T
    """
    config = transformer.config
    parameters = _trunk_parameters(transformer, config.num_layers) + _matrix_parameters(head)
    return 2 * parameters + 4 * config.num_layers * config.d_model * config.context_length


def stops_at_step(weight: Schedule, steps: int) -> int | None:
    """The first optimizer step of a run of `steps` from which `weight` stays zero; None if it never does.

    Step s runs at progress s / steps, and the division is the training loop's own: no rounding can part the two.
    """
    if weight.stops_at is None:
        return None
    step = bisect_left(range(steps), weight.stops_at, key=lambda step: step / steps)
    return step if step < steps else None


def _num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _trunk_parameters(transformer: CharTransformer, depth: int) -> int:
    """Matrix parameters that run once per position, up to layer `depth`."""
    ngrams = transformer.ngram_embedding
    return _matrix_parameters(transformer.blocks[:depth]) + (_matrix_parameters(ngrams) if ngrams is not None else 0)


def _matrix_parameters(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _short(number: float) -> str:
    """Three or more digits and a unit: 44.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}" if number < 10 * size else f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _summary(explanation: Explanation) -> list[str]:
    model, train = explanation.config.model, explanation.config.train
    parameters = {name: _short(count) for name, count in explanation.parameters.items()}
    flops = {name: _short(count) for name, count in explanation.flops_per_character.items()}
    lines = [
        f"model                {model.num_layers} layers of width {model.d_model}, context {model.context_length}",
        f"parameters           {parameters['training']} in training, {parameters['inference']} at inference",
        f"FLOPs per character  {flops['training_start']} in training ({flops['training_end']} at its end), "
        f"{flops['inference']} at inference",
        f"training             {train.steps:,} steps of {train.batch_size * model.context_length:,} characters",
    ]
    if not explanation.vocabulary_is_known:
        lines.append(
            f"vocabulary           {explanation.vocabulary_size} symbols assumed: scripts/prepare.py counts them"
        )
    return lines


def _table(terms: tuple[Term, ...], steps: int, width: int) -> list[str]:
    """The rows under their header, in columns as wide as their content; the strips take what is left of `width`."""
    stops = [stops_at_step(term.weight, steps) for term in terms]
    columns = [
        ["term", *(term.name for term in terms)],
        ["at start", *(f"{term.weight(0.0):.3g}" for term in terms)],
        ["stops at step", *("never" if step is None else f"{step:,}" for step in stops)],
    ]
    names, weights, steps_ = (max(map(len, column)) for column in columns)
    cells = max(16, width - names - weights - steps_ - 6)
    title = " weight over training " if cells > 24 else " weight "
    columns.append([f"0{title:─^{cells - 2}}1", *_strips(terms, cells)])
    return [
        f"{name:{names}}  {weight:>{weights}}  {stop:>{steps_}}  {strip}".rstrip()
        for name, weight, stop, strip in zip(*columns, strict=True)
    ]


def _strips(terms: tuple[Term, ...], cells: int) -> list[str]:
    """One strip of `cells` blocks per term, each cell the weight at its start against the highest of the table."""
    weights = [[term.weight(cell / cells) for cell in range(cells)] for term in terms]
    highest = max(map(max, weights))
    return ["".join(_block(weight / highest) for weight in row) for row in weights]


def _block(height: float) -> str:
    # Rounded up, so that only a weight of zero looks like one.
    return BLOCKS[math.ceil(round(height, 9) * (len(BLOCKS) - 1))]
