"""What the scripts share: parsing, help, and how a script ends."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from charlm import cli
from charlm.config import Config, ConfigError, UserError
from charlm.config_files import load_config

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts/train.py")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Take a sample."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    top_k: int | None = None
    """Most likely symbols."""
    split: Literal["valid", "test"] = "test"
    """Which part."""
    all_layers: bool = False
    """Every layer."""


@dataclass(frozen=True, kw_only=True)
class Show(cli.WithConfig):
    """Show a configuration."""

    json: bool = False
    """As JSON."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text("model: {num_layers: 3}\ntrain: {steps: 5, mixed_precision: no}\n")
    return tmp_path / "small.yaml"


@pytest.mark.parametrize("dash", ["-", "_"])
def test_options_of_a_script(dash: str) -> None:
    """Guards against `--top-k` and `--top_k` differing, and bare flags that want a value."""
    parsed = cli.parse(Sample, ["runs/x", f"--top{dash}k", "5", f"--all{dash}layers", "--split=valid"])
    assert parsed == Sample(run=Path("runs/x"), top_k=5, all_layers=True, split="valid")
    assert cli.parse(Sample, ["x", "--top-k=null"]).top_k is None


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ([], ["RUN", "The run's folder"]),
        (["x", "--top-q=3"], ["--top-q=3", "--top-k"]),
        (["x", "--top-k=few"], ["--top-k", "'few' is not a whole number"]),
        (["x", "--split=tset"], ["--split", "'tset'", "'valid', 'test'", "Did you mean test?"]),
        (["x", "y"], ["y"]),
        (["--tyro-print-completion", "bash"], ["source scripts/completion.sh"]),
    ],
)
def test_wrong_options_of_a_script(argv: list[str], fragments: list[str]) -> None:
    """Guards against tyro ending the caller's process, and a box in place of a message."""
    with pytest.raises(UserError) as caught:
        cli.parse(Sample, argv)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert "│" not in str(caught.value)


def test_config_and_own_options(small: Path) -> None:
    """Guards against two parsers: files, flags and a script's own options mix in any order, and as load_config says."""
    parsed = cli.parse(Show, ["--train.steps", "7", "--config", str(small), "--json", "--run.resume=true"])
    assert parsed.json
    assert parsed.settings == load_config(small, ["--train.steps=7", "--run.resume=true"])
    assert (parsed.settings.train.steps, parsed.settings.model.num_layers) == (7, 3)
    assert cli.parse(Show, []).settings == Config()


def test_config_given_several_times(small: Path, tmp_path: Path) -> None:
    """Guards against the last --config alone being read, or the first one winning."""
    (tmp_path / "more.yaml").write_text("train: {steps: 9}\n")
    settings = cli.parse(Show, [f"--config={small}", "--config", str(tmp_path / "more.yaml")]).settings
    assert (settings.train.steps, settings.model.num_layers) == (9, 3)


def test_errors_name_the_file_unless_a_flag_is_at_fault(small: Path) -> None:
    """Guards against a message that leaves open which file to edit."""
    with pytest.raises(ConfigError, match=r"num_heads=2\nmodel\.d_model was set in .*small\.yaml, line 1$"):
        small.write_text("model: {d_model: 9}\n")
        cli.parse(Show, ["--config", str(small)])
    with pytest.raises(ConfigError, match=r"num_heads=2$"):
        cli.parse(Show, ["--config", str(small), "--model.d-model", "11"])
    with pytest.raises(UserError, match="Missing value for argument '--config'"):
        cli.parse(Show, ["--config"])


def test_an_unknown_option_of_a_file_is_placed_before_the_hints(small: Path) -> None:
    """Guards against a flag that nobody typed, whose file comes after a page of options, and hints that name the code's
    default as if it were the file's."""
    small.write_text("train: {seeed: 9, steps: 5}\n")
    with pytest.raises(UserError) as caught:
        cli.parse(Show, ["--config", str(small)])
    complaint, place, *hints = str(caught.value).split("\n")
    assert "seeed" in complaint and place == f"train.seeed was set in {small}, line 1"
    assert any("--train.seed INT" in hint for hint in hints)
    assert "default" not in str(caught.value)


def test_a_file_cannot_set_the_options_of_a_script(small: Path) -> None:
    """Guards against `json: true` in a YAML file switching a script's own flag."""
    small.write_text("json: true\n")
    with pytest.raises(UserError, match="json is no section"):
        cli.parse(Show, ["--config", str(small)])


def test_help_shows_the_files_values(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Guards against help that shows the code's defaults for a configuration that changes them."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.parse(Show, ["--config", str(small), "--help", "--train.batch_size=3"])
    shown, complained = capsys.readouterr()
    assert caught.value.code in (0, None)
    assert complained == ""
    assert "Show a configuration." in shown
    for option, default in [
        ("--config PATH", "small.yaml"),
        ("--model.num_layers INT", "(default: 3)"),
        ("--train.steps INT", "(default: 5)"),
        ("--train.batch_size INT", "(default: 3)"),
        ("--train.mixed_precision {no,bf16,fp16,auto}", "(default: no)"),
        ("--train.micro_batch_size INT|auto|null", "(default: null)"),
        ("--train.adam_betas [FLOAT,FLOAT]", "[0.9, 0.99]"),
        ("--run.resume {true,false}", "(default: false)"),
    ]:
        assert default in shown.partition(option)[2].partition("--")[0], option


@dataclass(frozen=True, kw_only=True)
class Wordy:
    """Take a sample of which there is so much to say that it takes more than one line of a terminal, and
    more than one line of source.

    first: something that is said about the first of the things of which a list is made.
    second: something else.
    """

    separator: str = "\n"
    """A sentence on two lines
    (of source)."""


def test_help_is_laid_out(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Guards against sentences that are cut where a line of source ends, lists that are run together, lines wider
    than the terminal, and a default that breaks the line."""
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        cli.parse(Wordy, ["--help"])
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        "Take a sample of which there is so much to say that it takes",
        "more than one line of a terminal, and more than one line of",
        "source.",
        "",
        "first: something that is said about the first of the things",
        "  of which a list is made.",
        "second: something else.",
    ]
    assert "A sentence on two lines (of source)." in " ".join("".join(lines[7:]).replace("│", "").split())
    assert any("sentence on two lines (of" in line for line in lines) and any(r"'\n')" in line for line in lines)
    assert max(map(len, lines)) == 60


def test_help_of_a_script_shows_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against `--top_k` in help where every document writes `--top-k`."""
    with pytest.raises(SystemExit):
        cli.parse(Sample, ["-h"])
    shown = capsys.readouterr().out
    assert "--top-k INT|null" in shown
    assert "--all-layers" in shown
    assert "--no-all-layers" not in shown


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


@pytest.mark.parametrize(("rank", "waits"), [(None, []), ("0", []), ("1", [cli.PATIENCE])])
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
    assert done.stderr.count("error: Unrecognized options: --train.stepz=3\n") == 1


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
