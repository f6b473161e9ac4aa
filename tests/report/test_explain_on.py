"""`explain --on`: memory, speed, days and money of a run on devices that are not here."""

import json

import pytest
import torch

from charlm.config import AuxConfig, Config, ModelConfig, TargetsConfig, TrainConfig
from charlm.objective.build import build_objective
from charlm.objective.count import step_memory, step_work
from charlm.objective.objective import Objective
from tiny import refused, run_script, script_names

explain = script_names("explain")

D, F, T, V, L = 8, 16, 4, 256, 2
H100 = explain.DEVICES["h100"]


def tiny(**train) -> Config:
    model = ModelConfig(num_layers=L, num_heads=2, d_model=D, d_ff=F, context_length=T)
    aux = AuxConfig(layers={"enabled": False}, targets=TargetsConfig(enabled=False))
    return Config(model=model, aux=aux, train=TrainConfig(optimizer="adamw", **train))


def meta(config: Config) -> Objective:
    with torch.device("meta"):
        return build_objective(config, V)


def test_memory_by_hand():
    """Guards against a tensor counted twice, in another precision, or by one process for all."""
    block = 4 * (D * D + D) + 2 * D * F + F + D + 2 * 2 * D
    outside = V * D + L * T * D + 2 * D + V * D + V
    parameters = L * block + outside
    # Two norms' inputs and statistics, six tensors of D in attention with its statistics, one of F after ReLU.
    kept = 2 * (4 * D + 8) + 2 * 6 * D + 4 * 2 + 2 * F
    head = 4 * D + 2 * D  # the final norm's input, and the gradient of its output
    losses = 4 * D + 2 * D + (4 + 4 + 2) * V  # its output twice; logits, probabilities, gradient
    weights = 2 * L * (4 * D * D + 2 * D * F)
    for windows in (1, 50):
        passes = weights + windows * T * (L * kept + head + losses)
        for processes, sharding in ((1, "auto"), (2, "no"), (2, "fsdp2")):
            config = tiny(batch_size=windows * processes, sharding=sharding)
            share, more = (processes, 8 * outside) if sharding == "fsdp2" else (1, 4 * parameters * (processes - 1))
            expected = 12 * parameters / share + more + max(4 * parameters / share, passes)
            assert step_memory(config, meta(config), windows, processes) == round(expected)


def test_work_by_hand():
    """Guards against FLOPs or bytes of another number of characters, and recomputation that costs nothing."""
    flops = L * (6 * (4 * D * D + 2 * D * F) + 12 * D * T) + 6 * V * D
    plain, recomputed = (tiny(activation_checkpointing=on) for on in (False, True))
    assert step_work(plain, meta(plain), 10)[0] == 10 * flops
    assert step_work(recomputed, meta(recomputed), 10)[0] == pytest.approx(10 * flops * 4 / 3)


def test_the_largest_micro_batch_fits():
    """Guards against a size that does not fit, or one below the largest."""
    config = tiny(batch_size=10**6)
    found = explain.predict(config, H100._replace(memory=0.01))
    for size, on in zip(found["largest_micro_batch"], (False, True), strict=True):
        setting = config.replace(train=config.train.replace(activation_checkpointing=on))
        room = explain.USABLE * 0.01 * 1e9
        assert step_memory(setting, meta(setting), size) <= room < step_memory(setting, meta(setting), size + 1)
    assert found["windows_at_once"] == found["largest_micro_batch"][0]
    with refused("memory"):
        explain.predict(config, H100._replace(memory=1e-6))


def test_time_and_money():
    """Guards against days of one device charged for all, another batch for each, and validations for nothing."""
    config = tiny(batch_size=64, steps=1000, valid_every=1000, valid_symbols=1)
    one, four = (explain.predict(config, H100, count, price=3.0) for count in (1, 4))
    host = L * explain.LAUNCHES + explain.HEADS_LAUNCHES + explain.BETWEEN  # longer than the device's time
    assert (one["bound_by"], four["windows_at_once"]) == ("host", 16)
    assert one["characters_per_second"] == four["characters_per_second"] == pytest.approx(64 * T / host)
    assert one["days"] * 86400 == pytest.approx(1000 * host, rel=1e-3)
    assert one["money"] == pytest.approx(3 * 24 * one["days"])
    assert four["money"] == pytest.approx(4 * one["money"], rel=1e-3)
    often = explain.predict(tiny(batch_size=64, steps=1000, valid_every=100, valid_symbols=10**6), H100)
    assert often["days"] > one["days"]
    assert explain.predict(tiny(batch_size=64, time="12h"), H100)["days"] == 0.5
    slow = explain.predict(config, explain.Device(80, 1e-3, 1e-3))
    assert slow["bound_by"] == "device"


def test_script(capsys):
    """Guards against a device that is not the named one, and a prediction that nobody asked for."""
    flags = ["--model.num_layers=2", "--model.d_model=8", "--train.batch_size=3", "--json"]
    assert run_script("explain", *flags) == 0
    assert "prediction" not in json.loads(capsys.readouterr().out)
    assert run_script("explain", *flags, "--on=l4", "--memory=48", "--processes=2") == 0
    found = json.loads(capsys.readouterr().out)["prediction"]
    assert found["device"] == {"memory": 48, "matrix_rate": 121, "bandwidth": 0.3}
    assert (found["processes"], found["windows_at_once"], found["money"]) == (2, 2, None)
    assert run_script("explain", *flags[:-1], "--on=h100", "--price=2") == 0
    assert "peak memory" in capsys.readouterr().out
    assert run_script("explain", *flags, "--memory=48", "--bandwidth=1") == 2
