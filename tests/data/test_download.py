"""Downloads against a server on the loopback interface that misbehaves as told."""

import hashlib

import numpy as np
import pytest

from charlm.config import UserError
from charlm.data import download as module
from charlm.data.download import download

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def fetch(server, tmp_path):
    """Fetch CONTENT's namesake to tmp_path/file.zip."""
    server.content = CONTENT

    def call() -> bytes:
        download(server.url, tmp_path / "file.zip", size=len(CONTENT), sha256=SHA256)
        return (tmp_path / "file.zip").read_bytes()

    return call


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_whole_and_quietly(server, fetch, tmp_path, capfd):
    """Guards against a progress bar in a log file, and against a .part left behind."""
    assert fetch() == CONTENT
    assert names(tmp_path) == ["file.zip"]
    assert capfd.readouterr() == ("", "")


def test_a_connection_cut_off_is_resumed_where_it_was_cut(server, fetch):
    """Guards against starting over, and against losing or doubling the bytes around the cut."""
    server.cuts = [100_001, 65_536, 1]
    assert fetch() == CONTENT
    assert server.ranges == [None, "bytes=100001-", "bytes=165537-", "bytes=165538-"]


def test_a_bad_line_is_given_time_as_long_as_anything_comes(server, fetch):
    """Guards against a long download that is given up for failures that lie far apart."""
    server.cuts = [1000, 0, 0, 1000, 0, 0, 1000, 0, 0]
    assert fetch() == CONTENT


def test_the_next_call_resumes_what_a_failed_one_received(server, fetch, tmp_path):
    """Guards against a partial download that is thrown away when the attempts are used up."""
    server.cuts = [200_000, 0, 0, 0]
    with pytest.raises(UserError, match="100,000 bytes before the end"):
        fetch()
    assert names(tmp_path) == ["file.zip.part"]
    server.ranges.clear()
    assert fetch() == CONTENT
    assert server.ranges == ["bytes=200000-"]
    assert names(tmp_path) == ["file.zip"]


def test_a_server_without_ranges_is_read_from_the_start(server, fetch):
    """Guards against appending the whole file to its own beginning."""
    server.knows_ranges = False
    server.cuts = [100_000]
    assert fetch() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_server_without_ranges_that_always_cuts_is_given_up(server, fetch):
    """Guards against an endless loop in which every attempt starts over and gets no further."""
    server.knows_ranges = False
    server.cuts = [100_000] * 50
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch()
    assert len(server.ranges) == 1 + len(module.PAUSES) + 1


@pytest.mark.parametrize("beginning", [b"?" * 1000, b"?" * len(CONTENT), b"?" * (len(CONTENT) + 1)])
def test_a_beginning_that_is_not_the_files_is_dropped(server, fetch, tmp_path, beginning):
    """Guards against a stale .part, shorter, as long or longer, that no later attempt ever gets past."""
    (tmp_path / "file.zip.part").write_bytes(beginning)
    assert fetch() == CONTENT
    assert server.ranges[-1] is None


def test_a_whole_file_from_before_is_not_fetched_again(server, fetch, tmp_path):
    """Guards against 36 MB fetched twice because unpacking them failed once."""
    (tmp_path / "file.zip").write_bytes(CONTENT)
    assert fetch() == CONTENT
    assert server.ranges == []


def test_a_damaged_file_from_before_is_replaced(server, fetch, tmp_path):
    """Guards against trusting a name without looking at the bytes."""
    (tmp_path / "file.zip").write_bytes(CONTENT[:-1])
    assert fetch() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1, 10])
def test_a_file_of_another_length_is_refused_before_it_is_read(server, fetch, tmp_path, length):
    """Guards against filling the disk with whatever the address holds by now, a proxy's page included."""
    server.content = (CONTENT + b"?")[:length]
    with pytest.raises(UserError, match=f"{length:,} bytes, not 300,000"):
        fetch()
    assert names(tmp_path) == []


def test_a_file_that_changed_between_two_attempts_is_refused(server, fetch):
    """Guards against joining the beginning of one version with the end of another."""
    server.cuts = [1000, 0, 0, 0]
    with pytest.raises(UserError):
        fetch()
    server.content = CONTENT + b"?"
    with pytest.raises(UserError, match="300,001 bytes, not 300,000"):
        fetch()


def test_a_wrong_checksum_is_refused_and_not_kept(server, fetch, tmp_path):
    """Guards against text that is not the corpus, and against a next call that trips over the same bytes."""
    server.content = bytes(len(CONTENT))
    with pytest.raises(UserError, match=hashlib.sha256(server.content).hexdigest()):
        fetch()
    assert names(tmp_path) == []


def test_a_busy_server_is_asked_again(server, fetch):
    """Guards against giving up on errors that pass."""
    server.statuses = [503, 429]
    assert fetch() == CONTENT


def test_a_missing_file_is_asked_for_once(server, fetch):
    """Guards against hammering a server that has said no."""
    server.statuses = [404] * 5
    with pytest.raises(UserError, match="HTTP 404"):
        fetch()
    assert len(server.ranges) == 1


def test_without_network_the_error_says_what_to_fetch_and_where_to_put_it(server, fetch, tmp_path):
    """Guards against a message that leaves the user of an offline machine without a next step."""
    server.stop()
    with pytest.raises(UserError) as error:
        fetch()
    for part in (server.url, SHA256, "--data.path=FILE", "refused"):
        assert part in str(error.value)
    assert names(tmp_path) == []


def test_bytes_from_another_place_are_refused(server, fetch, tmp_path):
    """Guards against appending bytes that do not follow on from what is there."""
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:1000])
    server.misplaced = 5
    with pytest.raises(UserError, match="from 1,000 on, the server sent those from 1,005 on"):
        fetch()
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[:1000]
