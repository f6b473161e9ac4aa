"""Which kernel attention runs on a CPU, and whether layers compile once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from charlm.config import Config, ModelConfig
from charlm.config_files import load_config
from charlm.model.transformer import CharTransformer
from charlm.training.hardware import describe_attention

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if "accelerate" not in path.parts)
FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that reach the kernels, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def kernels_of_a_training_step(config: Config, precision: torch.dtype) -> Counter:
    model = CharTransformer(config.model, 256).train()
    model.activation_checkpointing = config.train.activation_checkpointing
    ids_BT = torch.randint(256, (1, config.model.context_length))
    with OperatorCounter() as counter:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            hidden_BTD = model(ids_BT)[config.model.num_layers]
        hidden_BTD.sum().backward()
    return counter.counts


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_attend_through_the_fused_kernel(file, precision, monkeypatch):
    """Attention that falls back to the slow kernel without the first line of the run saying so."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shorter = ["--model.num_layers=2", "--model.context_length=16"]
    config = load_config(file, shorter)
    fused = describe_attention(config) == "attention fused"
    counts = kernels_of_a_training_step(config, precision)
    if fused:
        assert counts[FORWARD] >= 2
        assert counts[BACKWARD] == 2
    else:
        assert config.model.attention_dropout > 0
        assert "attention_dropout=0" in describe_attention(config)
        assert counts[FORWARD] == 0

    without_dropout = load_config(file, [*shorter, "--model.attention_dropout=0"])
    assert describe_attention(without_dropout) == "attention fused"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        counts = kernels_of_a_training_step(without_dropout, precision)
    assert counts[FORWARD] >= 2
    assert counts[BACKWARD] == 2


# The compiler looks at .grad of a layer's input while it traces, which is none of our doing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("positions", ["per_layer", "rotary"])
def test_layers_compile_once_whatever_set_of_them_is_active(positions):
    """A recompilation per layer or per dropped layer: past the compiler's limit of 8 it gives up, silently."""
    config = ModelConfig(num_layers=12, num_heads=2, d_model=8, d_ff=16, context_length=8, positions=positions)
    model = CharTransformer(config, 256)
    ids_BT = torch.randint(256, (2, 8))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for lowest in range(1, 13):
        sum(hidden_BTD.sum() for hidden_BTD in model(ids_BT, range(lowest, 13)).values()).backward()
    for highest in range(11, 0, -1):
        model(ids_BT, [highest])[highest].sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
