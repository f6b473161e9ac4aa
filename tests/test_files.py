"""Files and folders are replaced whole, whoever else writes them."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from charlm.files import replacing, write_whole
from storage import left_of

IMPORTS = "import platform, psutil, sys\nfrom pathlib import Path\n"
ELSEWHERE = "platform.node = lambda: 'elsewhere'\npsutil.pid_exists = lambda process: False\n"


def a_thread(code: str, path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(exec, code, {"replacing": replacing, "write_whole": write_whole, "path": path}).result()


def a_process(code: str, path: Path, before: str = "") -> None:
    code = f"{IMPORTS}{before}from charlm.files import replacing, write_whole\npath = Path(sys.argv[1])\n{code}"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def a_machine(code: str, path: Path) -> None:
    a_process(code, path, ELSEWHERE)


@pytest.mark.parametrize("another", [a_thread, a_process, a_machine])
def test_the_last_of_two_writers_of_a_file_wins(another: Callable[[str, Path], None], tmp_path):
    """Guards against two commands with the same output that write into, move or remove each other's temporary file."""
    path = tmp_path / "[out]*"
    with replacing(path) as temporary:
        temporary.write_text("half")
        another("write_whole(path, 'theirs')", path)
        assert path.read_text() == "theirs"
        temporary.write_text("ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("another", [a_thread, a_process, a_machine])
def test_the_first_of_two_writers_of_a_folder_wins(another: Callable[[str, Path], None], tmp_path):
    """Guards against a folder that holds files of both writers, and against rubbish of the one that lost."""
    path = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "ours").touch()
        another("with replacing(path) as own: own.mkdir(); (own / 'theirs').touch()", path)
    assert [file.name for file in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_killed_writers_left_is_removed(tmp_path):
    """Guards against a disk that fills with leftovers, also of a process with this one's id, and against files of the
    user, or of another machine, that are taken for them."""
    out = tmp_path / "out"
    kept = [tmp_path / ".out.tmp", left_of(tmp_path / "out.x"), left_of(out).with_name(left_of(out).name[1:])]
    kept += [left_of(out, host="00000000"), left_of(out, process=1)]
    for path in (*kept, left_of(out), left_of(out, process=os.getpid())):
        path.touch()
    write_whole(out, "new")
    assert {*tmp_path.iterdir()} == {*kept, out}
