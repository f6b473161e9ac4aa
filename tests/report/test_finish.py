"""What a run leaves to look at when it is done, stopped or refused."""

import signal
from collections.abc import Callable
from contextlib import nullcontext

import pytest

import charlm
from charlm.config import Stopped
from charlm.report import finish
from tiny import TINY, refused


@pytest.fixture
def flags(tmp_path, text_corpus_flags) -> list[str]:
    return [*TINY, "--run.report=true", "--train.log_every=1", *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]


@pytest.fixture
def stop_training(monkeypatch) -> Callable[[], None]:
    """`stop_training()`: runs end as if they had been stopped."""
    plain = finish.train

    def stopped(config, stop):
        plain(config, stop=stop)
        raise Stopped("stopped")

    return lambda: monkeypatch.setattr(finish, "train", stopped)


def left_by(flags: list[str]) -> set[str]:
    run = charlm.train_and_report(charlm.load_config(overrides=flags))
    return {path.name for path in run.iterdir()} & {"run.png", "diagnostics.png", "report.html"}


@pytest.mark.slow
def test_a_run_leaves_its_page(tmp_path, flags, monkeypatch):
    """Fault: no page, or one without the parts for which the model would have been quick."""
    monkeypatch.setattr(finish, "CHARACTERS", 10)
    monkeypatch.setattr("charlm.report.page.probe.SAMPLE", 20)
    assert left_by([*flags, "--train.diagnose_every=1"]) == {"run.png", "diagnostics.png", "report.html"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'class="passage"' in page and 'class="samples"' in page
    assert "not measured" not in page


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_slow_model_or_a_fault_does_not_hold_the_run_up(tmp_path, flags, monkeypatch, capfd, broken):
    """Fault: minutes of waiting after training, or a finished run that ends in a traceback for want of a picture."""

    def fail(*arguments):
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(finish, "QUICK_SECONDS", 0)
    if broken:
        monkeypatch.setattr(finish, "write_report", fail)
    assert ("report.html" in left_by(flags)) != broken
    if broken:
        assert "report.html was not written (ZeroDivisionError('no picture'))" in capfd.readouterr().err
    else:
        assert "not measured when this page was made" in (tmp_path / "run" / "report.html").read_text()


def test_a_stopped_run_leaves_its_curves_and_a_refused_one_nothing(tmp_path, flags, stop_training):
    """Fault: no picture of a run that was stopped, or one drawn into the folder of a run that was refused."""
    stop_training()
    with pytest.raises(Stopped):
        left_by(flags)
    picture = tmp_path / "run" / "run.png"
    picture.unlink()
    assert not (tmp_path / "run" / "report.html").exists()
    with refused("run.dir"):
        left_by(flags)
    assert not picture.exists()


@pytest.mark.parametrize("stops", [False, True])
def test_a_signal_while_pictures_are_drawn_changes_nothing(stops, flags, stop_training, monkeypatch):
    """Fault: a signal that cuts off the message of a stopped run, or the success of a finished one. Here it would end
    the tests."""
    monkeypatch.setattr(finish, "draw_pictures", lambda *_: signal.raise_signal(signal.SIGTERM))
    if stops:
        stop_training()
    with pytest.raises(Stopped, match="stopped") if stops else nullcontext():
        left_by([*flags, "--run.report=false"])
