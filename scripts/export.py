# PYTHON_ARGCOMPLETE_OK
"""Export a run to a folder to share: python scripts/export.py RUN --to DIR

With only as many layers as are worth it: python scripts/export.py RUN --to DIR --depth auto --within 0.01
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.files import OutputPath
from charlm.formats import Format, save_model
from charlm.text import command, say

if TYPE_CHECKING:
    from charlm.runs.trained import TrainedModel


class Options(Section):
    """Export a model, or its lower layers, to a folder that can be shared and loaded without the run."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The folder of a run or of an exported model, or OWNER/NAME of one on the hub."""
    to: OutputPath
    """The folder to make."""
    format: Format = "charlm"
    """transformers: that library loads the folder too, once charlm.hf is imported. transformers-stock: it loads it
    without charlm, as a Starcoder2, which is exact for some models only; others are refused. onnx: with a graph for
    onnxruntime."""
    depth: int | Literal["auto"] | None = None
    """The layer to end the model at; it needs a head. auto: the lowest layer that is good enough."""
    within: float = 0.01
    """--depth auto: the most that the layer may lose against the best one, in bits per character of the valid split."""
    keep_heads: bool = False
    """Also keep the heads of lower layers and of later characters."""
    score: Literal["valid", "test"] | None = None
    """Score the exported model on this split, and record the score in its card."""
    stride: int | None = None
    """Stride of the score, as in scripts/evaluate.py."""
    limit: int | None = None
    """Score only the first symbols, this many. --depth auto: the default is as many as the run validated on."""
    checkpoint: str = "best"
    """A checkpoint of the run: best, last or a step."""
    weights: Literal["average", "raw"] = "average"
    """raw: not the averaged weights of a run with train.average."""
    data: cli.MovedCorpus = cli.MovedCorpus()


def main() -> None:
    options = cli.parse(Options)
    from charlm.data.sources import check_outside
    from charlm.inference.evaluation import score_at
    from charlm.runs.exported import check_absent, portable
    from charlm.runs.trained import shallowest, truncate

    check_absent(options.to)
    if not options.within >= 0:
        raise charlm.UserError(f"within={options.within}: must be a number of bits, at least 0")
    trained = charlm.load(options.run, options.checkpoint, weights=options.weights)
    check_outside(options.data.where(trained.config.data), "to", options.to)
    scores = ()
    if options.depth == "auto":
        limit = options.limit if options.limit is not None else trained.config.train.valid_symbols
        score = measured(trained, options, "valid", limit, all_layers=True)
        layers = {int(layer): bits for layer, bits in score.layers.items()}
        depth = shallowest(layers, options.within)
        say(f"valid split, first {score.symbols:,} symbols, stride {score.stride}:")
        for layer, bits in layers.items():
            say(f"  layer {layer:>2}: {bits:.4f} bits per character{'  <- exported' if layer == depth else ''}")
        scores = (score_at(score, depth),)
    else:
        depth = options.depth
    model = truncate(trained, depth, keep_heads=options.keep_heads)
    model = replace(model, scores=model.scores + scores)
    if options.score is not None:
        score = measured(model, options, options.score, options.limit)
        say(f"{options.score}: {score.bits_per_character:.4f} bits per character, {score.symbols:,} symbols")
        model = replace(model, scores=(*model.scores, score.as_dict()))
    save_model(model, options.to, options.format)
    say(f"{options.to}: {model.checkpoint}, {model.config.model.num_layers} layers")
    if options.format == "transformers-stock":
        return  # no script of ours reads it
    # An exported model does not know where this machine keeps its text.
    text, known = options.data.where(trained.config.data), portable(trained.config).data
    places = {name: getattr(text, name) for name in ("path", "as_is", "hub_id", "cache_dir")}
    flags = [f"--data.{name}={place}" for name, place in places.items() if place != getattr(known, name)]
    moved = {
        name: {key: str(place) for key, place in own if place != getattr(known.mixture[name], key)}
        for name, own in text.mixture.items()
    }
    if any(moved.values()):
        flags.append(f"--data.mixture={json.dumps(moved)}")
    say("Next:", command("evaluate.py", options.to, *flags))
    if options.format == "charlm":
        say(f'      charlm.push_to_hub(charlm.load({str(options.to)!r}), "OWNER/NAME")')


def measured(trained: "TrainedModel", options: Options, split: str, limit: int | None, **more):
    """A score of the model on a split of its corpus."""
    corpus = charlm.load_corpus(options.data.where(trained.config.data))
    return charlm.bits_per_character(trained, corpus, split=split, stride=options.stride, limit=limit, **more)


if __name__ == "__main__":
    cli.script(main)
