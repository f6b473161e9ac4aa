"""The page that a run leaves when it is done."""

import pytest

import charlm
from charlm.training import reporting
from tiny import TINY

pytestmark = pytest.mark.slow
FLAGS = (*TINY, "--run.report=true", "--train.log_every=1")


def test_a_run_leaves_its_page(tmp_path, text_corpus_flags, monkeypatch):
    """Fault: no page, or one without the parts for which the model would have been quick."""
    monkeypatch.setattr(reporting, "CHARACTERS", 10)
    monkeypatch.setattr("charlm.report.page.probe.SAMPLE", 20)
    run = charlm.train(charlm.load_config(overrides=[*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]))
    page = (run / "report.html").read_text()
    assert 'class="passage"' in page and 'class="samples"' in page
    assert "not measured" not in page


@pytest.mark.parametrize("broken", [False, True])
def test_a_slow_model_or_a_fault_does_not_hold_the_run_up(tmp_path, text_corpus_flags, monkeypatch, capfd, broken):
    """Fault: minutes of waiting after training, or a finished run that ends in a traceback for want of a picture."""

    def fail(*arguments):
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(reporting, "QUICK_SECONDS", 0)
    if broken:
        monkeypatch.setattr(reporting, "write_report", fail)
    run = charlm.train(charlm.load_config(overrides=[*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]))
    assert (run / "report.html").exists() != broken
    if broken:
        assert "report.html was not written (ZeroDivisionError('no picture'))" in capfd.readouterr().err
    else:
        assert "not measured when this page was made" in (run / "report.html").read_text()
