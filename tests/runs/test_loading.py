"""What a run's model is, read back: heads of every kind, layer weights, names that checkpoints of all times share."""

from pathlib import Path

import pytest
import torch

from charlm.config import AuxConfig, Config, ConfigError, LayersConfig, ModelConfig, RunConfig, UserError
from charlm.data.vocabulary import ByteVocabulary
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.runs.checkpoints import find_checkpoint, save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import take_snapshot
from storage import CORPUS

MODEL = ModelConfig(num_layers=3, num_heads=2, d_model=8, d_ff=16, context_length=8)
KINDS = ("linear", "shared", "shared_frozen", "tower")


def config_of(tmp_path: Path, kind: str, hedged: bool = False) -> Config:
    aux = AuxConfig(layers=LayersConfig(head=kind, at=(1, 2), schedule="constant", tower_width="5/8"))
    hedge = aux.hedge.replace(enabled=hedged)
    return Config(model=MODEL, aux=aux.replace(hedge=hedge), run=RunConfig(dir=tmp_path / "run"))


def saved(config: Config, objective: Objective) -> Run:
    run = Run.create(config, CORPUS | {"vocabulary": ByteVocabulary().to_dict()})
    save_checkpoint(run, take_snapshot(objective, [], {"step": 1}), best=True, keep=1)
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_every_kind_come_back(kind, tmp_path, randomise):
    """A head that is read from the wrong tensors, or that reads others than those that were loaded."""
    config = config_of(tmp_path, kind)
    objective = randomise(build_objective(config, 256)).eval()
    run = saved(config, objective)
    trained = load(run.path, device="cpu")
    resumed = build_objective(config, 256).eval()
    find_checkpoint(run).restore(resumed)
    assert trained.heads.pairs == [(layer, offset) for layer in (1, 2, 3) for offset in (1, 2)]
    assert trained.hedge_weights is None
    ids_BT = torch.arange(8)[None]
    states = objective.transformer(ids_BT, (1, 2, 3))
    for layer, hidden_BTD in states.items():
        expected = objective.heads(hidden_BTD, layer, (1, 2))
        for other in (trained, resumed):
            assert torch.equal(other.heads(other.transformer(ids_BT, [layer])[layer], layer, (1, 2)), expected)


def test_layer_weights_come_back(tmp_path, randomise):
    """Weights that a run learned and that nobody can ask for, or that a resumed run begins anew."""
    config = config_of(tmp_path, "linear", hedged=True)
    objective = randomise(build_objective(config, 256))
    losses = {"layer1/offset1/all": 3.0, "layer2/offset1/all": 1.0, "layer3/offset1/all": 2.0}
    objective.adapt({name: torch.tensor(loss) for name, loss in losses.items()})
    run = saved(config, objective)
    factors = [0.99**loss for loss in losses.values()]
    expected = {layer: factor / sum(factors) for layer, factor in zip((1, 2, 3), factors, strict=True)}
    assert load(run.path, device="cpu").hedge_weights == pytest.approx(expected, rel=1e-6)
    resumed = build_objective(config, 256)
    find_checkpoint(run).restore(resumed)
    assert torch.equal(resumed.hedge.weights, objective.hedge.weights)


def test_only_layers_that_predict_the_next_character_are_hedged(tmp_path):
    """A weight that no loss ever moves: that of a head which training does not use."""
    config = config_of(tmp_path, "linear", hedged=True)
    silent = config.replace(aux=config.aux.replace(main_weight=0.0))
    assert build_objective(config, 5).hedge.layers == [1, 2, 3]
    assert build_objective(silent, 5).hedge.layers == [1, 2]
    for layers in (LayersConfig(enabled=False), config.aux.layers.replace(weight=0.0)):
        with pytest.raises(ConfigError, match=r"aux\.hedge\.enabled=true: weighs layers"):
            config.replace(aux=config.aux.replace(layers=layers))
    with pytest.raises(ConfigError, match=r"aux\.hedge\.enabled=true: weighs layers"):
        silent.replace(aux=silent.aux.replace(layers=LayersConfig(at=(1,))))


def test_tensors_of_a_task_that_the_run_does_not_have_are_refused(tmp_path, randomise):
    """Anything taken for a task's, so that a damaged checkpoint passes."""
    config = config_of(tmp_path, "linear")
    objective = randomise(build_objective(config, 256))
    objective.tasks = torch.nn.ModuleDict({"order": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"tensor tasks\.order\.bias is float32"):
        load(saved(config, objective).path, device="cpu")
