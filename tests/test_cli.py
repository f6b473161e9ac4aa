"""What the scripts share: parsing, help, and how a script ends."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from charlm import cli
from charlm.config import Config, ConfigError, Section, UserError
from charlm.config.load import load_config
from charlm.config.types import Count

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts/train.py")


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


def end_of(main) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.script(main)
    return caught.value.code


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_script_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a success that prints or exits like a failure."""
    assert end_of(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize(("rank", "waits"), [(None, []), ("0", []), ("1", [10])])
def test_user_error_is_one_message(rank: str | None, waits: list[float], capsys, monkeypatch) -> None:
    """Guards against a traceback, a wrong code, and an error that only a later process meets being lost."""
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, rank)
    assert end_of(raising(ConfigError("no"))) == 2
    assert capsys.readouterr() == ("", "error: no\n")
    assert waited == waits


def test_launched_processes_print_one_message() -> None:
    """Guards against as many messages as processes, and against none: a launcher ends all when the first one exits."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", TRAIN, "--train.stepz=3"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: unrecognized arguments: --train.stepz") == 1


def test_other_errors_keep_their_traceback() -> None:
    """Guards against hiding a fault of ours as if it were the user's."""
    with pytest.raises(ValueError, match="ours"):
        cli.script(raising(ValueError("ours")))


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback on Ctrl-C."""
    assert end_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_reader_that_leaves() -> None:
    """Guards against a traceback when the output goes to `head`."""
    program = "from charlm import cli\ncli.script(lambda: [print('x' * 100) for _ in range(100_000)])"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
