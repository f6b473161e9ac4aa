"""Attention's backends agree and run where they are said to; handwritten gradients; layers compile once."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from charlm.config import Config, ModelConfig, TrainConfig
from charlm.model.attention import RotaryTable, rotary_table
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import FEW_ROWS, BlockwiseAttention, block_length
from charlm.model.transformer import CharTransformer, ReluSquared
from charlm.objective.build import build_objective
from charlm.training.device import describe_attention
from tiny import small_model

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


def turned_by_a_rotation(x_BHTC: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_table(5, 4, torch.device("cpu"))
    return RotaryTable(cos.double(), sin.double())(x_BHTC)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("backend", "dropout", "said", "kernels"),
    [
        ("auto", 0.0, "in blocks", {FORWARD: 0, BACKWARD: 0}),
        ("blocks", 0.0, "in blocks", {FORWARD: 0, BACKWARD: 0}),
        ("sdpa", 0.0, "fused", {FORWARD: 2, BACKWARD: 2}),
        ("auto", 0.1, "unfused", {FORWARD: 0, BACKWARD: 0}),
        ("sdpa", 0.1, "unfused", {FORWARD: 0, BACKWARD: 0}),
    ],
)
def test_attention_runs_as_the_first_line_of_a_run_says(
    backend, dropout, said, kernels, checkpointing, precision, monkeypatch
):
    """Attention that falls back to the slow kernel without a word, or a description of what does not run."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = Config(
        model=small_model(attention_dropout=dropout, context_length=16),
        train=TrainConfig(attention=backend, activation_checkpointing=checkpointing),
    )
    mixed = "bf16" if precision == torch.bfloat16 else "no"
    assert describe_attention(config, torch.device("cpu"), mixed).startswith(f"attention {said}")
    model = build_objective(config, 256).transformer.train()
    with OperatorCounter() as counter:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            hidden_BTD = model(torch.randint(256, (1, 16)))[2]
        hidden_BTD.sum().backward()
    again = 2 if checkpointing else 1  # the forward pass runs once more
    assert {name: counter.counts[name] for name in kernels} == kernels | {FORWARD: again * kernels[FORWARD]}
    in_blocks = said == "in blocks"
    assert (counter.counts["aten::baddbmm"] > 0) == in_blocks


@pytest.mark.parametrize(
    ("chosen", "said", "flash"),
    [
        (SDPBackend.FLASH_ATTENTION, "fused", True),
        (SDPBackend.CUDNN_ATTENTION, "fused", True),
        (SDPBackend.EFFICIENT_ATTENTION, "fused", False),
        (SDPBackend.MATH, "unfused", False),
    ],
)
def test_a_gpu_says_which_kernel_it_takes(chosen, said, flash, monkeypatch):
    """Guards against heads of 256 with dropout that miss the flash kernel of a consumer GPU without a word."""
    empty, asked = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **how: empty(*shape, **how))
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given: asked.append(given) or int(chosen.value))
    config = Config(model=small_model(attention_dropout=0.2))
    line = describe_attention(config, torch.device("cuda"), "bf16")
    assert line.startswith(f"attention {said}") and ("attention_dropout=0" in line) != flash
    ((query, *_, dropout, causal),) = asked
    assert (query.dtype, query.requires_grad, dropout, causal) == (torch.bfloat16, True, 0.2, True)


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_many_texts_side_by_side_are_read_as_each_alone(randomise, request, lengths, num_new):
    """Attention of few symbols of many texts, which goes its own way, that sees hidden positions or scales otherwise;
    and a setting of the matrix products that it leaves behind."""
    config = ModelConfig(num_layers=3, num_heads=2, d_model=8, d_ff=12, context_length=9)
    model = randomise(CharTransformer(config, 11)).eval()
    ids_BT = torch.randint(11, (FEW_ROWS, 8), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, FEW_ROWS, torch.device("cpu"))
    with torch.no_grad(), OperatorCounter() as counter:
        model(ids_BT[:, :5], cache=cache)
        if lengths == "different":
            cache.lengths[::2] = 3
        starts = cache.lengths.tolist()
        counter.counts.clear()
        request.addfinalizer(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        torch.set_float32_matmul_precision("medium")
        new_BT = torch.stack([own[start : start + num_new] for own, start in zip(ids_BT, starts, strict=True)])
        found_BTD = model(new_BT, cache=cache)[3]
        assert torch.get_float32_matmul_precision() == "medium"
    assert counter.counts[FORWARD] == 0 and counter.counts["aten::bmm"] == 2 * config.num_layers
    for own_T, start, found_TD in zip(ids_BT, starts, found_BTD, strict=True):
        expected_TD = model(own_T[None, : start + num_new])[3][0, start:]
        torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head_size", "length"),
    [(8, 1), *((size, block_length(size) + more) for size in (8, 128) for more in (-1, 0, 1)), (8, 256), (8, 273)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.01)])
def test_blockwise_attention_equals_the_fused_kernel(head_size, length, dtype, tolerance):
    """A block that sees the future, misses the last keys, or adds its gradient to the wrong ones; a scale left out; a
    sum rounded to bf16."""
    *states_BHTC, grad_BHTC = torch.randn(4, 2, 3, length, head_size, dtype=dtype)
    results = []
    for function, precision in (
        (BlockwiseAttention.apply, dtype),
        (partial(F.scaled_dot_product_attention, is_causal=True), torch.float64),
    ):
        inputs = [state.to(precision).requires_grad_() for state in states_BHTC]
        mixed_BHTC = function(*inputs)
        results.append([mixed_BHTC, *torch.autograd.grad(mixed_BHTC, inputs, grad_BHTC.to(precision))])
    for value, expected in zip(*results, strict=True):
        assert value.dtype == dtype
        assert (value.double() - expected).norm() <= tolerance * expected.norm() + 1e-14  # of one key: zero


@pytest.mark.parametrize("function", [ReluSquared.apply, turned_by_a_rotation], ids=["relu_squared", "rotation"])
def test_handwritten_gradients(function):
    """A derivative that is not the function's."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


# The compiler looks at .grad of a layer's input, and makes instances of functions, which is none of our doing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("positions", ["per_layer", "rotary"])
def test_layers_compile_once_whatever_set_of_them_is_active(positions):
    """A recompilation per layer or per dropped layer: past the compiler's limit of 8 it gives up, silently."""
    config = ModelConfig(num_layers=12, num_heads=2, d_model=8, d_ff=16, context_length=8, position_encoding=positions)
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
