"""Kill what charlm does until it should be lost, and show that it is not: make soak, or tests/soak.py --kills 100

There are two kinds of runs: short ones, struck at their start, and some of a minute, struck 2 to 40 s after it. Each
run is trained once without disturbance. Then the same command is started again and again with `--run.auto_resume=true`,
and struck: kill -9 at a random moment or in the middle of a checkpoint write, of all processes or of one, or a signal
that asks it to stop; between two starts a file of the newest checkpoint may be damaged, or the number of processes
changed. At the end every step must have been taken, and every validation made, exactly once, and weights and optimizer
state must be the undisturbed run's to the bit.

Then the other scripts that write are killed at random moments: what is there must be whole, the same command must
succeed the next time, and nothing else may be left.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from accelerate.state import AcceleratorState

import charlm
import charlm.training.loop  # before the first fork, so that a start takes no time
from charlm.config import Stopped
from charlm.runs.checkpoints import checkpoint_folders
from charlm.runs.folder import Run
from charlm.text import markdown_table
from tiny import checkpoint_bytes, checkpoint_folder, run_script, typed

STEPS, VALID_EVERY = 300, 50
PATIENCE, GRACE = 600.0, 5.0
"""Seconds that a run may take before it counts as hanging, and that it has to end once one of its processes has failed:
then a launcher kills the others, too."""
FLAGS = [
    *typed("--data.corpus=file --model.num_layers=2 --model.num_heads=2 --model.d_model=32 --model.d_ff=64"),
    *typed(f"--model.context_length=32 --train.steps={STEPS} --train.batch_size=4 --train.log_every=1"),
    *typed(f"--train.valid_every={VALID_EVERY} --train.valid_symbols=1000 --train.keep_checkpoints=3"),
    *typed("--run.report=false"),
]
FREE = {  # what a run that keeps its processes may be
    "precision": ["--train.mixed_precision=no", "--train.mixed_precision=bf16"],
    "optimizer": ["--train.optimizer=adamw", "--train.optimizer=sgd", "--train.optimizer=muon"],
    "dropout": ["--model.residual_dropout=0.0", "--model.residual_dropout=0.1"],
    "micro-batch": ["--train.micro_batch_size=4", "--train.micro_batch_size=2"],
    "cadence": ["--train.checkpoint_every=3", "--train.checkpoint_every=20"],
    "clipping": ["--train.clip_norm=0", "--train.clip_norm=1"],
    "order": ["--data.order=uniform", "--data.order=epochs"],
    "schedule": ["--train.lr_schedule=linear", "--train.lr_schedule=wsd"],
}
MOVING = {  # and one that moves between one and two, which cut the batch into the same pieces: the bits stay, too
    **FREE,
    "dropout": FREE["dropout"][:1],
    "micro-batch": FREE["micro-batch"][1:],
}
SCRIPTS = {
    "prepare": "--data.corpus=file CORPUS --data.vocabulary=characters --data.cache_dir=OUT/cache",
    "export": "HOME/run --to OUT/exported",
    "compress": "HOME/run HOME/part.txt -o OUT/part.clm --report --picture OUT/sizes.png",
    "report": "HOME/run -o OUT/report.html --characters=2000",
    "ablate": "TRAINING CORPUS --seeds=1 --row=fast:\\ --train.learning_rate=0.01 --run.dir=OUT/ablation",
}
"""Arguments of the scripts that are killed, besides training."""
STRIKES = {"kill": 5, "kill in a write": 4, "kill one process": 2, "ask to stop": 6}
"""How a run is struck, and how often of so many."""
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Life:
    """When a run is struck: after `first` to `last` seconds from each start, of `seconds` that it takes in all."""

    first: float
    last: float
    seconds: float | None = None
    """None: as long as STEPS steps take."""


SHORT, LONG = Life(0.0, 1.5), Life(2.0, 40.0, seconds=60.0)


@dataclass
class Outcome:
    """What happened to one run."""

    settings: str
    processes: str
    steps: int = STEPS
    moments: list[float] = field(default_factory=list)
    """Seconds from the start to each strike that the run did not end before."""
    strikes: Counter = field(default_factory=Counter)
    slowest_stop: float = 0.0
    """Seconds from a signal to the end of all processes."""
    damaged: int = 0
    end: str = "lost"
    wrong_steps: int = 0
    """Steps and validations that metrics.jsonl has not exactly once."""

    @property
    def kills(self) -> int:
        return sum(count for strike, count in self.strikes.items() if strike.startswith("kill"))


def start(flags: list[str], run: Path, num_processes: int) -> list[int]:
    """The processes that train, as a launcher would start them, each a fork of this one: nothing has to be imported."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def train(rank: int) -> None:
        if num_processes > 1:
            os.environ |= dict.fromkeys(["RANK", "LOCAL_RANK"], str(rank))
            os.environ |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(num_processes))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        charlm.train(charlm.load_config(overrides=[*flags, f"--run.dir={run}", "--run.auto_resume=true"]))

    return [forked(partial(train, rank), run.parent / "said.txt") for rank in range(num_processes)]


def forked(action: Callable[[], int | None], said: Path) -> int:
    """A process that runs `action`, ends with its result as the exit code, and adds its output to a file."""
    if child := os.fork():
        return child
    code = 1
    try:
        # A test that trained in this process before would have told the child that it is alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        for number in (signal.SIGINT, signal.SIGHUP):  # which a shell or nohup may have ignored
            signal.signal(number, signal.SIG_DFL)
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = action() or 0
        sys.stdout.flush()
    except Stopped:  # before it had begun
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(children: list[int]) -> list[int]:
    """The exit codes, once all have ended; TimeoutError if they hang."""
    codes, began, failed = {}, time.monotonic(), None
    while len(codes) < len(children):
        left = set(children) - codes.keys()
        for child in left:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if codes[child] else None)
        if time.monotonic() > min(began + PATIENCE, (failed or began + PATIENCE) + GRACE):
            for child in left - codes.keys():
                os.kill(child, signal.SIGKILL)
            if not failed:
                raise TimeoutError(f"{len(left)} of {len(children)} processes hang")
        time.sleep(0.002)
    return [codes[child] for child in children]


def strike(kind: str, children: list[int], run: Path, choose: random.Random, life: Life) -> tuple[list[int], int]:
    """Wait for the moment, and strike; the processes that were struck, and with what signal."""
    moment = time.monotonic() + choose.uniform(life.first, life.last)
    while time.monotonic() < moment and not has_ended(children[0]):
        time.sleep(0.01)
    if kind == "kill in a write":
        while not any((run / "checkpoints").glob(".step-*.tmp")) and not has_ended(children[0]):
            pass
        time.sleep(choose.uniform(0.0, 0.01))
    number = choose.choice(ASKING) if kind == "ask to stop" else signal.SIGKILL
    struck = children[-1:] if kind == "kill one process" else children
    for child in struck:
        os.kill(child, number)
    return struck, number


def came_through(kind: str, codes: list[int], struck: list[int], number: int) -> bool:
    """Whether the strike hit a run under way, as the exit codes of all processes and of those struck tell.

    What `wait` kills because another process has failed was not struck.

    Raises:
        AssertionError: the run ended otherwise than it should.
    """
    if -number in struck:
        return number == signal.SIGKILL  # who is asked and dies of it had not begun, and the others wait for it in vain
    if set(codes) != {0}:
        raise AssertionError(f"{kind}: it ended with {codes}")
    return kind == "ask to stop"


def has_ended(child: int) -> bool:
    return psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def damage(run: Path, choose: random.Random) -> bool:
    """Flip a bit of the newest checkpoint, if there is one to fall back on."""
    folders = list(checkpoint_folders(Run(run)).values())
    if len(folders) < 2:
        return False
    path = choose.choice([path for path in sorted(folders[-1].iterdir()) if path.stat().st_size])
    with path.open("r+b") as file:
        position = choose.randrange(path.stat().st_size)
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << choose.randrange(8)]))
    return True


def wrong_steps(run: Path, steps: int) -> int:
    """How many steps and validations the metrics have not exactly once."""
    wrong = 0
    for kind, every in (("loss", 1), ("valid", VALID_EVERY)):
        found = Counter(row["step"] for row in Run(run).metrics() if kind in row)
        expected = range(every, steps + 1, every)
        wrong += sum(found[step] != (step in expected) for step in found.keys() | set(expected))
    return wrong


def steps_in(seconds: float, flags: list[str], folder: Path, num_processes: int) -> int:
    """The steps of a run that takes about so long here, as STEPS steps tell; their validations are due at the last."""
    began = time.monotonic()
    assert wait(start(flags, folder / "timed", num_processes)) == [0] * num_processes, (folder / "said.txt").read_text()
    return VALID_EVERY * max(1, round(STEPS / VALID_EVERY * seconds / (time.monotonic() - began)))


def soak_one(folder: Path, corpus: list[str], choose: random.Random, strikes: int, life: Life = SHORT) -> Outcome:
    """One run, undisturbed and disturbed."""
    moving = choose.random() < 0.3
    settings = {name: choose.choice(values) for name, values in (MOVING if moving else FREE).items()}
    fixed = choose.choice([1, 1, 2])
    flags = [*FLAGS, *corpus, *settings.values()]
    shown = " ".join(flag.partition(".")[2] for flag in settings.values())
    outcome = Outcome(shown, "1 and 2" if moving else str(fixed))
    if life.seconds is not None:
        outcome.steps = steps_in(life.seconds, flags, folder, fixed)
        flags.append(f"--train.steps={outcome.steps}")
    assert wait(start(flags, folder / "whole", fixed)) == [0] * fixed, (folder / "said.txt").read_text()
    run = folder / "run"
    for _ in range(strikes):
        children = start(flags, run, choose.choice([1, 2]) if moving else fixed)
        (kind,) = choose.choices(list(STRIKES), list(STRIKES.values()))
        began = time.monotonic()
        struck, number = strike(kind, children, run, choose, life)
        asked = time.monotonic()
        codes = dict(zip(children, wait(children), strict=True))
        try:
            hit = came_through(kind, [*codes.values()], [codes[child] for child in struck], number)
            hit &= number == signal.SIGKILL or not checkpoint_folder(run, outcome.steps).exists()  # else it had ended
        except AssertionError as error:
            error.add_note((folder / "said.txt").read_text()[-3000:])
            raise
        outcome.strikes[kind] += hit
        outcome.moments += [asked - began] * hit
        if hit and kind == "ask to stop":
            outcome.slowest_stop = max(outcome.slowest_stop, time.monotonic() - asked)
        if run.exists() and choose.random() < 0.25:
            outcome.damaged += damage(run, choose)
        if checkpoint_folder(run, outcome.steps).exists():
            break
    last = choose.choice([1, 2]) if moving else fixed
    if wait(start(flags, run, last)) != [0] * last:
        return outcome
    outcome.wrong_steps = wrong_steps(run, outcome.steps)
    same = checkpoint_bytes(run, outcome.steps) == checkpoint_bytes(folder / "whole", outcome.steps)
    outcome.end = "identical" if same else "other state"
    return outcome


def write_texts(home: Path) -> list[str]:
    """Write the texts that are trained on and compressed; the flags for the first."""
    words = random.Random(0).choices(["to", "be", "or", "not", "that", "is\n"], k=20_000)
    (home / "text.txt").write_text(" ".join(words))
    (home / "part.txt").write_text(" ".join(words[:300]))
    return [f"--data.path={home / 'text.txt'}", f"--data.cache_dir={home / 'cache'}"]


def kill_script(name: str, home: Path, choose: random.Random, kills: int) -> list[str]:
    """Kill a script `kills` times, and call it again each time; what was there after each kill.

    Raises:
        AssertionError: what was there is not whole, the next call fails, or something else is left.
    """
    corpus, said = write_texts(home), home / f"said-{name}.txt"
    if not (home / "run").exists():
        assert wait(start([*FLAGS, *corpus, "--train.steps=100"], home / "run", 1)) == [0]
    words = {"CORPUS": corpus, "TRAINING": [*FLAGS, "--train.steps=100"]}

    def call(out: Path) -> int:
        out.mkdir(exist_ok=True)
        parts = shlex.split(SCRIPTS[name].replace("HOME", str(home)).replace("OUT", str(out)))
        return forked(partial(run_script, name, *chain(*(words.get(part, [part]) for part in parts))), said)

    for number in range(2):  # the first also imports what is not imported yet
        began, out = time.monotonic(), home / f"{name}-whole-{number}"
        assert wait([call(out)]) == [0], said.read_text()
    took, whole, found = time.monotonic() - began, files_in(out), []
    for number in range(kills):
        out = home / f"{name}-{number}"
        child = call(out)
        time.sleep(choose.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        killed = wait([child]) == [-signal.SIGKILL]
        there = files_in(out)
        found.append("ended before" if not killed else "all" if there == whole else "some" if there else "nothing")
        if name != "ablate":  # whose runs go on
            assert {path: whole.get(path) for path in there} == there, f"{name} left half of something"
        (code,) = wait([call(out)])
        assert code == 0 or (name == "export" and there == whole), said.read_text()[-3000:]
        # A run can end by itself after its ablation was killed: it may still draw, and nobody has measured its costs.
        while any(str(out) in " ".join(child.info["cmdline"] or ()) for child in psutil.process_iter(["cmdline"])):
            time.sleep(0.1)
        left = [str(path) for path in out.rglob("*.tmp")]
        differing = {path for path in files_in(out).keys() ^ whole.keys() if not path.endswith("seed-0.json")}
        assert not differing and not left, f"{name} left {left}; {differing} differ"
        shutil.rmtree(out)
    return found


def files_in(folder: Path) -> dict[str, int]:
    """The size of each file that is not hidden, nor in a hidden folder; but for the checkpoints of a variant."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in paths.items() if not re.search(r"(^|/)(\.|checkpoints/)", name)}


def table(outcomes: list[Outcome]) -> str:
    """What was done, as Markdown."""
    rows = []
    for outcome in outcomes:
        counts = [*(outcome.strikes[kind] for kind in STRIKES), outcome.damaged, outcome.wrong_steps]
        moments = " ".join(f"{moment:.1f}" for moment in outcome.moments)
        facts = [f"`{outcome.settings}`", outcome.processes, outcome.steps, moments, *counts, outcome.end]
        rows.append([*map(str, facts)])
    return markdown_table(
        ["settings", "processes", "steps", "struck after s", *STRIKES, "damaged", "steps wrong", "end"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="stop short runs after so many kills")
    parser.add_argument("--late-kills", type=int, default=30, help="and runs of a minute after so many")
    parser.add_argument("--minutes", type=float, default=120.0, help="or both after so much time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    choose, began, outcomes = random.Random(arguments.seed), time.monotonic(), []
    with tempfile.TemporaryDirectory() as home:
        corpus = write_texts(Path(home))
        for life, wanted in ((SHORT, arguments.kills), (LONG, arguments.late_kills)):
            kills = 0
            while kills < wanted and time.monotonic() - began < 60 * arguments.minutes:
                folder = Path(home) / f"run{len(outcomes)}"
                folder.mkdir()
                outcomes.append(soak_one(folder, corpus, choose, 12, life))
                kills += outcomes[-1].kills
                print(f"{kills} of {wanted} kills, {outcomes[-1]}", file=sys.stderr)
                if outcomes[-1].end != "identical" or outcomes[-1].wrong_steps:
                    print((folder / "said.txt").read_text()[-5000:], file=sys.stderr)
                shutil.rmtree(folder)
        rows = [(name, Counter(kill_script(name, Path(home), choose, arguments.kills // 5))) for name in SCRIPTS]
    there = ("nothing", "some", "all", "ended before")
    print(markdown_table(["script", *there], [[name, *(str(count[kind]) for kind in there)] for name, count in rows]))
    lost = sum(outcome.kills for outcome in outcomes if outcome.end != "identical")
    print(table(outcomes))
    kills, wrong = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("kills", "wrong_steps"))
    print(f"\n{kills} kills in {len(outcomes)} runs: {kills - lost} survived, {wrong} steps or validations wrong")
    late = sorted(moment for outcome in outcomes if outcome.steps != STEPS for moment in outcome.moments)
    print(f"strikes in runs of a minute, in seconds after a start: {', '.join(f'{moment:.1f}' for moment in late)}")
    stops = sum(outcome.strikes["ask to stop"] for outcome in outcomes)
    slowest = max((outcome.slowest_stop for outcome in outcomes), default=0.0)
    print(f"{stops} stops with a checkpoint, the slowest after {slowest:.1f} s")
    sys.exit(1 if lost or wrong else 0)


if __name__ == "__main__":
    main()
