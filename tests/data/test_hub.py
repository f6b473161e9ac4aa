"""Datasets: local folders of parquet files, and the hub, for which a server on the loopback interface stands in."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from charlm.config import DataConfig, UserError
from charlm.data import sources
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.sources import HUB_IDS, PUBLISHED, find_source
from fake_hub import FakeHub, fake_hub
from tiny import SCRIPTS

DOCUMENTS = [f"document {number} é" for number in range(100)]
FIRST, SECOND = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
PREPARE = f"""
import runpy, sys, time
time.sleep = lambda _: None  # between the attempts of a download
runpy.run_path("{SCRIPTS}/prepare.py", run_name="__main__")
"""


def write_split(path: Path, documents: list, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, **columns}), path)
    return path


def link_to_folder(path: Path) -> None:
    """Make a link to a folder with a split."""
    path.symlink_to(write_split(path.parent.with_name("elsewhere") / FIRST, DOCUMENTS).parent)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training split in two files, and nothing else."""
    write_split(tmp_path / "set" / FIRST, DOCUMENTS[:70], number=list(range(70)))
    write_split(tmp_path / "set" / SECOND, DOCUMENTS[70:], number=list(range(30)))
    return tmp_path / "set"


@pytest.fixture
def config(tmp_path, folder) -> DataConfig:
    return DataConfig(corpus="hub", hub_id=str(folder), cache_dir=tmp_path / "cache")


def texts(corpus: Corpus) -> dict[str, str]:
    return {name: corpus.vocabulary.decode(split.ids).decode() for name, split in corpus.splits.items()}


@pytest.mark.parametrize("separator", ["\n", "", "<end>\n\n"])
def test_documents_are_joined_by_the_separator(config, separator):
    """Guards against documents that run together, a separator that is doubled where batches or files meet, and one
    before the first or after the last document; against fractions of the documents in place of the text."""
    corpus = load_corpus(config.replace(separator=separator))
    text = separator.join(DOCUMENTS)
    assert "".join(texts(corpus).values()) == text
    for split in ("valid", "test"):
        assert abs(corpus.splits[split].bytes - 0.05 * len(text.encode())) <= 2


@pytest.mark.parametrize("there", [["validation"], ["test"], ["validation", "test"]])
@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_splits_of_the_dataset_are_kept(config, folder, there, vocabulary):
    """Guards against held-out text that is trained on, and splits that change places when only one is there."""
    for split in there:
        write_split(folder / f"{split}-00000-of-00001.parquet", [f"{split} one", f"{split} two"])
    found = texts(load_corpus(config.replace(vocabulary=vocabulary)))
    own = {{"validation": "valid"}.get(split, split): f"{split} one\n{split} two" for split in there}
    assert {name: found[name] for name in own} == own
    rest = [found[name] for name in ("train", "valid", "test") if name not in own]
    assert "".join(rest) == "\n".join(DOCUMENTS)
    assert all(rest)


def test_splits_and_column_by_name(config, folder):
    """Guards against names that are ignored, and a split that is both named and found by default."""
    (folder / SECOND).unlink()
    for split in ("validation", "test"):
        write_split(folder / f"{split}-00000-of-00001.parquet", [split] * 3, body=[f"{split} body"] * 3)
    write_split(folder / FIRST, ["x"], body=["train body"])
    options = {"text_column": "body", "train_split": "validation", "valid_split": "train", "valid_fraction": 0.1}
    found = texts(load_corpus(config.replace(**options)))
    assert found == {
        "train": "\n".join(["validation body"] * 3),
        "valid": "train body",
        "test": "\n".join(["test body"] * 3),
    }


def test_a_changed_folder_is_prepared_anew(config, folder):
    """Guards against the old text served for the new."""
    load_corpus(config)
    write_split(folder / SECOND, ["another"])
    assert "".join(texts(load_corpus(config)).values()) == "\n".join([*DOCUMENTS[:70], "another"])


@pytest.mark.parametrize(
    ("options", "option", "parts"),
    [
        ({"text_column": "body"}, "data.hub_id", ["'body'", "--data.text_column"]),
        ({"text_column": "number"}, "data.text_column", ["row 0 of split 'train' holds int, not text"]),
        ({"train_split": "training"}, "data.hub_id", ["no split 'training'", "train (--data.train_split"]),
        ({"valid_split": "dev"}, "data.hub_id", ["no split 'dev'", "--data.valid_split"]),
        ({"hub_config": "german"}, "data.hub_id", ["'german' not found", "--data.hub_config"]),
    ],
)
def test_what_a_dataset_lacks_is_named(config, options, option, parts, refused):
    """Guards against tracebacks from the library, messages without the choices, and debris."""
    with refused(option, f"data.hub_id={config.hub_id}", *parts):
        load_corpus(config.replace(**options))
    assert [path.suffix for path in config.cache_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("spoil", "option", "complaint"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], "hub_id", "cannot be read"),
        (lambda folder: (folder / SECOND).write_bytes(b"no parquet"), "hub_id", "cannot be read"),
        (lambda folder: (folder / "set.py").write_text("raise SystemExit"), "hub_id", "--data.hub_revision"),
        (lambda folder: link_to_folder(folder / "more"), "hub_id", "more lies behind a link"),
        (lambda folder: write_split(folder / SECOND, ["a", None]), "text_column", "row 71 of"),
        (lambda folder: write_split(folder / SECOND, [None]), "text_column", "--data.skip_null=true"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(config, folder, spoil, option, complaint, refused):
    """Guards against a traceback from the library, a dataset's script that is run or silently passed over, the word
    None in the text, and documents that are silently left out."""
    spoil(folder)
    with refused(f"data.{option}", f"data.hub_id={folder}: ", complaint):
        load_corpus(config)


@pytest.mark.parametrize("rows", [[None, "a", None], ["a", None, None, "b"], [None] * 200 + ["a"], ["", None, "a"]])
def test_null_is_skipped_if_asked(config, folder, rows):
    """Guards against separators around rows that are not there, also where a whole batch is null, and against an old
    text served for the new."""
    write_split(folder / FIRST, rows, number=list(range(len(rows))))
    corpus = load_corpus(config.replace(skip_null=True))
    assert "".join(texts(corpus).values()) == "\n".join([row for row in rows if row is not None] + DOCUMENTS[70:])
    with pytest.raises(UserError, match="holds null"):
        load_corpus(config)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "~/no/such/folder"])
def test_a_folder_that_is_not_there_is_refused(config, path, refused):
    """Guards against asking the hub for a path."""
    with refused("data.hub_id", "no/such/folder: cannot read"):
        load_corpus(config.replace(hub_id=path))


def test_lm1b_is_a_dataset(config, folder):
    """Guards against the first lm1b of the hub, which needs a script."""
    assert HUB_IDS["lm1b"] == "dvruette/lm1b"
    assert find_source(DataConfig(corpus="lm1b"), config.cache_dir, False).choice == ("data.hub_id", "dvruette/lm1b")
    corpus = load_corpus(config.replace(corpus="lm1b"))
    assert corpus.name == "lm1b"
    assert "".join(texts(corpus).values()) == "\n".join(DOCUMENTS)


def test_text8_comes_from_its_mirror_where_its_own_address_fails(tmp_path, server, enwik8, monkeypatch, refused):
    """Guards against a mirror that is never asked, joined wrongly, or believed without its checksum."""
    assert PUBLISHED["text8"].mirror == "afmck/text8"
    published = replace(PUBLISHED["enwik8"], mirror=str(tmp_path / "mirror"))
    monkeypatch.setitem(PUBLISHED, "text8", published)
    opener = sources.open_dataset
    monkeypatch.setattr(sources, "open_dataset", lambda where, *rest: opener(Path(where), *rest))
    text = enwik8.decode()
    for split, part in {"train": text[:400], "validation": text[400:450], "test": text[450:]}.items():
        write_split(tmp_path / "mirror" / f"{split}-00000-of-00001.parquet", [part])
    server.statuses = [404] * 12
    config = DataConfig(corpus="text8", cache_dir=tmp_path / "cache")
    corpus = load_corpus(config)
    assert "".join(texts(corpus).values()) == text
    assert [split.bytes for split in corpus.splits.values()] == [450, 25, 25]
    write_split(tmp_path / "mirror" / "test-00000-of-00001.parquet", [text[450:].upper()])
    with refused("data.corpus", "text8: has sha256"):
        load_corpus(config.replace(cache_dir=tmp_path / "other"))
    (tmp_path / "mirror" / "test-00000-of-00001.parquet").unlink()
    with refused("data.corpus", "404", "\nIts mirror", "no split 'test'"):
        load_corpus(config.replace(cache_dir=tmp_path / "third"))


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    """A hub with two datasets, of which one needs a script."""
    with fake_hub(tmp_path) as hub:
        plain = write_split(tmp_path / "plain" / "train.parquet", DOCUMENTS)
        hub.files["owner/plain"] = {"train.parquet": plain.read_bytes()}
        hub.files["owner/script"] = {"script.py": b"raise SystemExit('the script was run')"}
        yield hub


def test_a_dataset_of_the_hub_is_fetched_once(hub, tmp_path, monkeypatch):
    """Guards against a dataset that is asked for again once it is prepared, or once the library has it."""
    data = ["--data.corpus=hub", "--data.hub_id=owner/plain", "--data.hub_revision=v1"]
    prepared = hub.run(PREPARE, *data)
    assert "hub from owner/plain@v1" in prepared.stdout, prepared.stderr
    hub.answered.clear()
    again = hub.run(PREPARE, *data, "--data.separator=|", HF_HUB_OFFLINE="1")  # another separator is another text
    assert again.returncode == 0, again.stderr
    monkeypatch.setattr(sources, "open_dataset", lambda *_: pytest.fail("it was opened again"))
    for separator in "\n|":
        options = {"hub_id": "owner/plain", "hub_revision": "v1", "separator": separator}
        corpus = load_corpus(DataConfig(corpus="hub", cache_dir=tmp_path / "cache", **options))
        assert "".join(texts(corpus).values()) == separator.join(DOCUMENTS)
    assert hub.answered == []


NO_NETWORK = ["--data.hub_id=FOLDER", "HF_HOME"]


@pytest.mark.parametrize(
    ("hub_id", "environment", "parts"),
    [
        ("owner/script", {}, ["needs code of its own", "never run"]),
        ("owner/nothing", {}, ["hf auth login"]),
        ("owner/plain", {"HF_HUB_OFFLINE": "1"}, NO_NETWORK),
        ("owner/plain", {"HF_ENDPOINT": "http://127.0.0.1:1"}, NO_NETWORK),
    ],
)
def test_a_dataset_that_cannot_be_had(hub, tmp_path, hub_id, environment, parts):
    """Guards against tracebacks, other exit codes than 2, and debris: the hub has no such dataset, or only its script;
    the library is told that there is no network, or finds that out."""
    done = hub.run(PREPARE, "--data.corpus=hub", f"--data.hub_id={hub_id}", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for part in (f"data.hub_id={hub_id}", *parts):
        assert part in done.stderr
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
