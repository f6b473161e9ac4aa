"""A checkpoint survives what happens to machines: kills, full disks, power cuts, rot."""

import ctypes
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from charlm.config import UserError
from charlm.files import TEMPORARY
from charlm.runs import tensors
from charlm.runs.checkpoints import find_checkpoint, newest_whole_checkpoint, rewind
from charlm.runs.folder import Run
from storage import FILES, content, files_of_at_most, make_run, names, number_of, save

pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # os.fork


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


# --- kills ---


def call_by_call(action: Callable[[], object], look: Callable[[], None]) -> None:
    """Run `action` in a child that is halted before and after each of its system calls, to `look` at what a kill there
    would leave on disk."""
    if sys.platform != "linux":
        pytest.skip("system calls are counted by Linux's ptrace")
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes, ptrace.restype = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    trace_me, next_system_call, set_options, kill_on_exit = 0, 24, 0x4200, 0x100000
    child = os.fork()
    if child == 0:
        try:
            if ptrace(trace_me, 0, None, None) != 0:
                os._exit(77)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        pytest.skip("no process may trace another here")
    ptrace(set_options, child, None, kill_on_exit)
    while not os.WIFEXITED(status):
        assert os.WIFSTOPPED(status)
        look()
        ptrace(next_system_call, child, None, None)
        _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0


def left_by_kills(action: Callable[[], object], run: Run) -> list[Run]:
    """Copies of the run as a kill at any system call of `action` would leave it, without repetitions."""
    copies: list[Run] = []
    seen = []

    def look() -> None:
        if not seen or content(run.path) != seen[-1]:
            seen.append(content(run.path))
            copies.append(Run(run.path.with_name(f"killed-{len(copies)}")))
            shutil.copytree(run.path, copies[-1].path)

    call_by_call(action, look)
    assert len(copies) > 10, "nothing was seen"
    return copies


def first(run: Run) -> Callable[[], object]:
    return lambda: save(run, 1, best=True, keep=1)


def later(run: Run) -> Callable[[], object]:
    save(run, 1, best=True)
    save(run, 2)
    return lambda: save(run, 3, best=True, keep=1)


def same_step(run: Run) -> Callable[[], object]:
    save(run, 1)
    save(run, 2, best=True)
    return lambda: save(run, 2, 2.5, best=True, keep=1)


@pytest.mark.parametrize(
    ("prepare", "allowed"), [(first, {None, 1.0}), (later, {2.0, 3.0}), (same_step, {2.0, 2.5})], ids=lambda value: ""
)
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(prepare, allowed, run):
    """Guards against a moment, in a first, a later and a replacing write, at which a kill loses a checkpoint, leaves
    `last` or `best` with nothing, or leaves rubbish that the next write does not clear away."""
    found = set()
    for killed in left_by_kills(prepare(run), run):
        checkpoint, warnings = newest_whole_checkpoint(killed)
        found.add(checkpoint and number_of(checkpoint))
        assert warnings == []
        for pointer in ("last", "best"):
            if None not in allowed or (killed.checkpoints_path / pointer).exists():
                assert number_of(find_checkpoint(killed, pointer)) in {1.0, *allowed}
        again = Run(shutil.copytree(killed.path, f"{killed.path}-again"))
        retried = save(again, 1 if None in allowed else int(max(allowed)), best=True, keep=1)
        assert names(again) == {"last", "best", retried.name}
        if checkpoint:
            rewind(killed, checkpoint)
            assert number_of(find_checkpoint(killed, "last")) == checkpoint.state["number"]
        save(killed, 9, best=True, keep=1)
        assert names(killed) == {"last", "best", "step-00000009"}
    assert found == allowed


@pytest.mark.parametrize("discard", [False, True])
def test_a_kill_while_a_run_is_rewound_leaves_all_rows_of_what_it_goes_on_from(discard, run):
    """Guards against a later checkpoint that outlives the rows of metrics before it."""
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        save(run, step, best=step == 3)
    found = set()
    for killed in left_by_kills(lambda: rewind(run, find_checkpoint(run, 1), discard=discard), run):
        checkpoint, _ = newest_whole_checkpoint(killed)
        found.add(checkpoint.step)
        rewind(killed, checkpoint)
        assert [row["step"] for row in killed.metrics()] == list(range(1, checkpoint.step + 1))
        assert find_checkpoint(killed, "last").step == checkpoint.step
    assert found == {1, 2, 3}


# --- power cuts ---


def test_nothing_relies_on_what_is_not_on_disk_yet(run, monkeypatch):
    """Guards against a rename that a power cut keeps while it loses what was renamed, or a removal before that."""
    save(run, 1, best=True)
    events = []

    def named(path: Path | str) -> str:
        return TEMPORARY.sub(r".\1.tmp", Path(path).name)

    def fsync(descriptor: int, real=os.fsync) -> None:
        events.append(("sync", named(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real(descriptor)

    def moving(real: Callable) -> Callable:
        def move(source, target) -> None:
            events.append((named(source), named(target)))
            real(source, target)

        return move

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    save(run, 2, best=True, keep=1)
    temporary, target = ".step-00000002.tmp", "step-00000002"
    moment = events.index((temporary, target))
    before = events[:moment]
    assert {("sync", name) for name in FILES[:2]} <= set(before)
    assert before[-1] == ("sync", temporary)
    manifest = ".manifest.json.tmp"
    assert before.index((manifest, "manifest.json")) > before.index(("sync", manifest))
    assert events[moment + 1] == ("sync", "checkpoints")
    removal = events.index(("step-00000001", ".step-00000001.tmp"))
    for pointer in ("last", "best"):
        written = events.index((f".{pointer}.tmp", pointer))
        assert moment < events.index(("sync", f".{pointer}.tmp")) < written < removal
        assert events[written + 1] == ("sync", "checkpoints")


# --- full disks ---


def check_lost_nothing(run: Run, before: dict[str, bytes | None]) -> None:
    """The older checkpoints are as they were, nothing half-written is left, and the next write succeeds."""
    after = content(run.checkpoints_path)
    assert all(after[name] == before[name] for name in before if name.startswith("step-"))
    assert {name for name in names(run) if name.startswith(".")} == set()
    newest, warnings = newest_whole_checkpoint(run)
    assert newest.step in (1, 2) and not warnings
    assert {number_of(find_checkpoint(run, pointer)) for pointer in ("last", "best")} <= {1.0, 2.0}


class FullDisk:
    """Lets `room` calls that may need space succeed, and fails the one after them."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch):
        self.room = room
        for module, name in [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace")]:
            monkeypatch.setattr(module, name, self.limited(getattr(module, name)))
        monkeypatch.setattr(io, "open", self.limited(io.open, lambda path, mode="r", *_: "r" not in mode))
        monkeypatch.setattr(tensors, "save_file", self.save_file)

    def full(self) -> bool:
        self.room -= 1
        return self.room == -1

    def limited(self, real: Callable, counts: Callable[..., bool] = lambda *_: True) -> Callable:
        def call(*arguments, **options):
            if counts(*arguments) and self.full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call

    def save_file(self, tensors, path, metadata=None) -> None:
        save_file(tensors, path, metadata)
        if self.full():
            os.truncate(path, 100)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_disk_that_is_full_at_any_call_loses_nothing(run):
    """Guards against an ENOSPC, wherever it comes, that costs an older checkpoint or leaves half of a new one."""
    save(run, 1, best=True)
    before = content(run.checkpoints_path)
    for room in range(100):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(room, patch)
            try:
                save(run, 2, best=True)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        if disk.room >= 0:
            break
        check_lost_nothing(run, before)
        rewind(run, find_checkpoint(run, 1), discard=True)
    assert 20 < room < 100
    assert names(run) == {"last", "best", "step-00000001", "step-00000002"}


@pytest.mark.parametrize("step", [1, 2])
def test_a_write_cut_short_at_any_length_loses_nothing(step, run):
    """Guards against an error of `write` itself, in Python or in safetensors, that is taken for success; also where the
    checkpoint was to replace one of its own step."""
    save(run, 1, best=True)
    before = content(run.checkpoints_path)
    sizes = {len(held) for held in before.values() if held}
    for size in sorted({0, 1} | {size // 2 for size in sizes} | {size - 1 for size in sizes}):
        with pytest.raises(OSError, match="File too large"), files_of_at_most(size):
            save(run, step, best=True)
        check_lost_nothing(run, before)
    assert names(run) == {"last", "best", "step-00000001"}


def test_a_small_disk_that_fills_up_loses_nothing(run, tmp_path, monkeypatch):
    """Guards against what the faults above imitate badly: a real file system with too few free pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        run = make_run(disk / "run")
        save(run, 1, best=True)
        before = content(run.checkpoints_path)
        monkeypatch.setattr(tensors, "SPARE_BYTES", -(2**20))
        failures = 0
        for pages in range(20):
            with (disk / "filler").open("wb") as filler:
                free = shutil.disk_usage(disk).free
                filler.write(bytes(free - pages * resource.getpagesize()))
            try:
                save(run, 2, best=True)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
                (disk / "filler").unlink()
                check_lost_nothing(run, before)
                rewind(run, find_checkpoint(run, 1), discard=True)
        assert 2 < failures < 20
        assert names(run) == {"last", "best", "step-00000001", "step-00000002"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_free_space_is_checked_before_anything_is_written(run, monkeypatch):
    """Guards against a write of minutes that is bound to fail, and against a message without figures."""
    save(run, 1, best=True)
    before = content(run.checkpoints_path)
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20 + 100))
    monkeypatch.setattr(tensors, "save_file", lambda *_: pytest.fail("began to write"))
    with pytest.raises(OSError, match="No space left on device: 1 MB needed, 1 MB free"):
        save(run, 2)
    assert content(run.checkpoints_path) == before


# --- rot ---


def flipped(held: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(8 * len(held))
    changed = bytearray(held)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def truncated(held: bytes, draw: random.Random) -> bytes:
    return held[: draw.randrange(len(held))]


@pytest.mark.parametrize("rot", [flipped, truncated])
def test_all_rot_is_found(rot, run):
    """Guards against weights, state or manifest that changed on disk, or lost their end, in 1,000 random places."""
    folder = save(run, 3).path
    draw = random.Random(0)
    for name in [*FILES, "manifest.json"] * 250:
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(rot(held, draw))
        with pytest.raises(UserError, match=f"{folder}/{name}"):
            find_checkpoint(run, "last")
        (folder / name).write_bytes(held)
    assert number_of(find_checkpoint(run, "last")) == 3.0
