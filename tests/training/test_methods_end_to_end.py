"""Every preset of configs/methods trains, on one process as on two."""

from pathlib import Path

import pytest

from charlm.config.errors import written
from charlm.config.load import settings_of
from launched import train_with_two_processes
from tiny import TINY, train, training_rows

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs" / "methods").glob("*.yaml"))
STEPS = 20
FLAGS = [
    *TINY,
    "--model.num_layers=6",
    f"--train.steps={STEPS}",
    "--train.matmul_precision=highest",
    "--train.log_every=1",
    "--train.valid_every=20",
]

pytestmark = pytest.mark.slow


def flags_of(preset: Path, folder: Path, corpus: list[str]) -> list[str]:
    method = [f"--{name}={written(setting.value)}" for name, setting in settings_of([preset], {}).items()]
    # Dropout draws other noise on two processes.
    return [*FLAGS, *corpus, *method, "--aux.layers.tower_dropout=0", f"--run.dir={folder / preset.stem}"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, text_corpus_flags) -> Path:
    """The runs of all presets, made by two processes that torchrun starts once."""
    folder = tmp_path_factory.mktemp("two")
    train_with_two_processes(folder / "plan.json", [flags_of(preset, folder, text_corpus_flags) for preset in PRESETS])
    return folder


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_learns_alike_on_one_process_and_on_two(preset, two_processes, tmp_path, text_corpus_flags):
    """Guards against a preset whose table is valid, but which some route, head or process cannot train."""
    alone = train(*flags_of(preset, tmp_path, text_corpus_flags))
    one, two = (training_rows(path) for path in (alone, two_processes / preset.stem))
    assert len(one) == STEPS
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    first, last = (row["terms"]["layer6/offset1/all"]["loss"] for row in (one[0], one[-1]))
    assert last < first
