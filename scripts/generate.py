# PYTHON_ARGCOMPLETE_OK
"""Generate text with a run: python scripts/generate.py RUN --prompt "def main(" --length 500 --temperature 0.8

Several --prompt options are continued together, each by its own text.
--draft offsets, or --draft with the number of a layer that has a head, is faster; --exit-entropy can be.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.config.adapt import AdaptConfig
from charlm.text import say

RULE = 20 * "-"


class Options(Section):
    """Continue a prompt and print the text as it is generated; several prompts are printed when all are done."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    prompt: Annotated[tuple[str, ...], cli.Flag("--prompt", action="append", metavar="TEXT")]
    r"""The beginning of a text, as it is typed (in bash, $'a\nb' has two lines): at least one symbol, at most the
    model's context. May be given several times."""
    length: int = 500
    """Symbols to generate after the prompt."""
    temperature: float = 1.0
    """Below 1, unlikely symbols become rarer; 0 always takes the likeliest symbol."""
    top_k: int | None = None
    """Draw only from the k likeliest symbols."""
    top_p: float | None = None
    """Draw only from the likeliest symbols: as few as have at least this probability together."""
    seed: int = 0
    """The same seed gives the same text."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Literal["average", "raw"] = "average"
    """raw: not the averaged weights of a run with train.average."""
    adapt_to: Annotated[Path | None, cli.Flag("--adapt", dest="adapt_to", metavar="FILE")] = None
    """Read this file first, learning from it."""
    adapt: AdaptConfig = AdaptConfig()
    draft: Annotated[str | None, cli.Flag("--draft", metavar="offsets|LAYER")] = None
    """Draft several symbols for each pass of the model: with its heads for later symbols (offsets), or with the exit at
    a layer. At temperature 0 the text stays the same; else it follows the same distribution."""
    num_draft_tokens: int | None = None
    """The most symbols to draft for a pass."""
    exit_entropy: float | None = None
    """Let the first layer that predicts a symbol with an entropy under so many bits do so, and skip the layers above:
    faster in deep models with few exits. evaluate.py --early-exit shows about what a threshold costs."""


def main() -> None:
    options = cli.parse(Options)
    from charlm.inference.generation import stream  # not before --help and mistakes were answered

    adapt = cli.adapt_of(options.adapt, options.adapt_to)
    draft, statistics = parse_draft(options.draft), charlm.DraftStatistics()
    trained = charlm.load(options.run, options.checkpoint, weights=options.weights)
    if adapt is not None:
        trained = charlm.adapted(trained, options.adapt_to.read_bytes(), adapt)
    names = ("length", "temperature", "top_k", "top_p", "seed", "num_draft_tokens", "exit_entropy")
    how = {name: getattr(options, name) for name in names} | {"draft": draft, "statistics": statistics}
    write = say if sys.stdout.isatty() else print  # a file gets the text as it is
    start = time.perf_counter()
    if len(options.prompt) == 1:
        pieces = stream(trained, *options.prompt, **how)
        write(*options.prompt, end="", flush=True)
        for piece in pieces:
            write(piece, end="", flush=True)
        write()
    else:
        texts = charlm.generate(trained, options.prompt, show_progress=True, **how)
        write(f"\n{RULE}\n".join(prompt + text for prompt, text in zip(options.prompt, texts, strict=True)))
    if draft is not None:
        say(
            f"num_draft_tokens {statistics.num_draft_tokens}, acceptance_rate {statistics.acceptance_rate:.3f}, "
            f"{statistics.characters_per_pass:.2f} characters per pass",
            file=sys.stderr,
        )
    if exits := statistics.exits:
        speed, total = exits.total() / (time.perf_counter() - start), exits.total()
        layers = ", ".join(f"layer {layer} {exits[layer] / total:.0%}" for layer in sorted(exits))
        mean = sum(layer * count for layer, count in exits.items()) / total
        say(f"predicted by {layers}; {mean:.2f} layers on average, {speed:,.0f} symbols per second", file=sys.stderr)


def parse_draft(text: str | None) -> str | int | None:
    """The value of --draft: offsets or a layer."""
    if text is None or text == "offsets":
        return text
    if not text.isdecimal():
        raise charlm.UserError(f"draft={text}: must be offsets or the number of a layer")
    return int(text)


if __name__ == "__main__":
    cli.script(main)
