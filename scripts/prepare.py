# PYTHON_ARGCOMPLETE_OK
"""Fetch, verify and cache a corpus: python scripts/prepare.py --data.corpus=enwik8 [--data.path=FILE]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.text import command, say


class Options(cli.WithConfig):
    """Fetch, verify and cache a corpus before training."""


def main() -> None:
    config = cli.parse(Options).config
    if config.run.init_from or config.run.branch_from:  # whose vocabulary counts
        from charlm.training.origin import resolved

        config = resolved(config, continues=False)
    corpus = charlm.load_corpus(config.data)
    say(
        f"{corpus.name} from {corpus.source}",
        f"sha256 {corpus.sha256}",
        f"vocabulary {corpus.vocabulary.name} of {corpus.vocabulary.size} symbols",
        sep="\n",
    )
    for name, source in corpus.sources.items():
        say(f"source {name}: {source['name']} from {source['source']}, sha256 {source['sha256']}")
    for name, split in corpus.splits.items():
        say(f"{name:>5}: {split.symbols:,} symbols, {split.characters:,} characters, {split.bytes:,} bytes")
    say(f"kept in {config.data.cache_dir.expanduser()}\nNext: {command('train.py', *sys.argv[1:])}")


if __name__ == "__main__":
    cli.script(main)
