"""What the scripts share: parsing, help, how a script ends, and completion in a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import Mock

import pytest

from charlm import cli
from charlm.config import Config, ConfigError, Section, Stopped, UserError
from charlm.config.load import load_config
from charlm.config.types import Count
from launched import TORCHRUN, launch
from tiny import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]


class Sample(Section):
    """Take a sample of which there is so much to say that it takes more than one line of a terminal, and
    more than one line of source."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    output: Annotated[Path, cli.Flag("--output", "-o")] = Path("out")
    """Where it goes."""
    top_k: Count | None = None
    """Most likely
    symbols (100%)."""
    split: Literal["valid", "test"] = "test"
    """Which part."""
    prompt: Annotated[tuple[str, ...], cli.Flag("--prompt", action="append", metavar="TEXT")] = ()
    """Several."""
    speeds: tuple[int, ...] = ()
    """Several, by commas."""
    methods: Annotated[tuple[str, ...], cli.Flag("--methods", nargs="+", metavar="TEXT")] = ()
    """Several, by spaces."""
    all_layers: bool = False
    """Every layer."""
    verify: bool = True
    """Look once more."""
    data: cli.MovedCorpus = cli.MovedCorpus()


class Show(cli.WithConfig):
    """Show a configuration."""

    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """As JSON."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text("model: {num_layers: 3}\ntrain: {steps: 5, mixed_precision: no}\n")
    return tmp_path / "small.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("x", {}),
        ("x --top-k 5", {"top_k": 5}),
        ("--top_k=5 x", {"top_k": 5}),
        ("x --top-k=null", {}),
        ("x --all-layers --no-verify", {"all_layers": True, "verify": False}),
        ("x --all_layers --no_verify --verify", {"all_layers": True}),
        ("x -o y", {"output": Path("y")}),
        ("x --output=y", {"output": Path("y")}),
        ("x --prompt a --prompt [b --prompt=null --prompt=", {"prompt": ("a", "[b", "null", "")}),
        ("x --speeds=1,16,64", {"speeds": (1, 16, 64)}),
        ("x --methods a b --split=valid", {"methods": ("a", "b"), "split": "valid"}),
        ("x --data.cache-dir y --data.hub_id=z", {"data": cli.MovedCorpus(cache_dir=Path("y"), hub_id="z")}),
    ],
)
def test_options_of_a_script(words: str, expected: dict) -> None:
    """Guards against `--top-k` and `--top_k` differing, bare flags that want a value, and prompts that are parsed."""
    assert cli.parse(Sample, words.split()) == Sample(run=Path("x"), **expected)


@pytest.mark.parametrize(
    ("words", "option", "fragments"),
    [
        ("", None, ["RUN"]),
        ("x --top-q=3", "top_q", ["--top-q", "--top-k"]),
        ("x --top-k=few", "top_k", ["top_k=few", "integer"]),
        ("x --top-k=0", "top_k", ["top_k=0", "greater than or equal to 1"]),
        ("x --top-k", "top_k", ["expected one argument"]),
        ("x --split=tset", "split", ["split=tset", "'valid'"]),
        ("x y", None, ["y"]),
        ("x --speeds=1,x --top-k=0", "top_k", ["speeds.1=x", "top_k=0"]),
        ("x --all", "all", ["--all"]),
        ("x --prompt -x", "prompt", ["--prompt=-x"]),
        ("x -o -x", "output", ["-o=-x"]),
        ("x --prompt --x", "x", ["--prompt=--x"]),
        ("x --methods -x", "methods", ["--methods=-x"]),
    ],
)
def test_wrong_options_of_a_script(words: str, option: str | None, fragments: list[str]) -> None:
    """Guards against argparse ending the caller's process, abbreviations, and mistakes that come one by one."""
    with pytest.raises(UserError) as caught:
        cli.parse(Sample, words.split())
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert caught.value.option == option


def test_config_and_own_options(small: Path) -> None:
    """Guards against files, flags and a script's own options that do not mix in any order."""
    parsed = cli.parse(Show, ["--train.steps", "7", "--config", str(small), "--json", "--run.resume=true"])
    assert parsed.as_json
    assert parsed.config == load_config(small, ["--train.steps=7", "--run.resume=true"])
    assert (parsed.config_files, parsed.flags) == ((small,), {"train.steps": "7", "run.resume": "true"})
    assert cli.parse(Show, []).config == Config()


def help_of(kind: type[Section], *words: str, columns: int, monkeypatch, capsys) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as caught:
        cli.parse(kind, [*words, "--help"])
    assert caught.value.code == 0
    shown, complained = capsys.readouterr()
    assert complained == ""
    return shown.splitlines()


def test_help_shows_the_files_values(small: Path, capsys, monkeypatch) -> None:
    """Guards against help that shows the code's defaults for a configuration that changes them, and lacks limits."""
    words = ["--config", str(small), "--train.batch_size=3"]
    lines = help_of(Show, *words, columns=80, monkeypatch=monkeypatch, capsys=capsys)
    assert "Show a configuration." in lines
    for option, default in [
        ("--model.num_layers INTEGER >= 1, <= 10000", "(default: 3)"),
        ("--train.steps INTEGER >= 1", "(default: 5)"),
        ("--train.batch_size INTEGER >= 1", "(default: 3)"),
        ("--train.mixed_precision fp32 | bf16 | fp16 | auto", "(default: fp32)"),
        ("--train.micro_batch_size INTEGER >= 1 | auto | null", "(default: null)"),
        ("--train.adam_betas [NUMBER >= 0, < 1, NUMBER >= 0, < 1]", "(default: [0.9, 0.99])"),
        ("--aux.layers.at [LAYER, ...] | null", "(default: null)"),
        ("--data.separator TEXT", "(default: \\n)"),
        ("--run.resume true | false", "(default: false)"),
    ]:
        below = " ".join(lines[lines.index(f"  {option}") + 1 :])
        assert default in re.sub(r"\s+", " ", below.partition(" --")[0]), option


def test_help_is_laid_out(capsys, monkeypatch) -> None:
    """Guards against sentences that are cut where a line of source ends, lines wider than the terminal, and names with
    underscores where every document writes dashes."""
    lines = help_of(Sample, columns=60, monkeypatch=monkeypatch, capsys=capsys)
    assert " ".join(Sample.__doc__.split()) in " ".join(lines)
    assert lines[lines.index("  --top-k INTEGER >= 1") + 1].strip() == "Most likely symbols (100%)."
    for option in ("--all-layers", "--verify, --no-verify", "--data.cache_dir PATH", "--methods TEXT [TEXT ...]"):
        assert f"  {option}" in lines
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("error", "rank", "code", "printed", "waits"),
    [
        (None, None, 0, "", []),
        (ConfigError("no"), None, 2, "error: no\n", []),
        (ConfigError("no"), "0", 2, "error: no\n", []),
        (ConfigError("no"), "1", 2, "error: no\n", [10]),
        (PermissionError(13, "Permission denied", "/x"), None, 2, "error: [Errno 13] Permission denied: '/x'\n", []),
        (Stopped("saved"), "0", 0, "saved\n", []),
        (Stopped("saved"), "1", 0, "", []),
        (KeyboardInterrupt(), None, 130, "interrupted\n", []),
    ],
)
def test_how_a_script_ends(error, rank, code, printed, waits, capsys, monkeypatch) -> None:
    """Guards against tracebacks, wrong codes, and an error that only a later process meets being lost."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, rank)
    with pytest.raises(SystemExit) as caught:
        cli.script(Mock(side_effect=error))
    assert caught.value.code == code
    assert capsys.readouterr() == ("", printed)
    assert waited == waits


def test_other_errors_keep_their_traceback() -> None:
    """Guards against hiding a fault of ours as if it were the user's."""
    with pytest.raises(ValueError, match="ours"):
        cli.script(Mock(side_effect=ValueError("ours")))


def test_launched_processes_print_one_message() -> None:
    """Guards against as many messages as processes, and against none: a launcher ends all when the first one exits."""
    done = launch([*TORCHRUN, SCRIPTS / "train.py", "--train.stepz=3"])
    assert done.returncode != 0
    assert done.stderr.count("error: unrecognized arguments: --train.stepz") == 1


@pytest.mark.parametrize(
    ("script", "library"),
    [("generate", "argcomplete"), ("generate", "torch")] + [(path.stem, "pydantic") for path in SCRIPTS.glob("*.py")],
)
def test_ctrl_c_while_libraries_load(script: str, library: str, tmp_path: Path) -> None:
    """Guards against pages of traceback for someone who has only changed their mind."""
    (tmp_path / f"{library}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    command = [sys.executable, SCRIPTS / f"{script}.py", tmp_path, "--prompt=x"]
    restored = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in case it is ignored here
    (tmp_path / "sitecustomize.py").write_text(restored)
    done = launch(command, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.replace("interrupted\n", "")) == (130, "")


def offered(line: str, folder: Path) -> set[str]:
    """The words that may stand at the end of a line of bash, which calls a script as a program or by a launcher."""
    out = folder / "out"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_WORDBREAKS": " ",
        "PYTHONPATH": str(ROOT),
    }
    scripts = [SCRIPTS / word for word in line.split() if word.endswith(".py")]
    program = [sys.executable, *(scripts or ["-m", "charlm"])]
    subprocess.run(program, cwd=folder, env=environment, capture_output=True, timeout=120)
    return set(out.read_text().replace("\\", "").split("\n"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.py --train.mixed_p", {"--train.mixed_precision "}),
        ("train.py --train.mixed_precision ", {"fp32", "bf16", "fp16", "auto"}),
        ("train.py --train.mixed_precision=b", {"--train.mixed_precision=bf16"}),
        ("train.py --run.tracker tens", {"tensorboard "}),
        ("train.py --run.resume ", {"true", "false"}),
        ("train.py --config set", {"settings.yaml "}),
        ("evaluate.py runs/x --spl", {"--split "}),
        ("evaluate.py runs/x --split t", {"test "}),
        ("compress.py --no", {"--no-verify "}),
        ("accelerate launch --config_file x.yaml train.py --train.mixed_p", {"--train.mixed_precision "}),
        ("torchrun --nproc_per_node=2 train.py --train.seed=3 --run.resume ", {"true", "false"}),
        ("charlm ex", {"explain", "export"}),
        ("charlm explain", {"explain"}),
        ("charlm explain --train.mixed_p", {"--train.mixed_precision"}),
        ("charlm evaluate runs/x --split t", {"test"}),
    ],
)
def test_a_line_is_completed(line: str, words: set[str], tmp_path: Path) -> None:
    """Guards against options and words that are not offered, and a script that does its work when it is asked."""
    (tmp_path / "settings.yaml").touch()
    assert {word.strip() for word in offered(line, tmp_path)} == {word.strip() for word in words}
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml", "out"}


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_marked(script: Path) -> None:
    """Guards against a script that argcomplete does not take for one that answers."""
    assert "PYTHON_ARGCOMPLETE_OK" in script.read_text()[:1024]
