"""Downloads from a server on the loopback interface that misbehaves as told."""

import pytest

from charlm.config import DataConfig
from charlm.data.corpus import load_corpus
from charlm.data.sources import DOWNLOAD_RETRIES, PUBLISHED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*socket:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture
def prepare(tmp_path, enwik8):
    """Prepare enwik8 in tmp_path/cache, and return its text."""

    def call() -> bytes:
        corpus = load_corpus(DataConfig(corpus="enwik8", cache_dir=tmp_path / "cache"))
        return b"".join(corpus.vocabulary.decode(split.ids) for split in corpus.splits.values())

    return call


def files(tmp_path) -> list[str]:
    """All files in the cache but the locks."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")


def stop(server) -> None:
    server.shutdown()
    server.server_close()


def test_a_corpus_is_fetched_once_and_quietly(prepare, enwik8, server, tmp_path, capfd):
    """Guards against progress bars and log lines in a log file, an archive that stays, and a second download."""
    assert prepare() == enwik8
    assert files(tmp_path) == ["corpus.json", "ids.bin"]
    assert capfd.readouterr() == ("", "")
    stop(server)
    assert prepare() == enwik8


@pytest.mark.parametrize("faults", [{"cuts": [100, 0, 50]}, {"statuses": [503, 429]}])
def test_a_fault_that_passes_is_tried_again(prepare, enwik8, server, faults):
    """Guards against giving up at the first cut connection, and against text with a gap around the cut."""
    vars(server).update(faults)
    assert prepare() == enwik8


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (stop, "no connection"),
        (lambda server: server.statuses.extend([404] * 9), "404"),
        (lambda server: server.cuts.extend([100] * 9), "Incomplete"),
        (lambda server: setattr(server, "content", bytes(1000)), "hash"),
    ],
    ids=["no network", "not there", "always cut", "another file"],
)
def test_a_file_that_cannot_be_fetched_is_refused_with_the_way_out(
    prepare, server, tmp_path, fault, complaint, refused
):
    """Guards against a user of an offline machine without a next step, text that is not the corpus, endless attempts,
    and half a file that stays."""
    fault(server)
    with refused("data.corpus", server.url, complaint, PUBLISHED["enwik8"].archive_sha256, "--data.path=FILE"):
        prepare()
    assert files(tmp_path) == []
    assert server.requests in (0, 1 + DOWNLOAD_RETRIES)


@pytest.mark.parametrize("missing", [0, 1])
def test_an_archive_from_before_is_used_only_if_it_is_whole(prepare, enwik8, server, tmp_path, missing):
    """Guards against 36 MB fetched again because unpacking them failed, and against trusting a name."""
    folder = tmp_path / "cache" / "enwik8.download"
    folder.mkdir(parents=True)
    (folder / "enwik8.zip").write_bytes(server.content[missing:])
    (folder / "tmp123").write_bytes(b"left by a process that was killed")
    assert prepare() == enwik8
    assert server.requests == missing
    assert files(tmp_path) == ["corpus.json", "ids.bin"]
