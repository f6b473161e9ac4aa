# PYTHON_ARGCOMPLETE_OK
"""Score a run: python scripts/evaluate.py RUN --stride 1

On several GPUs: accelerate launch --multi_gpu scripts/evaluate.py RUN --split valid --json
"""

import atexit
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.config.adapt import AdaptConfig, ExpertName, fixed
from charlm.config.errors import shown
from charlm.files import OutputPath
from charlm.process import keep_freed_memory
from charlm.text import command, counted, say

if TYPE_CHECKING:
    from charlm.data.corpus import Corpus
    from charlm.inference.evaluation import EarlyExit, Score
    from charlm.runs.trained import TrainedModel


class Options(Section):
    """Score a run: bits per character and per byte of a split, with each symbol scored once."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The folder of a run or of an exported model, or OWNER/NAME of one on the hub."""
    split: Literal["valid", "test"] = "test"
    """The part of the corpus to score."""
    source: str | None = None
    """The source of a mixture to score, by its name in data.mixture. The default is all, by weight."""
    stride: int | None = None
    """Symbols from one window to the next. The paper's is 1; the default is half the context."""
    limit: int | None = None
    """Score only the first symbols of the split, this many; of a mixture as many of each source."""
    checkpoint: str = "best"
    """A checkpoint of the run: best, last or a step."""
    weights: Literal["average", "raw"] = "average"
    """raw: not the averaged weights of a run with train.average."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the matrix products."""
    batch_size: int | None = None
    """Windows that a process runs at once. The default depends on the device."""
    all_layers: bool = False
    """Score every layer that has a head."""
    mixture: Literal["hedge"] | None = None
    """Score the prediction of all layers together, weighted as hedge has learned."""
    early_exit: bool = False
    """Let the first layer that is sure enough predict, and show bits per character by layers used."""
    picture: OutputPath | None = None
    """Draw the curve of --early-exit into this file (.png, .svg, .pdf)."""
    as_compressor: bool = False
    """Score as compress.py codes, with its streams and stride, without writing a file."""
    streams: int | None = None
    """--as-compressor, --adapt, --experts: parts of the text that are read side by side. The default of --as-compressor
    depends on the text's length, the others' is 1."""
    adapting: Annotated[
        Literal["yes", "tune"] | None, cli.Flag("--adapt", dest="adapting", nargs="?", const="yes", metavar="tune")
    ] = None
    """Learn from every symbol after it was scored. tune: choose learning rates on the validation split."""
    adapt: AdaptConfig = AdaptConfig()
    experts: tuple[ExpertName, ...] = ()
    """Score a mixture of the network with these, which learns: heads of all layers; counts of the text so far, after
    contexts of 0 to 16 symbols; match, what followed the longest match; train: the training split is counted before.
    train without counts and match learns nothing from the scored text: its weights are fitted on validation."""
    yardsticks: bool = False
    """Also compress the scored bytes with gzip, bzip2 and xz."""
    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document."""
    data: cli.MovedCorpus = cli.MovedCorpus()


def main() -> None:
    options = cli.parse(Options)
    check(options)
    from accelerate import PartialState  # not before --help and mistakes were answered

    from charlm.data.sources import check_outside
    from charlm.training.device import launch_explained, leave_group, on_cpu

    keep_freed_memory()
    with launch_explained():
        processes = PartialState(cpu=on_cpu())
    atexit.register(leave_group)
    trained = charlm.load(options.run, options.checkpoint, device=processes.device, weights=options.weights)
    where = options.data.where(trained.config.data)
    if options.picture is not None:
        check_outside(where, "picture", options.picture)
    corpus = charlm.load_corpus(where, show_progress=processes.is_main_process)
    if options.source is not None:
        corpus = source_of(corpus, options.source)
    protocol = {name: getattr(options, name) for name in ("split", "stride", "limit", "batch_size", "precision")}
    adapt = cli.adapt_of(options.adapt, options.adapting)
    if options.adapting == "tune":
        del protocol["split"]
        tune(trained, corpus, options, protocol)
        return
    learning = {name: getattr(options, name) for name in ("streams", "experts")} | {"adapt": adapt}
    if options.early_exit:
        from charlm.inference.early_exit import early_exit

        score = early_exit(trained, corpus, **protocol)
    elif options.as_compressor:
        from charlm.compression.coder import score_as_compressor

        del protocol["batch_size"]
        score = score_as_compressor(trained, corpus, **protocol, **learning)
    else:
        score = charlm.bits_per_character(
            trained, corpus, all_layers=options.all_layers, mixture=options.mixture, **protocol, **learning
        )
    if processes.is_main_process:
        yardsticks = {}
        if options.yardsticks:
            from charlm.compression.report import compressed_sizes

            shares = trained.config.data.shares if corpus.sources else (1.0,)
            for share, ids in zip(shares, corpus.texts(options.split, options.limit), strict=True):
                text = corpus.vocabulary.decode(ids)
                for name, size in compressed_sizes([text]).items():
                    name = name.split()[0]
                    yardsticks[name] = yardsticks.get(name, 0.0) + share * 8 * size / len(text)
        if options.picture is not None:
            from charlm.report.figures import early_exit
            from charlm.report.style import save

            save(early_exit(score), options.picture)
        if options.as_json:
            say(json.dumps(score.as_dict() | ({"yardsticks": yardsticks} if yardsticks else {}), indent=2))
        else:
            planned = trained.config.train.steps if trained.options is None else None  # unknown if exported
            lines = describe(score, corpus.splits[options.split].symbols, planned, yardsticks)
            say("\n".join(lines + (describe_exits(score.early_exit) if options.early_exit else [])))


def check(options: Options) -> None:
    """Raise UserError for options that cannot be combined, before anything is computed."""
    if options.early_exit and options.mixture:
        raise charlm.UserError("--mixture and --early-exit cannot be combined")
    if options.as_compressor and (options.all_layers or options.mixture or options.early_exit or options.batch_size):
        raise charlm.UserError(
            "--as-compressor cannot be combined with --all-layers, --mixture, --early-exit or --batch-size"
        )
    if options.adapting and options.early_exit:
        raise charlm.UserError("--adapt and --early-exit cannot be combined", "adapt")
    if options.adapting == "tune" and (options.as_compressor or options.yardsticks or options.all_layers):
        raise charlm.UserError("--adapt tune cannot be combined with --as-compressor, --yardsticks or --all-layers")
    cli.adapt_of(options.adapt, options.adapting)
    if options.experts and (options.early_exit or options.adapting == "tune"):
        raise charlm.UserError("--experts cannot be combined with --early-exit or --adapt tune", "experts")
    if options.streams is not None and not (options.as_compressor or options.adapting or options.experts):
        problem = "--streams requires --as-compressor, --adapt or --experts"
        raise charlm.UserError(f"streams={options.streams}: {problem}")
    if options.picture is not None:
        if not options.early_exit:
            raise charlm.UserError(f"picture={options.picture}: --picture requires --early-exit")
        from charlm.report.style import check_suffix

        check_suffix(options.picture)


def tune(trained: "TrainedModel", corpus: "Corpus", options: Options, protocol: dict[str, Any]) -> None:
    """Try learning rates, show each, and then the command that scores the split with the best."""
    from charlm.inference.evaluation import tune

    scores = []
    for score in tune(trained, corpus, options.adapt, mixture=options.mixture, streams=options.streams, **protocol):
        scores.append(score)
        if not options.as_json:
            rates = ", ".join(f"{name} {score.adapt[name]:g}" for name in ("rate", "ngram_rate"))
            say(f"{rates}: {score.bits_per_character:.4f} bits per character of the valid split", flush=True)
    best = min(scores, key=lambda score: score.bits_per_character)
    if options.as_json:
        say(json.dumps({"best": best.as_dict(), "tried": [score.as_dict() for score in scores]}, indent=2))
        return
    defaults = AdaptConfig()
    words = [f"--adapt.{name}={value}" for name, value in best.adapt.items() if value != getattr(defaults, name)]
    for name in ("stride", "streams", "checkpoint", "weights", "precision", "mixture", "source"):
        if (own := getattr(options, name)) != Options.model_fields[name].default:
            words.append(f"--{name}={own}")
    say("Next:", command("evaluate.py", options.run, "--adapt", *words))


def source_of(corpus: "Corpus", name: str) -> "Corpus":
    """A source of a mixture as a corpus of its own."""
    from charlm.data.corpus import Corpus, Split

    if name not in corpus.sources:
        choices = ", ".join(corpus.sources) or "none, as the corpus is no mixture"
        raise charlm.UserError(f"source={name}: must be one of {choices}", "source")
    record, place = corpus.sources[name], list(corpus.sources).index(name)
    sizes = record["splits"].items()
    splits = {split: Split(ids=corpus.texts(split)[place], **own) for split, own in sizes}
    return Corpus(**record | {"vocabulary": corpus.vocabulary, "splits": splits})


def describe(score: "Score", symbols: int, planned: int | None, yardsticks: dict[str, float]) -> list[str]:
    """Lines for people: the figures, then the protocol.

    Args:
        symbols: the size of the whole split.
        planned: the steps of the whole run, if known.
    """
    error = score.standard_error or 0.0
    scored = f"{score.symbols:,}" if score.symbols == symbols else f"first {score.symbols:,} of {symbols:,}"
    of_planned = "" if planned is None else f" of {planned:,}"
    lines = [
        f"{score.bits_per_character:.4f} ± {error:.4f} bits per character, "
        f"{score.bits_per_byte:.4f} ± {error * score.characters / score.bytes:.4f} bits per byte",
        f"  {score.split} split of {score.corpus} (sha256 {score.corpus_sha256[:12]}), {score.checkpoint}{of_planned}",
        f"  {scored} symbols, {score.characters:,} characters, {score.bytes:,} bytes",
        f"  stride {score.stride}, context {score.context_length}, {score.precision}, {score.seconds:,.1f} s",
    ]
    if score.adapt:
        lines += textwrap.wrap(f"adaptive: {shown(score.adapt)}", 80, initial_indent="  ", subsequent_indent="  ")
    if score.experts:
        still = fixed(score.experts) and not score.adapt
        how = " (static: counts of the training split, weights fitted on validation)" * still
        lines.append(f"  mixed with experts: {', '.join(score.experts)}{how}")
    if score.network is not None:
        lines.append(f"  the network by itself: {score.network:.4f} bits per character")
    if score.streams is not None:
        compressed = f", {score.compressed_bytes:,} bytes compressed" if score.compressed_bytes is not None else ""
        lines.append(f"  {'as a compressor: ' * bool(compressed)}{counted(score.streams, 'stream')}{compressed}")
    for source, bits in (score.sources or {}).items():
        lines.append(f"  source {source}: {bits:.4f} bits per character")
    if score.mixture:
        weights = ", ".join(f"{layer}: {weight:.3f}" for layer, weight in score.mixture.items())
        lines += textwrap.wrap(f"mixture of layers {weights}", 80, initial_indent="  ", subsequent_indent="  ")
    if yardsticks:
        figures = ", ".join(f"{name} {bits:.4f}" for name, bits in yardsticks.items())
        lines.append(f"  the same bytes compressed: {figures} bits per byte")
    return lines + [
        f"  layer {layer:>2}: {bits:.4f} bits per character" for layer, bits in (score.layers or {}).items()
    ]


def describe_exits(curve: "EarlyExit") -> list[str]:
    """A table with a line for each threshold."""
    lines = [
        "early exit by entropy: each symbol is predicted by the first layer under the",
        f"threshold, chosen on {curve.chosen_on}.",
        "This counts layers used; scoring computes all of them.",
        "  quantile  threshold   layers used   bits per character",
    ]
    for point in curve.points:
        threshold = "any" if point.threshold is None else f"{point.threshold:.3f}"
        lines.append(
            f"  {point.quantile:8.2f}  {threshold:>9}  {point.mean_layers:12.2f}   {point.bits_per_character:18.4f}"
        )
    return lines


if __name__ == "__main__":
    cli.script(main)
