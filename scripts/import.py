# PYTHON_ARGCOMPLETE_OK
"""Make a charlm model of one of nanoGPT or transformers: python scripts/import.py FOLDER --to DIR

With the text that it is to be scored on: python scripts/import.py FOLDER --to DIR --data.path=FILE
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.config.load import load_config
from charlm.files import OutputPath, read_json
from charlm.text import command, say

if TYPE_CHECKING:
    from charlm.data.vocabulary import Vocabulary


class Text(Section):
    """The text to score the model on."""

    corpus: Literal["enwik8", "text8", "file"] | None = None
    """As in training; with a path the default is file."""
    path: Path | None = None
    """A copy of enwik8 or text8, or the file or folder for corpus=file."""
    as_is: bool | None = None
    """Take files as they are, also hidden, packed and binary ones."""
    cache_dir: Path | None = None
    """Folder for prepared corpora."""


class Options(Section):
    """Import a nanoGPT, GPT-2, GPT-NeoX or Starcoder2 of bytes or characters, if charlm computes exactly the same."""

    folder: Annotated[Path, cli.Flag("folder", metavar="FOLDER")]
    """config.json and model.safetensors, with meta.json for characters; docs/sharing.md shows how to make them."""
    to: OutputPath
    """The folder to make."""
    data: Text = Text()


def main() -> None:
    options = cli.parse(Options)
    from charlm.data.sources import check_outside
    from charlm.formats.imported import read_model
    from charlm.runs.exported import check_absent, save_model

    check_absent(options.to)
    vocabulary, order = vocabulary_of(options.folder)
    given, config = options.data.model_dump(mode="json", exclude_none=True), None
    if given:
        given = {"corpus": "file", "vocabulary": vocabulary.name} | given
        if vocabulary.name != "bytes":
            given["characters"] = b"".join(vocabulary.symbols[vocabulary.first_character :]).decode()
        config = load_config((), {"data": given})
        check_outside(config.data, "to", options.to)
    try:
        model = read_model(options.folder, vocabulary, order)
    except ImportError as error:
        raise charlm.UserError(f"{options.folder}: {error}", "folder") from None
    if config is not None:
        corpus = charlm.load_corpus(config.data)
        own = {"corpus": corpus.model_dump(), "vocabulary": corpus.vocabulary}
        model = replace(model, config=model.config.replace(data=config.data), **own)
    save_model(model, options.to)
    say(f"{options.to}: {model.config.model.num_layers} layers, {vocabulary.size:,} {vocabulary.name}")
    if config is not None:
        places = options.data.model_dump(mode="json", exclude_none=True, exclude={"corpus"})
        say("Next:", command("evaluate.py", options.to, *(f"--data.{name}={place}" for name, place in places.items())))


def vocabulary_of(folder: Path) -> tuple["Vocabulary", list[int]]:
    """The vocabulary of a model, and for each of its ids the model's."""
    from charlm.data.vocabulary import ByteVocabulary, CharacterVocabulary, vocabulary_from_dict

    if not folder.is_dir():
        raise charlm.UserError(f"{folder}: no folder; docs/sharing.md shows how to make one of a checkpoint", "folder")
    if (path := folder / "vocabulary.json").exists():  # in folders of export.py --format transformers-stock
        vocabulary = vocabulary_from_dict(read_json(path))
        return vocabulary, list(range(vocabulary.size))
    if (path := folder / "meta.json").exists():
        ids = read_json(path, kind=dict[Literal["stoi"], dict[str, int]]).get("stoi", {})
        order = [ids[character] for character in sorted(ids)]
        if ids and sorted(order) == list(range(len(ids))) and {*map(len, ids)} == {1}:
            return CharacterVocabulary("".join(sorted(ids))), order
        raise charlm.UserError(f"{path}: stoi must give each character an id, from 0 on", "stoi")
    if found := [name for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if (folder / name).exists()]:
        text = "its ids may be no bytes; give meta.json, or remove the file if they are (docs/sharing.md)"
        raise charlm.UserError(f"{folder / found[0]}: {text}", "vocabulary")
    return ByteVocabulary(), list(range(256))


if __name__ == "__main__":
    cli.script(main)
