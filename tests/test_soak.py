"""A few of the kills of `make soak`."""

import random

import pytest

import soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),  # os.fork
]


@pytest.mark.parametrize("life", [soak.SHORT, soak.Life(1.0, 5.0, seconds=8.0)])
def test_a_killed_run_is_as_if_it_had_not_been_killed(life, tmp_path):
    """Guards against steps that are lost or taken twice, and other weights, after kills at any moment of a run."""
    outcome = soak.soak_one(tmp_path, soak.write_texts(tmp_path), random.Random(0), 5, life)
    assert (outcome.end, outcome.wrong_steps) == ("identical", 0)


@pytest.mark.parametrize("name", soak.SCRIPTS)
def test_a_killed_script_succeeds_the_next_time(name, tmp_path):
    """Guards against half of a result, rubbish beside it, and locks and runs that outlive their script."""
    assert len(soak.kill_script(name, tmp_path, random.Random(name), kills=3)) == 3
