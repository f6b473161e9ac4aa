"""Datasets: local folders of parquet files, and the hub, for which a server on the loopback interface stands in."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from charlm.config import ConfigError, DataConfig, UserError
from charlm.data import sources
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.sources import HUB_IDS, PUBLISHED, find_source
from fake_hub import FakeHub, fake_hub
from tiny import SCRIPTS, TINY

DOCUMENTS = [f"document {number} é" for number in range(100)]
WITHOUT_PAUSES = "import time; time.sleep = lambda _: None"  # between the attempts of a download
DRIVER = f"""
import json, runpy, sys
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(f"{SCRIPTS}/{{script}}.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print("\\f")
"""


def write_split(path: Path, documents: list, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, **columns}), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training split in two files, and nothing else."""
    write_split(tmp_path / "set" / "train-00000-of-00002.parquet", DOCUMENTS[:70], number=list(range(70)))
    write_split(tmp_path / "set" / "train-00001-of-00002.parquet", DOCUMENTS[70:], number=list(range(30)))
    return tmp_path / "set"


@pytest.fixture
def config(tmp_path, folder) -> DataConfig:
    return DataConfig(corpus="hub", hub_id=str(folder), cache_dir=tmp_path / "cache")


def texts(corpus: Corpus) -> dict[str, str]:
    return {name: corpus.vocabulary.decode(split.ids).decode() for name, split in corpus.splits.items()}


@pytest.mark.parametrize("separator", ["\n", "", "<end>\n\n"])
def test_documents_are_joined_by_the_separator(config, separator):
    """Guards against documents that run together, a separator that is doubled where batches or files meet, and one
    before the first or after the last document."""
    corpus = load_corpus(config.replace(separator=separator))
    assert "".join(texts(corpus).values()) == separator.join(DOCUMENTS)


def test_validation_and_test_are_held_out_where_there_are_none(config):
    """Guards against fractions of the documents in place of the text, and against a split that is used twice."""
    corpus = load_corpus(config)
    size = len("\n".join(DOCUMENTS).encode())
    assert abs(corpus.splits["valid"].bytes - size * 0.05) <= 2
    assert abs(corpus.splits["test"].bytes - size * 0.05) <= 2
    assert corpus.splits["train"].ids[0] == ord("d")


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
    (folder / "train-00001-of-00002.parquet").unlink()
    for split in ("validation", "test"):
        write_split(folder / f"{split}-00000-of-00001.parquet", [split] * 3, body=[f"{split} body"] * 3)
    write_split(folder / "train-00000-of-00002.parquet", ["x"], body=["train body"])
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
    write_split(folder / "train-00001-of-00002.parquet", ["another"])
    assert "".join(texts(load_corpus(config)).values()) == "\n".join([*DOCUMENTS[:70], "another"])


def test_a_prepared_dataset_is_not_asked_for_again(config, monkeypatch):
    """Guards against a run that needs the network, or reads gigabytes, at every start."""
    first = load_corpus(config)
    monkeypatch.setattr(sources, "open_dataset", lambda *_: pytest.fail("it was opened again"))
    assert load_corpus(config).to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"text_column": "body"}, ["no column 'body'", "--data.text_column", "text, number"]),
        ({"text_column": "number"}, ["row 0 of split 'train' holds int, not text"]),
        ({"train_split": "training"}, ["no split 'training'", "train (--data.train_split"]),
        ({"valid_split": "dev"}, ["no split 'dev'", "--data.valid_split"]),
        ({"test_split": "held"}, ["no split 'held'"]),
        ({"hub_config": "german"}, ["'german' not found", "--data.hub_config"]),
    ],
)
def test_what_a_dataset_lacks_is_named(config, options, parts):
    """Guards against tracebacks from the library, messages without the choices, and debris."""
    with pytest.raises(UserError) as error:
        load_corpus(config.replace(**options))
    for part in (f"data.hub_id={config.hub_id}", *parts):
        assert part in str(error.value)
    assert [path.suffix for path in config.cache_dir.iterdir()] == [".lock"]


def test_a_row_without_text_is_named(config, folder):
    """Guards against the word None in the text, and documents that are silently left out."""
    write_split(folder / "train-00001-of-00002.parquet", ["one", None, "two"], number=[0, 1, 2])
    with pytest.raises(UserError, match="row 71 of split 'train' holds NoneType, not text"):
        load_corpus(config)


def test_code_is_never_run(config, folder):
    """Guards against a dataset's script that is run, or silently passed over."""
    (folder / f"{folder.name}.py").write_text("raise SystemExit('the script was run')")
    with pytest.raises(UserError, match=r"needs code of its own, which is never run.*--data.hub_revision"):
        load_corpus(config)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: [file.unlink() for file in folder.iterdir()],
        lambda folder: (folder / "train-00001-of-00002.parquet").write_bytes(b"no parquet"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(config, folder, spoil):
    """Guards against a traceback from the library."""
    spoil(folder)
    with pytest.raises(UserError, match=f"data.hub_id={folder}: "):
        load_corpus(config)


def test_a_folder_that_is_not_there_is_refused(config):
    """Guards against asking the hub for a path."""
    for path in ("/no/such/folder", "./no/such/folder", "~/no/such/folder"):
        with pytest.raises(UserError, match=r"data.hub_id=/.*no/such/folder: cannot read"):
            load_corpus(config.replace(hub_id=path))


@pytest.mark.parametrize(
    ("options", "option"), [({}, "corpus"), ({"hub_id": "a/b", "test_split": "train"}, "test_split")]
)
def test_options_that_cannot_work_are_refused(options, option):
    """Guards against a hub without a dataset, and a split that is trained and scored on."""
    with pytest.raises(ConfigError) as error:
        DataConfig().replace(corpus="hub", **options)
    assert error.value.option == option


def test_lm1b_is_a_dataset(config, folder):
    """Guards against the first lm1b of the hub, which needs a script."""
    assert HUB_IDS["lm1b"] == "dvruette/lm1b"
    assert find_source(DataConfig(corpus="lm1b"), config.cache_dir, False).choice == ("data.hub_id", "dvruette/lm1b")
    corpus = load_corpus(config.replace(corpus="lm1b"))
    assert corpus.name == "lm1b"
    assert "".join(texts(corpus).values()) == "\n".join(DOCUMENTS)


def test_text8_comes_from_its_mirror_where_its_own_address_fails(tmp_path, server, enwik8, monkeypatch):
    """Guards against a mirror that is joined wrongly, or believed without its checksum."""
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
    with pytest.raises(UserError, match="text8: has sha256"):
        load_corpus(config.replace(cache_dir=tmp_path / "other"))
    (tmp_path / "mirror" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"404[\s\S]*Its mirror .* fails, too: has no split 'test'"):
        load_corpus(config.replace(cache_dir=tmp_path / "third"))


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    """A hub with two datasets, of which one needs a script."""
    with fake_hub(tmp_path) as hub:
        plain = write_split(tmp_path / "plain" / "train.parquet", DOCUMENTS)
        hub.files["owner/plain"] = {"train.parquet": plain.read_bytes()}
        hub.files["owner/script"] = {"script.py": b"raise SystemExit('the script was run')"}
        yield hub


def scripts(hub: FakeHub, *commands: list[str], first: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run each scripts/SCRIPT.py of [script, *arguments], in one process; a form feed ends the output of each."""
    return hub.run(f"{first}\n{DRIVER}", json.dumps(commands), **environment)


def test_from_the_hub_to_generated_text(hub, tmp_path):
    """Guards against a dataset of the hub that cannot be prepared, trained on, scored or written from in one of the
    vocabularies, or is needed again once it is prepared."""
    data = ["--data.corpus=hub", "--data.hub_id=owner/plain", "--data.hub_revision=v1"]
    flags = {name: [*data, f"--data.vocabulary={name}"] for name in ("bytes", "characters", "sentencepiece")}
    prepared = scripts(hub, *(["prepare", *flags[name]] for name in flags))
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stdout.count("hub from owner/plain@v1") == 3
    hub.answered.clear()
    used = scripts(
        hub,
        *(["train", *TINY, *flags[name], f"--run.dir={name}"] for name in flags),
        *(["evaluate", name, "--json"] for name in flags),
        *(["generate", name, "--prompt=doc", "--length=50"] for name in flags),
    )
    assert used.returncode == 0, used.stderr
    printed = used.stdout.split("\f\n")
    text = "\n".join(DOCUMENTS)
    for name, score, written in zip(flags, printed[3:6], printed[6:9], strict=True):
        options = {"hub_id": "owner/plain", "hub_revision": "v1", "vocabulary": name}
        found = texts(load_corpus(DataConfig(corpus="hub", cache_dir=tmp_path / "cache", **options)))
        assert "".join(found.values()) == text
        score = json.loads(score)
        assert (score["characters"], score["bytes"]) == (len(found["test"]), len(found["test"].encode()))
        assert written.startswith("doc") and len(written) > 20
        if name == "characters":
            assert len(written) == 3 + 50 + 1 and set(written) <= set(text)
    assert hub.answered == []
    # Another separator is another text; offline, the library's own cache has the documents.
    again = scripts(hub, ["prepare", *data, "--data.separator=|"], HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.answered == []
    options = {"hub_id": "owner/plain", "hub_revision": "v1", "separator": "|"}
    config = DataConfig(corpus="hub", cache_dir=tmp_path / "cache", **options)
    assert "".join(texts(load_corpus(config)).values()) == "|".join(DOCUMENTS)


def test_text8_comes_from_the_hub_where_its_own_address_fails(hub, tmp_path):
    """Guards against a mirror that is never asked, or is not as its card says: a row for each split, in data/."""
    text = " the quick brown fox jumps over the lazy dog" * 10
    parts = {"train": text[:400], "validation": text[400:420], "test": text[420:]}
    for split, part in parts.items():
        file = f"data/{split}-00000-of-00001.parquet"
        hub.files.setdefault("afmck/text8", {})[file] = write_split(tmp_path / "text8" / file, [part]).read_bytes()
    card = {
        "dataset_info": {
            "features": [{"name": "text", "dtype": "string"}],
            "splits": [{"name": split, "num_bytes": len(part) + 4, "num_examples": 1} for split, part in parts.items()],
        },
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in parts],
            }
        ],
    }
    hub.files["afmck/text8"]["README.md"] = f"---\n{yaml.safe_dump(card)}---\n".encode()
    little = {
        "url": f"{hub.url}/dc/text8.zip",
        "size": len(text),
        "digest": hashlib.md5(text.encode()).hexdigest(),
        "split_sizes": tuple(map(len, parts.values())),
    }
    first = (
        f"{WITHOUT_PAUSES}; from dataclasses import replace; from charlm.data.sources import PUBLISHED; "
        f"PUBLISHED['text8'] = replace(PUBLISHED['text8'], **{little!r})"
    )
    prepare = ["prepare", "--data.corpus=text8", "--data.vocabulary=characters"]
    done = scripts(hub, prepare, first=first)
    assert done.returncode == 0, done.stderr
    assert "train: 400 symbols" in done.stdout
    assert hub.answered[0] == "/dc/text8.zip"
    prepared = tmp_path / "cache" / "text8-characters"
    vocabulary = json.loads((prepared / "corpus.json").read_text())["vocabulary"]["characters"]
    assert vocabulary == " abcdefghijklmnopqrstuvwxyz"
    assert "".join(vocabulary[i] for i in (prepared / "ids.bin").read_bytes()) == text


NO_NETWORK = ["cannot be fetched", "--data.hub_id=FOLDER", "HF_HOME"]


@pytest.mark.parametrize(
    ("hub_id", "environment", "parts"),
    [
        ("owner/script", {}, ["needs code of its own", "never run"]),
        ("owner/nothing", {}, ["no such dataset", "hf auth login"]),
        ("owner/plain", {"HF_HUB_OFFLINE": "1"}, NO_NETWORK),
        ("owner/plain", {"HF_ENDPOINT": "http://127.0.0.1:1"}, NO_NETWORK),
    ],
)
def test_a_dataset_that_cannot_be_had(hub, tmp_path, hub_id, environment, parts):
    """Guards against tracebacks, other exit codes than 2, and debris: the hub has no such dataset, or only its script;
    the library is told that there is no network, or finds that out."""
    done = scripts(
        hub, ["prepare", "--data.corpus=hub", f"--data.hub_id={hub_id}"], first=WITHOUT_PAUSES, **environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for part in (f"data.hub_id={hub_id}", *parts):
        assert part in done.stderr
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
