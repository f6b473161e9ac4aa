"""Every command in README.md and docs/ is read by its own parser, and run in the order of its document.

A command is a line of a ```sh block, a ```python block, or text in backticks that begins with `python scripts/`,
`make ` or `source scripts/`. Commands under `<!-- needs: a GPU -->`, or another of NEEDS, are read but not run; those
of EXTRAS run where the package is installed.
"""

import ast
import dataclasses
import hashlib
import importlib
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import yaml

import charlm
from charlm import cli
from charlm.config import DataConfig
from charlm.data.corpus import load_corpus
from charlm.data.sources import PUBLISHED
from charlm.data.vocabulary import ByteVocabulary
from charlm.data.windows import evaluation_windows
from charlm.inference.evaluation import bits_per, count_units
from launched import ON_CPU
from tiny import run_script

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = {
    "charlm[counts]": "numba",
    "charlm[hf]": "transformers",
    "charlm[lm-eval]": "lm_eval",
    "charlm[onnx]": "onnxscript",
}
NEEDS = ("a GPU", "a network", "a cluster", "a checkpoint of nanoGPT", *EXTRAS)
ELSEWHERE = {
    "python scripts/ablate.py": "tests/ablation/test_ablate_script.py",
    "python scripts/benchmark.py": "tests/benchmark/test_benchmark_races.py",
    "python scripts/lens.py runs/": "tests/lens/test_server.py",
    "make test": ".ci/run",
    "make gpu": "tests/gpu/test_gpu.py",
    "make soak": "tests/soak.py",
    "make lint": "Makefile",
}
"""Commands that take too long here, or that run these tests: how they begin, and the file that runs them."""
SMALL = {
    "data": {"corpus": "file", "path": "my.txt"},
    "model": {"num_heads": 2, "d_model": 16, "d_ff": 16, "ngram_buckets": 16, "ngram_width": 4},
    "train": {
        "steps": 4,
        "time": None,
        "batch_size": 4,
        "mixed_precision": "no",
        "compile": "no",
        "valid_every": 2,
        "valid_symbols": 100,
    },
}
"""Options that make the configs small in the folder where commands are run."""
STEPS = (r"(--run\.resume_from|--run\.branch_step|--train\.steps)=\d+", r"\1=4")
"""The only part of a command that is rewritten: step numbers, because the runs are short."""
TEXT = "".join(f"<page {number}>\u00e9 is the {number * number}th of them.\n" for number in range(2000))
LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "launch_command_parser"),
    "torchrun": ("torch.distributed.run", "get_args_parser"),
}
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
COMMANDS = re.compile(rf"{FENCE.pattern}|`(?P<inline>(?:(?:python|source) scripts/|make )[^`]*)`", FENCE.flags)
LINE = r"(?:.*\\\n)*.+"
"""A line of shell with those that continue it."""


class Command(NamedTuple):
    place: str
    """Document and line."""
    language: str
    """sh or python."""
    text: str
    mark: str | None


def commands_in(document: Path) -> Iterator[Command]:
    """The commands of a document, in order."""
    text = document.read_text(encoding="utf-8")
    name = document.relative_to(ROOT) if document.is_relative_to(ROOT) else document.name
    for found in COMMANDS.finditer(text):
        group, language = ("inline", "sh") if found["inline"] else ("text", found["language"])
        pattern = {"inline sh": "(?s:.+)", "text python": "(?s:.+)", "text sh": LINE}.get(f"{group} {language}", "(?!)")
        for command in re.finditer(pattern, found[group]):
            number = text.count("\n", 0, found.start(group) + command.start()) + 1
            line = command[0] if language == "python" else command[0].replace("\\\n", " ").replace("\n", " ")
            yield Command(f"{name}:{number}", language, line, found["mark"])


ALL = [command for document in DOCUMENTS for command in commands_in(document)]
LINES = [command for command in ALL if command.language == "sh"]


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The environment variables at the beginning of a shell line, and its words with file patterns expanded."""
    words = []
    for word in shlex.split(line, comments=True):
        files = sorted(ROOT.glob(word)) if "*" in word and " " not in word else []
        words += [str(file.relative_to(ROOT)) for file in files] or [word]
    first = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


class Read(BaseException):
    """Raised when a script has read its command line, before it does its work."""


def read_by_script(script: str, *words: str) -> None:
    """Let a script read its own command line; ablate also makes its rows."""

    def parse_and_stop(kind: type, argv: list[str] | None = None) -> None:
        parse(kind, argv)
        raise Read

    parse = cli.parse
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *words])
        patch.setattr(sys, "path", list(sys.path))
        if script == "scripts/ablate.py":
            patch.setattr("charlm.ablation.runner.Runner", Mock(side_effect=Read))
        else:
            patch.setattr(cli, "parse", parse_and_stop)
        try:
            runpy.run_path(script, run_name="__main__")
        except Read:
            return
        except SystemExit as end:
            assert end.code == 0 and "--help" in words
            return
    raise AssertionError(f"{script} did its work without reading its command line")


def read(line: str) -> None:
    """Let the program of a shell line read its arguments, and do nothing else."""
    environment, (program, *words) = words_of(line)
    if program == "python" and words[0] == "-c":
        ast.parse(words[1])
    elif program == "python" and words[0] == "-m":
        assert find_spec(words[1])
    elif program == "python":
        read_by_script(*words)
    elif program in ("accelerate", "torchrun"):
        assert program == "torchrun" or words.pop(0) == "launch"
        module, parser = LAUNCHERS[program]
        options = getattr(importlib.import_module(module), parser)().parse_args(words)
        assert not getattr(options, "config_file", None) or (ROOT / options.config_file).is_file()
        words = [options.training_script, *options.training_script_args]
        read(shlex.join(words)) if options.module else read_by_script(*words)
    elif program == "charlm":
        read_by_script(f"scripts/{words[0]}.py", *words[1:])
    elif program == "sbatch":
        assert (ROOT / words[0]).is_file()
        read_by_script("scripts/train.py", "--config", environment["CONFIG"], *words[1:])
    elif program == "source":
        assert (ROOT / words[0]).is_file()
    elif program == "make":
        (target,) = words
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert words.pop(0) == "install"
        if words == ["."]:
            return
        for option, file in zip(words[::2], words[1::2], strict=True):
            assert option == "-r" and (ROOT / file).is_file()
    else:
        raise AssertionError(f"{line}: nothing here reads {program}")


@pytest.mark.parametrize("command", [pytest.param(command, id=command.place) for command in LINES])
def test_a_command_is_understood(command: Command) -> None:
    """Guards against documents that name flags, values, configs, scripts or targets that no longer exist."""
    read(command.text)


def test_every_command_is_seen() -> None:
    """Guards against a command outside of ```sh blocks, and against unknown marks."""
    assert len(LINES) > 50
    assert {command.mark for command in ALL} <= {None, "order.py", *(f"needs: {what}" for what in NEEDS)}
    assert all(command.split()[-1].split("/")[-1] in (ROOT / file).read_text() for command, file in ELSEWHERE.items())
    for document in DOCUMENTS:
        rest = FENCE.sub(lambda fence: "" if fence["language"] == "sh" else fence[0], document.read_text("utf-8"))
        hidden = r"^ *(?:python (?:scripts/|-).*|accelerate launch.*|torchrun .*|pip install.*)"
        assert re.findall(hidden, rest, re.MULTILINE) == [], document


def test_yaml_in_documents(tmp_path: Path) -> None:
    """Guards against an example config that charlm refuses."""
    fences = [fence for file in DOCUMENTS for fence in FENCE.finditer(file.read_text("utf-8"))]
    blocks = [fence["text"] for fence in fences if fence["language"] == "yaml"]
    assert blocks
    for block in blocks:
        (tmp_path / "example.yaml").write_text(block)
        charlm.load_config(tmp_path / "example.yaml")


def test_the_rows_in_the_readme() -> None:
    """Guards against a README that shows the table of losses as `explain` no longer prints it."""
    (shown,) = re.findall(r"<!-- explain -->\n```\n(.*?)\n```", DOCUMENTS[0].read_text("utf-8"), re.DOTALL)
    assert shown == charlm.explain(charlm.load_config(ROOT / "configs/demo.yaml", {"model.num_layers": 3})).to_text()


def test_links() -> None:
    """Guards against links to pages and headings, and names of files and functions, that no longer exist."""
    for document in DOCUMENTS:
        assert all(hasattr(charlm, name) for name in re.findall(r"charlm\.(\w+)\(", document.read_text("utf-8")))
        for file in re.findall(r"`((?:charlm|configs|scripts|tests)/[\w/]+(?:\.\w+)?)`", document.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{document.name}: {file}"
        for file, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", document.read_text("utf-8")):
            target = document.parent / file if file else document
            assert target.is_file(), f"{document.name}: {file}"
            titles = re.findall("^#+ (.*)", FENCE.sub("", target.read_text("utf-8")).lower(), re.M) if anchor else []
            headings = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]
            assert not anchor or anchor in headings, f"{document.name}: {file}#{anchor}"


def test_example_of_evaluation() -> None:
    """Guards against a worked example that differs from what evaluation does."""
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    rows = [[cell.split() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    numbers = [[list(map(int, cell)) for cell in row] for row in rows if len(row) == 5 and row[2][0].isdigit()]
    (no_window, no_input, *first), *windows = numbers
    assert (no_window, no_input, *first) == ([], [], [0], [0], [0])
    expected = evaluation_windows(num_symbols=8, context_length=4, stride=2)
    assert [window for window, *_ in windows] == [[0], [1], [2]] and expected.length == 4
    for start, scored, (_, reads, predicts, counts, context) in zip(*expected[:2], windows, strict=True):
        assert reads == list(range(start, start + 4))
        assert predicts == [symbol + 1 for symbol in reads]
        assert counts == predicts[scored:]
        assert context == [symbol - start for symbol in counts]
    (bits,) = [[int(*cell) for cell in row[1:]] for row in rows if row[0] == ["bits"]]
    nats = np.array(bits) * math.log(2)
    example = np.frombuffer("caf\u00e9 au".encode(), np.uint8)
    characters, num_bytes = count_units(example, ByteVocabulary())
    assert f"{bits_per(nats, num_bytes):.0f} bits per byte, 24 / 7 = {bits_per(nats, characters):.3f} bits per" in text


def test_the_command_that_repeats_a_score() -> None:
    """Guards against a command for the best score of a run on another text than the run was validated on."""
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    (run, limit) = re.search(r"runs/(\w+) --split valid --limit (\d+) --precision bf16` reproduces", text).groups()
    assert charlm.load_config(ROOT / "configs" / f"{run}.yaml").train.valid_symbols == int(limit)


def test_scores_of_the_paper_have_its_units() -> None:
    """Guards against the paper's bits per byte called bits per character: on enwik8 they are not the same."""
    for corpus, unit in (("enwik8", "byte"), ("text8", "character")):
        for file in (ROOT / "configs").glob(f"{corpus}_t*.yaml"):
            assert f"on {corpus}: 1." in file.read_text() and f" bits per {unit} on test" in file.read_text(), file


@pytest.mark.parametrize(
    "line",
    [
        "python scripts/train.py --config configs/dmeo.yaml",
        "python scripts/ablate.py --config configs/ablation_cpu.yaml --sweep aux.layers.wieght=0,1",
        "accelerate launch --config_file configs/accelerate/tpu.yaml scripts/train.py --config configs/demo.yaml",
        "CONFIG=configs/none.yaml sbatch scripts/slurm/one_node.sbatch",
        "pip install -r requirements-none.txt",
    ],
)
def test_a_wrong_command_is_refused(line: str) -> None:
    """Guards against a check of commands that lets everything pass."""
    with pytest.raises(AssertionError):
        read(line)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with small configs, a small enwik8 in its cache, the run of `make demo`, and some files."""
    folder = tmp_path_factory.mktemp("documents") / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    for name in ("charlm", "scripts", "Makefile", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / ".installed").touch()
    for name in ("my.txt", "FILE", "README.md"):
        (folder / name).write_text(TEXT if name == "my.txt" else TEXT[:1000])
    shutil.copytree(ROOT / "configs", folder / "configs")
    for file in (folder / "configs").glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        small = {name: ({} if name == "data" else config.get(name, {})) | options for name, options in SMALL.items()}
        file.write_text(yaml.safe_dump(config | small))
    for file in (folder / "configs" / "accelerate").iterdir():
        file.write_text(f"{file.read_text()}main_process_port: 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CHARLM_CACHE", str(folder / "cache"))
        size, digest = len(TEXT.encode()), hashlib.sha256(TEXT.encode()).hexdigest()
        small = {"size": size, "algorithm": "sha256", "digest": digest, "split_sizes": (size - 4000, 2000, 2000)}
        patch.setitem(PUBLISHED, "enwik8", dataclasses.replace(PUBLISHED["enwik8"], **small))
        load_corpus(DataConfig(corpus="enwik8", path=folder / "my.txt"))
        assert run_script("train", "--config", "configs/demo.yaml") == 0
        yield folder


def run(command: Command) -> None:
    """Run a command in the working folder."""
    if command.language == "python":
        Path("example.py").write_text(command.text)
        runpy.run_path("example.py", run_name="__main__")
        return
    line = re.sub(*STEPS, command.text)
    environment, words = words_of(line)
    for word in words:
        if re.fullmatch(r"runs/\w+", word) and not Path(word).exists():
            shutil.copytree("runs/demo", word)
    if words[0] == "python" and words[1].startswith("scripts/"):
        assert not environment
        code = run_script(Path(words[1]).stem, *words[2:])
    else:
        path = f"{Path(sys.executable).parent}:{environ['PATH']}"
        code = subprocess.run(["bash", "-c", line], env=environ | ON_CPU | {"PATH": path}, timeout=600).returncode
    assert code == 0, f"{command.place}: {command.text}"


@pytest.mark.slow
@pytest.mark.parametrize("document", [pytest.param(document, id=document.name) for document in DOCUMENTS])
def test_a_document_can_be_followed(document: Path, checkout: Path, tmp_path: Path, monkeypatch) -> None:
    """Guards against commands that fail in the order of the document, on what earlier commands have left."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CHARLM_CACHE", str(checkout / "cache"))
    for command in commands_in(document):
        extra = EXTRAS.get((command.mark or "").removeprefix("needs: "))
        if (command.mark is None or (extra and find_spec(extra))) and not command.text.startswith(tuple(ELSEWHERE)):
            run(command)
