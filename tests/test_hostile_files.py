"""Files that someone else made, broken or meant to hurt: each is refused with one message that names it and the reason,
nothing of it is run, nothing is left on disk, and memory and time stay small."""

import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from charlm.config import ConfigError
from charlm.config.load import load_config
from charlm.data.sources import PUBLISHED
from charlm.objective.build import build_objective
from charlm.runs.exported import save_model
from charlm.runs.load import load
from storage import entries, manifest_for, written
from tiny import SCRIPTS, TINY, run_script

TEXT = b"the text that enwik8 stands for in these tests. " * 40


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """The working folder, with a text in it; enwik8 is that text."""
    (tmp_path / "text.txt").write_bytes(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    little = replace(PUBLISHED["enwik8"], size=len(TEXT), digest=sha256(TEXT).hexdigest(), split_sizes=(1800, 60, 60))
    monkeypatch.setitem(PUBLISHED, "enwik8", little)
    return tmp_path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file, link and folder, outside of the caches, with its size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] not in ("cache", "prepared"):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def refused(script: str, arguments: list[str], place: Path, capfd) -> str:
    """What the script prints as it refuses; everything else is as it was."""
    before = listing(place)
    capfd.readouterr()
    assert run_script(script, *arguments) == 2
    shown, printed = capfd.readouterr()
    assert shown == ""
    assert [line[:7] for line in printed.splitlines()].count("error: ") == printed.count("error:") == 1
    assert "Traceback" not in printed
    assert len(printed) < 4000
    assert listing(place) == before
    cached = os.listdir(place / "cache") if (place / "cache").exists() else []
    assert [name for name in cached if not name.endswith(".lock")] == []
    return printed


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def zipped(*members: tuple[str, bytes], **options) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content, **options)
    return archive.getvalue()


def encrypted() -> bytes:
    """An archive whose headers say that its member is."""
    archive = bytearray(zipped(("enwik8", TEXT)))
    archive[6] |= 1
    archive[archive.rindex(b"PK\1\2") + 8] |= 1
    return bytes(archive)


def by_hand(name: bytes, packed: bytes, size: int) -> bytes:
    """A zip archive of one member, with a wrong checksum."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), size, len(name), 0) + name + packed
    entry = struct.pack("<4s6H3L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(packed), size)
    entry += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, 0) + name
    return local + entry + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(local), 0)


def gigabytes_of_zeros() -> bytes:
    """Three, deflated: a block that remembers nothing of the one before can be repeated."""
    squeeze = zlib.compressobj(wbits=-15)
    block = squeeze.compress(bytes(1 << 26)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return 48 * block + zlib.compressobj(wbits=-15).flush()


UNREADABLE, MEMBER = "cannot be read to its end", "no item named 'enwik8'"
ARCHIVES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "zip that leads elsewhere": (
        lambda: zipped(("../enwik8", TEXT), ("../../hurt", TEXT), ("/tmp/enwik8", TEXT), ("enwik8/", b"")),
        [MEMBER],
    ),
    "zip with several, another text last": (
        lambda: zipped(("README", b"read me"), ("enwik8", bytes(len(TEXT)))),
        ["has sha256"],
    ),
    "zip, encrypted": (encrypted, [UNREADABLE, "password"]),
    "zip, bad checksum": (
        lambda: by_hand(b"enwik8", zlib.compress(TEXT, wbits=-15), len(TEXT)),
        [UNREADABLE, "Bad CRC-32"],
    ),
    "zip, longer than it says": (lambda: by_hand(b"enwik8", gigabytes_of_zeros(), 7), [UNREADABLE]),
    "gz with rubbish behind": (lambda: gzip.compress(TEXT) + b"rubbish", [UNREADABLE, "Not a gzipped file"]),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_refused(case, inside, capfd):
    """Guards against a member that is written where its name leads, and against tracebacks of decompressors."""
    make, parts = ARCHIVES[case]
    (inside / "copy").write_bytes(make())
    printed = refused("prepare", ["--data.corpus=enwik8", "--data.path=copy"], inside, capfd)
    for part in [f"data.path={inside / 'copy'}", *parts]:
        assert part in printed


def test_bombs_are_refused_in_little_memory(tmp_path):
    """Guards against gigabytes, in memory or on disk, that files of megabytes unpack to."""
    bombs = {
        "bomb.gz": 48 * gzip.compress(bytes(1 << 26)),
        "bomb.xz": 48 * lzma.compress(bytes(1 << 24), preset=0),
        "bomb.zip": by_hand(b"enwik8", gigabytes_of_zeros(), 3 << 30),
        "greedy.xz": asking_for_gigabytes(),
    }
    assert sum(map(len, bombs.values())) < 20 << 20
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *bombs]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    complaints = ["more than 10,000,000 bytes"] * 3 + ["cannot be read to its end (MemoryError)"]
    for line, name, complaint in zip(done.stdout.splitlines(), bombs, complaints, strict=True):
        assert f"data.path={tmp_path / name}: " in line
        assert complaint in line


CHILD = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from charlm.config import DataConfig, UserError
from charlm.data.corpus import load_corpus
from charlm.data.sources import PUBLISHED

PUBLISHED["enwik8"] = replace(PUBLISHED["enwik8"], size=10_000_000)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), used + (1 << 28)))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
for name in sys.argv[1:]:
    try:
        load_corpus(DataConfig(corpus="enwik8", path=Path(name), cache_dir=Path("cache")), show_progress=False)
    except UserError as error:
        print(error)
    assert [path.name for path in Path("cache").iterdir()] == [".enwik8.lock"]
"""


def asking_for_gigabytes() -> bytes:
    """An xz file that wants a dictionary of 1.5 GiB, the most that there is."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    small = bytearray(lzma.compress(TEXT, filters=filters))
    size = (small[12] + 1) * 4  # of the block's header, which ends with its checksum
    at = small.index(b"\x21\x01", 12, 12 + size) + 2
    small[at] = 39  # 3 GiB
    small[12 + size - 4 : 12 + size] = zlib.crc32(small[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(small)


def hostile_folder(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / "hostile").mkdir()
        spoil(place / "hostile")

    return make


def truncated_parquet(folder: Path) -> None:
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 1000}), path)
    os.truncate(path, path.stat().st_size - 100)


FILE = ["--data.corpus=file", "--data.path=hostile"]
HUB = ["--data.corpus=hub", "--data.hub_id=./hostile"]
TEXTS: dict[str, tuple[list[str], Callable[[Path], object], list[str]]] = {
    "a folder of links in circles": (
        FILE,
        hostile_folder(lambda folder: [(folder / name).symlink_to(folder) for name in "ab"]),
        ["holds no text"],
    ),
    "a folder of pipes": (FILE, hostile_folder(lambda folder: os.mkfifo(folder / "pipe")), ["pipe is neither"]),
    "a terabyte": (FILE, lambda place: sparse(place / "hostile"), ["bytes free", "1,099,511,627,776"]),
    "Latin-1 where characters are asked for": (
        [*FILE, "--data.vocabulary=characters"],
        written("hostile", "café ".encode("latin-1") * 200),
        ["not UTF-8 at byte 3", "--data.vocabulary=bytes"],
    ),
    "half a character at the end": (
        [*FILE, "--data.vocabulary=sentencepiece"],
        written("hostile", b"plain text " * 200 + "é".encode()[:1]),
        ["not UTF-8 at byte 2,200"],
    ),
    "parquet, truncated": (HUB, hostile_folder(truncated_parquet), ["cannot be read"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_hostile_text_is_refused(case, inside, capfd):
    """Guards against hanging on a pipe, filling the disk, and ids made from what is no text."""
    arguments, make, parts = TEXTS[case]
    make(inside)
    printed = refused("prepare", arguments, inside, capfd)
    for part in ["data.", *parts]:
        assert part in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on the text."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "text.txt").write_bytes(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert run_script("train", *TINY, *ON_TEXT, "--run.dir=run") == 0
    return folder / "run"


ON_TEXT = ["--data.corpus=file", "--data.path=text.txt", "--data.cache_dir=prepared"]
EVALUATE = ("evaluate", ["run"])
RESUME_FROM = ("train", [*TINY, *ON_TEXT, "--run.dir=run", "--run.resume_from=3"])
REPORT = ("report", ["run"])
LAST = "checkpoints/step-00000003"


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def state(**changes: object) -> Callable[[Path], object]:
    """Other entries of state.json, under a manifest that fits."""

    def change(run: Path) -> None:
        entries("state.json", **changes)(run / LAST)
        (run / LAST / "manifest.json").write_text(manifest_for(run / LAST))

    return change


RUNS: dict[str, tuple[tuple[str, list[str]], Callable[[Path], object], list[str]]] = {
    "run that is a file": (EVALUATE, lambda run: (shutil.rmtree(run), run.write_text("run")), ["run is not a run"]),
    "config with a tag": (
        EVALUATE,
        changed("config.yaml", lambda text: text + b"!!python/object/apply:os.system ['touch hurt']: 1\n"),
        ["config.yaml"],
    ),
    "config of another model": (
        EVALUATE,
        changed("config.yaml", lambda text: text.replace(b"d_ff: 32", b"d_ff: 64")),
        [f"{LAST}/model.safetensors", "its tensor transformer.blocks.0", "config.yaml"],
    ),
    "hash that is a list": (
        RESUME_FROM,
        entries("provenance.json", corpus__sha256=[]),
        ["provenance.json", "corpus.sha256"],
    ),
    "vocabulary of nothing": (EVALUATE, entries("provenance.json", corpus__vocabulary=None), ["run", "vocabulary"]),
    "losses that are text": (RESUME_FROM, state(accepted_losses="abc"), [f"{LAST}/state.json", "accepted_losses"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_hostile_run_is_refused(case, run, inside, capfd):
    """Guards against a run of somebody else's that runs code, leads out of its folder, or ends in a traceback."""
    (script, arguments), spoil, parts = RUNS[case]
    shutil.copytree(run, inside / "run")
    spoil(inside / "run")
    printed = refused(script, arguments, inside, capfd)
    for part in parts:
        assert part in printed


NASTY = "\x1b[2J\u202e\x9b\udcff\ud800"
COMMANDS = {
    "evaluate": ["run"],
    "evaluate of an exported model": ["exported"],
    "generate": ["exported", "--prompt=a", "--length=3"],
    "export": ["exported", "--to=again"],
    "report": ["run\x1b[2J\u202e\x9b\udcff", "--records-only"],
    "explain": ["--data.text_column=\x1b[2J\udcff", "--data.corpus=lm1b"],
    "train": ["--run.dir=run\x1b[2J\u202e\x9b\udcff", *TINY, *ON_TEXT],
    "prepare": ["--data.path=\x1b[2J\u202e", "--data.corpus=file"],
    "compress": ["exported", "text.txt", "-o", "\x1b[2J"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_record_or_name_commands_the_terminal(command, run, inside, capfd):
    """Guards against records of a stranger's, and names, that clear the screen or reorder what stands there."""
    shutil.copytree(run, inside / "run")
    save_model(load(inside / "run"), inside / "exported")
    entries("config.json", checkpoint=NASTY, corpus__sha256=NASTY, corpus__name=NASTY)(inside / "exported")
    entries("provenance.json", corpus__sha256=NASTY, corpus__name=NASTY, command=[NASTY])(inside / "run")
    shutil.copytree(inside / "run", inside / "run\x1b[2J\u202e\x9b\udcff")
    capfd.readouterr()
    assert run_script(command.split()[0], *COMMANDS[command]) in (0, 2)
    shown = "".join(capfd.readouterr())
    assert shown and {c for c in shown if not c.isprintable()} <= set("\n")


LARGE = {
    "d_model": ["--model.d_model=2000000"],
    "num_layers": ["--model.num_layers=10000", "--model.d_model=8192"],
    "d_ff": ["--model.d_ff=1000000000000"],
    "ngram_buckets": ["--model.ngrams=[2]", "--model.ngram_buckets=1000000000000"],
}


@pytest.mark.parametrize("case", LARGE)
def test_a_model_larger_than_the_machine_is_refused(case, inside):
    """Guards against an absurd size that ends all other processes of the machine before it fails."""
    config = load_config((), [*TINY, *LARGE[case]])
    with pytest.raises(ConfigError, match=rf"{case.removesuffix('_buckets')}.* GB, and this machine has"):
        build_objective(config, 256)
    if case != "num_layers":
        with torch.device("meta"):
            build_objective(config, 256)  # which only counts
