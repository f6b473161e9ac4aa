"""Every file that is read back, damaged in ways that hypothesis thinks of: each is read, or refused with one UserError
that names it, in little time and memory.

CHARLM_FUZZ=10000 tries so many cases for each file, and prints what came of them.
"""

import base64
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlm import compress, decompress, train
from charlm.ablation.variants import Variant, VariantRun
from charlm.config import UserError
from charlm.config.load import load_config, to_yaml
from charlm.data.corpus import load_corpus
from charlm.data.vocabulary import CODE_POINTS, SentencePieceVocabulary
from charlm.files import remove
from charlm.objective.build import build_objective
from charlm.process import peak_memory
from charlm.report.metrics import read_runs
from charlm.report.page import tables
from charlm.report.page.probe import Probe
from charlm.runs.exported import save_model
from charlm.runs.load import load
from charlm.training.optimizers import build_optimizers
from charlm.training.start import open_run
from storage import FILES as STORED
from storage import manifest_for
from tiny import typed

CASES = int(os.environ.get("CHARLM_FUZZ", "25"))
SECONDS, MEMORY = 20, 500_000_000  # by hand no case took 2 seconds; a test must not depend on the machine's load
STEP = "run/checkpoints/step-00000002"
FLAGS = (
    *typed("--model.num_layers=2 --model.num_heads=1 --model.d_model=4 --model.d_ff=4 --model.context_length=4"),
    *typed("--train.steps=2 --train.batch_size=2 --train.mixed_precision=no --train.valid_symbols=20"),
    *typed("--train.log_every=1 --train.valid_every=1 --data.corpus=file --run.report=false"),
)
PARTS = (
    *("null", "true", "0", "-1", "1.5", "1e300", "1e308", "1e999", "NaN", "-Infinity", "9" * 19, "9" * 30, "9" * 5000),
    *('""', '"x"', '"\\u001b[2J"', '"\\u202e"', '"\\ud800"', '"/dev/zero"', f'"{"a" * 100_000}"'),
    *("[]", "[[1, 1]]", '["a"]', f"[{'0,' * 50_000}0]", "[" * 150 + "]" * 150, "[" * 900 + "]" * 900, "[" * 50_000),
    *("{}", '{"a": {"b": 1}}', '{"step": 1}', '{"1": 1.0}'),
    *('{"a":' * 150 + "1" + "}" * 150, '{"a":' * 900 + "1" + "}" * 900),
    "{" + ",".join(f'"key{i}": {i}' for i in range(5000)) + "}",
)
"""JSON, mostly of another type than what it takes the place of."""
PIECES = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\n",
    b"{",
    b'"',
    b"\x1b]0;x\x07",
    b"&a ",
    b"*a ",
    b"!!python/name:os.system ",
    b"\0" * 2**21,
)


def sparse(path: Path, content: bytes = b"") -> None:
    path.write_bytes(content)
    os.truncate(path, 1 << 40)


def seal(path: Path) -> None:
    """Make digests fit the file, as someone who means harm would; nobody hashes a terabyte."""
    if path.parent.name.startswith("step-") and path.name != "manifest.json":
        if all((path.parent / name).is_file() for name in STORED):
            (path.parent / "manifest.json").write_text(manifest_for(path.parent))
    elif not path.is_file() or path.stat().st_size > 1 << 30:
        return
    elif path.name == "text.clm":
        content = path.read_bytes()[:-8]
        path.write_bytes(content + hashlib.sha256(content).digest()[:8])
    elif path.name == "vocabulary.json":
        with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            record = json.loads(path.read_bytes())
            text = record["characters"].encode() if "characters" in record else base64.b64decode(record["model"])
            path.write_text(json.dumps(record | {"sha256": hashlib.sha256(text).hexdigest()}))


SWAPS: tuple[Callable[[Path, bytes], object], ...] = (
    lambda path, content: None,
    lambda path, content: path.touch(),
    lambda path, content: path.mkdir(),
    lambda path, content: os.mkfifo(path),
    lambda path, content: sparse(path),
    sparse,
    lambda path, content: path.symlink_to("/dev/zero"),
    lambda path, content: path.symlink_to(path),
)
"""What may stand in the place of a file."""


def paths_of(tree: Any, path: tuple = ()) -> list[tuple]:
    """The places of all values in a tree of dicts and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in paths_of(value, (*path, key)))]


@st.composite
def other_values(draw, tree: Any) -> bytes:
    """The tree as JSON with other values, fewer or more."""
    tree = {"tree": json.loads(json.dumps(tree))}
    raw = []
    for _ in range(draw(st.integers(1, 3))):
        path = ("tree", *draw(st.sampled_from(paths_of(tree["tree"]))))
        parent = reduce(getitem, path[:-1], tree)
        match draw(st.sampled_from(["replace", "replace", "delete", "add", "move"])):
            case "delete" if len(path) > 1:
                del parent[path[-1]]
            case "add" if isinstance(parent, dict) and len(path) > 1:
                parent[draw(st.text(max_size=9))] = parent[path[-1]]
            case "move":
                parent[path[-1]] = deepcopy(
                    reduce(getitem, draw(st.sampled_from(paths_of(tree["tree"]))), tree["tree"])
                )
            case _:
                parent[path[-1]] = f"@{len(raw)}@"
                raw.append(draw(st.sampled_from(PARTS)))
    text = json.dumps(tree["tree"])
    for number, part in enumerate(raw):
        text = text.replace(f'"@{number}@"', part)
    return text.encode()


@st.composite
def other_bytes(draw, content: bytes) -> bytes:
    """Other, fewer or more bytes at a few places."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 100, len(content)]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=9) | st.just(content[place : place + length]))
        flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[place : place + 1])
        piece = draw(st.sampled_from([b"", flipped, piece, 3 * piece]))
        content = content[:place] + piece + content[place + length :]
    return content


@st.composite
def other_rows(draw, content: bytes) -> bytes:
    """metrics.jsonl with other values in a row."""
    lines = content.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(other_values(json.loads(lines[at]))) + b"\n"
    return b"".join(lines)


@st.composite
def other_tensors(draw, content: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(content[:8], "little")
    header = draw(other_values(json.loads(content[8 : 8 + size])))
    claimed = draw(st.sampled_from([len(header), len(header), len(header), 2**63, 10**8]))
    return claimed.to_bytes(8, "little") + header + content[8 + size :]


def other_json(content: bytes) -> st.SearchStrategy[bytes]:
    return other_values(json.loads(content))


def other_yaml(content: bytes) -> st.SearchStrategy[bytes]:
    return other_values(yaml.safe_load(content))  # as YAML, too


class Sound:
    """A folder with a run, exported models and a compressed file, and what is needed to read them."""

    def __init__(self, **parts: Any):
        self.__dict__ |= parts

    def evaluate(self) -> None:
        load(self.place / "run", device="cpu")

    def resume(self) -> None:
        with open_run(self.config, self.corpus, self.accelerator, self.objective, self.optimizers):
            pass

    def report(self) -> None:
        for run in read_runs([self.place / "run"]):
            assert run.step >= 0 and run.characters_per_step > 0
            tables.results([run], [Probe()])
            tables.protocols(run, Probe())

    def ablate(self) -> None:
        run = VariantRun(Variant("x"), 0, self.config)
        run.check_unchanged()
        run.fraction_done()
        run.result()

    def use(self) -> None:
        load(self.place / "export", device="cpu")

    def use_pieces(self) -> None:
        load(self.place / "pieces", device="cpu")

    def decode(self) -> None:
        decompress(self.trained, self.place / "text.clm", self.place / "back", show_progress=False)


RUN = ("evaluate", "resume", "report", "ablate")
FILES: dict[str, tuple[Callable[[bytes], st.SearchStrategy[bytes]], tuple[str, ...]]] = {
    "run/config.yaml": (other_yaml, RUN),
    "run/provenance.json": (other_json, RUN),
    "run/metrics.jsonl": (other_rows, ("resume", "report", "ablate")),
    "run.json": (other_json, ("ablate",)),
    f"{STEP}/state.json": (other_json, ("evaluate", "resume")),
    f"{STEP}/manifest.json": (other_json, ("evaluate", "resume")),
    f"{STEP}/model.safetensors": (other_tensors, ("evaluate", "resume")),
    f"{STEP}/optimizer.safetensors": (other_tensors, ("evaluate", "resume")),
    "export/config.json": (other_json, ("use",)),
    "export/vocabulary.json": (other_json, ("use",)),
    "pieces/vocabulary.json": (other_json, ("use_pieces",)),
    "export/model.safetensors": (other_tensors, ("use",)),
    "text.clm": (other_bytes, ("decode",)),
}
found: dict[str, Counter] = {}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(ValueError):  # a lower one is set
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 33, limits[1]))  # a fault must not take the machine's memory
    base = tmp_path_factory.mktemp("fuzzed")
    place = base / "sound"
    place.mkdir()
    text = base / "text.txt"
    text.write_bytes(b"a few words. " * 100)
    made = f"--data.path={text} --data.cache_dir={base}/cache --data.vocabulary=characters --run.dir={base}/place/run"
    config = load_config((), [*FLAGS, *typed(made)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(config.replace(run=config.run.replace(dir=place / "run")))
        accelerator = Accelerator(cpu=True)
    corpus = load_corpus(config.data, show_progress=False)
    trained = load(place / "run", device="cpu")
    save_model(trained, place / "export")
    save_model(trained, place / "pieces")
    counts = np.zeros(CODE_POINTS, np.int64)
    counts[97:99] = 5
    pieces = SentencePieceVocabulary.train(counts, 1.0)
    (place / "pieces" / "vocabulary.json").write_text(json.dumps(pieces.to_dict()))
    (place / "run" / "config.yaml").write_text(to_yaml(config, exclude_defaults=True))  # to be read fast
    (place / "run.json").write_text(json.dumps({"peak_memory": 1, "cpu_seconds": 1.0, "failure": None}))
    text.write_bytes(b"a few words. ")
    compress(trained, text, place / "text.clm", show_progress=False)
    objective = build_objective(config, corpus.vocabulary.size)
    config = config.replace(run=config.run.replace(resume=True))
    yield Sound(
        place=base / "place",
        copy=place,
        config=config,
        corpus=corpus,
        objective=objective,
        optimizers=build_optimizers(config.train, objective),
        trained=trained,
        accelerator=accelerator,
    )
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    if "CHARLM_FUZZ" in os.environ:
        print(json.dumps(found, indent=2))


def hangs(*_: object) -> None:
    pytest.fail(f"not done after {SECONDS} seconds")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_file_is_read_or_refused(name, data, sound):
    """Guards against tracebacks, hanging, and memory that a file asks for."""
    change, readers = FILES[name]
    path = sound.place / name
    content = to_yaml(sound.config).encode() if name.endswith(".yaml") else (sound.copy / name).read_bytes()
    spoil = data.draw(st.sampled_from([None] * 12 + list(SWAPS)))
    spoilt = data.draw(change(content) | other_bytes(content)) if spoil is None else b""
    seals = data.draw(st.booleans())
    reader = getattr(sound, data.draw(st.sampled_from(readers)))
    if not sound.place.exists():
        shutil.copytree(sound.copy, sound.place)
    path.unlink()
    path.write_bytes(spoilt) if spoil is None else spoil(path, content)
    if seals:
        seal(path)
    before, tally = peak_memory(), found.setdefault(name, Counter())
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    started = time.monotonic()
    try:
        reader()
        tally["read"] += 1
    except UserError as error:
        assert str(error)
        tally["refused"] += 1
    finally:
        signal.alarm(0)
        if reader == sound.resume:  # which writes
            remove(sound.place)
        for changed in {path, *path.parent.glob("manifest.json")} if sound.place.exists() else ():
            remove(changed)
            shutil.copy(sound.copy / changed.relative_to(sound.place), changed)
    tally["slowest, in ms"] = max(tally["slowest, in ms"], round(1000 * (time.monotonic() - started)))
    tally["largest, in MB"] = max(tally["largest, in MB"], (peak_memory() - before) // 10**6)
    assert peak_memory() < before + MEMORY
