"""Places that a user names: ~ in all of them, outputs that cannot be written, and what this user may not read."""

import os
import pwd
import runpy
import shutil
import stat
import sys
from pathlib import Path

import pytest

from charlm import cli
from charlm.config import Config, DataConfig, UserError
from charlm.config.load import load_config
from charlm.config.types import options_of, parts_of
from charlm.data.corpus import load_corpus
from charlm.data.sources import located
from charlm.files import write_whole
from charlm.runs.folder import Run
from charlm.training.start import check_resumable
from powers import without_powers
from storage import CORPUS
from tiny import SCRIPTS, TINY, run_script

NEEDED = {
    "ablate": "--methods ~/a,~/b ~/c",
    "benchmark": "train --picture ~/p.png --run ~/r",
    "compress": "~/r ~/f -o ~/o --picture=~/p.png",
    "decompress": "~/r ~/f --output ~/o",
    "env": "",
    "evaluate": "~/r --picture ~/p.png --data.path ~/d --data.cache_dir=~/c",
    "explain": "--picture=~/p.png",
    "export": "~/r --to=~/e --data.path=~/d --data.cache_dir ~/c",
    "generate": "~/r --prompt x --adapt ~/adapt_to",
    "import": "~/folder --to=~/to --data.path=~/d --data.cache_dir ~/c",
    "prepare": "",
    "report": "~/r ~/s -o ~/o --data.path=~/d --data.cache_dir ~/c",
    "train": "",
}
"""Words for each script, with every option of its own that names a place."""
CONFIG = "--config ~/c.yaml --run.dir=~/run --data.cache_dir=~/cache"


def options_class(script: str) -> type:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(cli, "script", lambda main: None)
        return runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")["Options"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home, from which the working folder differs."""
    home = tmp_path / "home"
    (tmp_path / "elsewhere").mkdir()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


@pytest.mark.parametrize("script", NEEDED)
def test_every_option_knows_the_home_folder(script, home):
    """Guards against a folder called ~, from an option of any script, a flag of the configuration or a YAML file."""
    kind = options_class(script)
    words = NEEDED[script]
    if issubclass(kind, cli.WithConfig):
        (home / "c.yaml").write_text("data: {corpus: file, path: ~/text}\n")
        words = f"{words} {CONFIG}"
    parsed = cli.parse(kind, words.split())
    config = vars(getattr(parsed, "config", Config()))
    named = repr(parsed.model_dump(exclude={"flags"})) + (repr(config) if "--config" in words else "")
    assert "~" not in named
    for word in words.replace("~/c.yaml", "~/c.yaml ~/text").replace(",", " ").split():
        if "~" in word:
            assert str(home / word.partition("~/")[2]) in named
    paths = [name for name, info in options_of(kind).items() if Path in parts_of(info.annotation)]
    untried = [name for name in paths if f"~/{name}" not in words and name.rpartition(".")[2] not in TRIED]
    assert not untried


TRIED = ("methods", "picture", "run", "runs", "file", "output", "to", "path", "cache_dir", "config_files")


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """Guards against a traceback or a folder called ~ for a user that the system does not know, as in a container."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "CHARLM_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, name, unknown)
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("text " * 100)
    text = DataConfig(corpus="file", path=Path("text"))
    for option, act in {
        "run.dir": lambda: load_config((), {"run.dir": "~/run"}),
        "data.path": lambda: load_config((), ["--data.path=~nobody/text"]),
        "data.hub_id": lambda: load_corpus(DataConfig(corpus="hub", hub_id="~/set", cache_dir=Path("cache"))),
        "data.cache_dir": lambda: load_corpus(text),
    }.items():
        with pytest.raises(UserError, match=rf"{option}=~.*HOME") as caught:
            act()
        assert caught.value.option == option
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    with pytest.raises(UserError, match=r"data\.hub_id=no/such: HF_HOME: "):
        load_corpus(DataConfig(corpus="hub", hub_id="no/such", cache_dir=tmp_path / "cache"))
    meant = load_config((), ["--data.corpus=file", "--data.path=text", "--data.cache_dir=./~"]).data
    assert meant.replace(test_fraction=0.1).cache_dir == tmp_path / "~"


OUTPUTS = {
    "benchmark": ("picture", "train --picture PLACE"),
    "compress": ("output", "run text -o PLACE"),
    "compress ": ("picture", "run text -o out --picture PLACE"),
    "decompress": ("output", "run file -o PLACE"),
    "evaluate": ("picture", "run --early-exit --picture PLACE"),
    "explain": ("picture", "--picture PLACE"),
    "export": ("to", "run --to PLACE"),
    "import": ("to", "theirs --to PLACE"),
    "report": ("output", "run -o PLACE"),
    "report ": ("output", "run"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_are_checked_before_the_work(case, home, capfd):
    """Guards against a pipe or a device replaced by a file, and an hour's work that cannot be written at its end."""
    option, words = OUTPUTS[case]
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("/dev/null")
    for name in ("locked", "folder.png"):
        Path(name).mkdir()
    Path("file").write_text("")
    Path("report.html").symlink_to("pipe.png")
    Path("locked").chmod(0o500)
    places = ["locked/new/x.png", "file/x.png", "pipe.png", "link.png", "folder.png", "/dev/null", "/dev/stdout/x.png"]
    for place in places if "PLACE" in words else ["report.html"]:
        with without_powers():
            assert run_script(case.strip(), *words.replace("PLACE", place).split()) == 2
        printed = capfd.readouterr().err
        assert printed.startswith(f"error: {option}={place}: ") and printed.count("\n") == 1
    assert stat.S_ISFIFO(os.stat("pipe.png").st_mode) and Path("link.png").is_symlink()


def test_an_output_that_is_a_link(home):
    """Guards against a link replaced by a file, and against a pipe replaced by those who do not come from a script."""
    Path("target").write_text("old")
    Path("link.html").symlink_to("target")
    Path("new.html").symlink_to("made")
    kind = options_class("report")
    assert cli.parse(kind, ["run", "-o", "link.html"]).output == Path("target").absolute()
    assert cli.parse(kind, ["run", "-o", "new.html"]).output == Path("made").absolute()
    os.mkfifo("pipe")
    with pytest.raises(FileExistsError):
        write_whole(Path("pipe"), "text")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


PLACES = {
    "path": {"corpus": "file", "path": "text"},
    "path ": {"corpus": "enwik8", "path": "../folder/text"},
    "hub_id": {"corpus": "hub", "hub_id": "./set"},
    "hub_id ": {"corpus": "lm1b", "hub_id": "set"},
    "cache_dir": {"cache_dir": "cache"},
    "cache_dir ": {},
}


@pytest.mark.parametrize("case", PLACES)
def test_a_run_records_places_that_every_folder_shares(case, tmp_path, monkeypatch):
    """Guards against a run that is found, scored and resumed only from the folder in which it was begun."""
    (tmp_path / "folder" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folder")
    Path("text").touch()
    monkeypatch.setenv("CHARLM_CACHE", "of the environment")
    typed = load_config((), {"data": PLACES[case], "run.dir": "run"})
    run = Run.create(typed, CORPUS)
    folder = Run(run.path.absolute())
    monkeypatch.chdir(tmp_path)
    recorded = folder.config()
    option = case.strip()
    place = Path(getattr(recorded.data, option))
    assert place == (tmp_path / "folder" / getattr(typed.data, option)).resolve()
    assert recorded.run.dir == tmp_path / "folder" / "run"
    monkeypatch.chdir(tmp_path / "folder")
    assert check_resumable(located(recorded), located(typed)) == []
    monkeypatch.delenv("CHARLM_CACHE")
    assert located(Config()).data.cache_dir == Path("~/.cache/charlm")  # each user's own


def test_a_run_of_relative_places_goes_on(run_on_disk, monkeypatch, capfd):
    """Guards against a run that was begun when places were recorded as typed, and is refused since."""
    monkeypatch.chdir(run_on_disk.parent)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = run_on_disk / "config.yaml"
    for flags in (["--run.dir=run"], ["--run.dir=run", "--run.resume=true", "--train.steps=4"]):
        if "--run.resume=true" in flags:
            config.write_text(config.read_text().replace(f"{run_on_disk.parent}/", ""))
        else:
            shutil.rmtree(run_on_disk)
        text = ["--data.corpus=file", "--data.path=text.txt", "--data.cache_dir=cache"]
        assert run_script("train", *TINY, *text, *flags) == 0
    printed = capfd.readouterr().err
    assert "data." not in printed and "resumed at step 3" in printed
    assert f"path: {run_on_disk.parent}/text.txt" in config.read_text()


READERS = {
    "evaluate": "run --data.cache_dir=cache",
    "generate": "run --prompt=a",
    "export": "run --to out",
    "report": "run --records-only -o out.html",
    "compress": "run few -o out",
    "decompress": "run few -o out",
    "train": "--run.dir=run --run.resume=true --data.corpus=file --data.path=text.txt --data.cache_dir=cache",
    "ablate": "--run.dir=run --data.corpus=file --data.path=text.txt --row=--train.seed=1",
    "explain": "--config run/config.yaml --config run/metrics.jsonl",
}


@pytest.mark.parametrize("script", READERS)
def test_what_this_user_may_not_read(script, run_on_disk, monkeypatch, capfd):
    """Guards against tracebacks where a file or folder belongs to somebody else."""
    monkeypatch.chdir(run_on_disk.parent)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (run_on_disk / "metrics.jsonl").touch()
    Path("few").write_text("few")
    before = set(os.listdir())
    for name in (".", "config.yaml", "provenance.json", "checkpoints", "checkpoints/best", "metrics.jsonl"):
        closed = run_on_disk / name
        mode = closed.stat().st_mode
        closed.chmod(0)
        with without_powers():
            code = run_script(script, *READERS[script].split())
        closed.chmod(mode)
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        assert (code, printed.count("error: ")) == (2, 1) or (code == 0 and name not in (".", "config.yaml"))
        for left in set(os.listdir()) - before:
            shutil.rmtree(left) if os.path.isdir(left) else os.unlink(left)
