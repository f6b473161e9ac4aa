"""What the scripts share: arguments in, errors for people out. Imports nothing heavy: --help answers at once."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from charlm import arguments
from charlm.config import Config, DataConfig, Stopped, UserError
from charlm.config_files import OPTIONS, explaining, settings_in_files
from charlm.terminal import fitted, is_main_process

T = TypeVar("T")
PATIENCE = 10.0
"""Seconds that a process waits for the first one's message before it prints its own."""


@dataclass(frozen=True, kw_only=True)
class _ConfigFiles:
    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A YAML file of options, several times if you like: the later wins, and flags win over files."""


@dataclass(frozen=True, kw_only=True)
class WithConfig(_ConfigFiles):
    """Base of the options of a script that takes `--config FILE` and every option of `Config` as a flag."""

    settings: Annotated[OPTIONS, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True, kw_only=True)
class MovedCorpus:
    """Where a model's corpus is, if no longer where it was in training."""

    path: Path | None = None
    """A local copy of the corpus, or the file or folder it was made from."""
    hub_id: str | None = None
    """Another copy of a dataset, such as a folder of its parquet files."""
    cache_dir: Path | None = None
    """Where prepared corpora are kept."""

    def where(self, config: DataConfig) -> DataConfig:
        """The config with these places."""
        return replace(config, **{name: value for name, value in vars(self).items() if value is not None})


def parse(kind: type[T], argv: Sequence[str] | None = None) -> T:
    """The dataclass `kind`, filled from the command line; `--help` prints its fields' docstrings and exits.

    Names are shown with dashes (`--top-k`), those of a `WithConfig` with underscores (`--model.num_layers`); both are
    understood everywhere. A bool of `kind` is a bare flag (`--json`), one of the configuration takes a value.

    Raises:
        UserError: unknown flag or key (similar ones are named), wrong type, missing value or file.
        ConfigError: a value that cannot work.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--print-completion"]:  # asked by completion.sh
        print(*arguments.completions(kind, underscores=issubclass(kind, WithConfig)), "--help", sep="\n")
        sys.exit(0)
    if argv[:1] and argv[0].replace("_", "-").startswith("--tyro-"):
        raise UserError(f"{argv[0]}: these scripts are completed by: source scripts/completion.sh")
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    if not issubclass(kind, WithConfig):
        with explaining():
            return arguments.show_help(kind) if wants_help else arguments.parse(kind, argv)
    flags = [token for token in argv if token not in ("-h", "--help")]
    for before, token in zip(["", *flags], flags, strict=False):
        takes_value = before.startswith("-") and "=" not in before
        if token.endswith((".yaml", ".yml")) and not token.startswith("-") and not takes_value:
            raise UserError(f"{token}: a file of options is given as --config {token}")
    settings = settings_in_files(arguments.parse_known(_ConfigFiles, flags).config)
    with explaining(settings, flags):
        parsed = arguments.parse(kind, [*(setting.flag for setting in settings), *flags], underscores=True)
    return arguments.show_help(kind, parsed, underscores=True) if wants_help else parsed


def script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0, also when asked to stop; 2 after one message for a UserError; 130 when interrupted.

    Of several processes that fail alike, the first alone prints the message: a launcher ends all as soon as one exits,
    so the others wait for that, and speak up only if they are left alone with their error.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if not is_main_process():
            time.sleep(PATIENCE)
        print(fitted(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if is_main_process():
            print(fitted(str(stopped)), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)
