"""Files and folders are replaced whole, whoever else writes them."""

import subprocess
import sys
from pathlib import Path

import pytest

from charlm.files import replacing, write_whole
from storage import NO_PROCESS


def by_another_process(code: str, path: Path) -> None:
    imports = "import sys\nfrom pathlib import Path\nfrom charlm.files import replacing, write_whole\n"
    subprocess.run([sys.executable, "-c", f"{imports}path = Path(sys.argv[1])\n{code}", str(path)], check=True)


def test_the_last_of_two_writers_of_a_file_wins(tmp_path):
    """Guards against two commands with the same output that write into, move or remove each other's temporary file."""
    path = tmp_path / "[out]*"
    with replacing(path) as temporary:
        temporary.write_text("half")
        by_another_process("write_whole(path, 'theirs')", path)
        assert path.read_text() == "theirs"
        temporary.write_text("ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_of_two_writers_of_a_folder_wins(tmp_path):
    """Guards against a folder that holds files of both writers, and against rubbish of the one that lost."""
    path = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "ours").touch()
        by_another_process("with replacing(path) as own: own.mkdir(); (own / 'theirs').touch()", path)
    assert [file.name for file in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_killed_writers_left_is_removed(tmp_path):
    """Guards against a disk that fills with leftovers, and against files of the user that are taken for them."""
    kept = [tmp_path / name for name in (".out.tmp", f".out.x.{NO_PROCESS}.tmp", f"out.{NO_PROCESS}.tmp")]
    left = tmp_path / f".out.{NO_PROCESS}.tmp"
    for path in (*kept, left):
        path.touch()
    write_whole(tmp_path / "out", "new")
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "out"}
