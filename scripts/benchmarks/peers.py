"""The peers' models, built through their public interfaces, unpatched.

Each has charlm's layers, width, heads, context and vocabulary, and its own positions, activation, norms and tying of
embeddings. None has dropout.

Shapes: B batch, T positions, D d_model, V vocabulary, W = T + 1 characters of a window.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setups import Setup, Trial
from benchmarks.shapes import VOCABULARY, Shape

TRANSFORMERS = {
    "vocab_size": VOCABULARY,
    "attn_implementation": "sdpa",
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
"""Options of both models of transformers."""
Loss = Callable[[Tensor], Tensor]
"""Maps windows_BW to the mean loss of the next character over all positions."""


def build_peer(setup: Setup, shape: Shape) -> tuple[nn.Module, Loss]:
    """A peer's model and its loss."""
    builders = {
        "x-transformers": x_transformers,
        "transformers GPT-2": gpt2,
        "transformers Llama": llama,
        "torch TransformerEncoder": torch_encoder,
    }
    return builders[setup.library](setup, shape)


def x_transformers(setup: Setup, shape: Shape) -> tuple[nn.Module, Loss]:
    """The decoder of its readme; tuned: with flash attention, and on exactly T positions."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=shape.context_length + 1,  # its wrapper's loss runs the model on whole windows
        attn_layers=Decoder(
            dim=shape.d_model,
            depth=shape.num_layers,
            heads=shape.num_heads,
            attn_dim_head=shape.d_model // shape.num_heads,
            ff_mult=shape.d_ff / shape.d_model,
            attn_flash=setup.tuned,
        ),
    )
    wrapper = AutoregressiveWrapper(model)
    return wrapper, next_character_loss(model) if setup.tuned else wrapper


def gpt2(setup: Setup, shape: Shape) -> tuple[nn.Module, Loss]:
    """transformers' GPT-2; tuned: with the fused kernel of the same GELU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_inner=shape.d_ff,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh" if setup.tuned else "gelu_new",
        **TRANSFORMERS,
    )
    return _transformers(GPT2LMHeadModel(config), setup)


def llama(setup: Setup, shape: Shape) -> tuple[nn.Module, Loss]:
    """transformers' Llama. Its gated layers have three matrices, so two thirds of d_ff make as many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        max_position_embeddings=shape.context_length,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=gated_d_ff(shape.d_ff),
        **TRANSFORMERS,
    )
    return _transformers(LlamaForCausalLM(config), setup)


def gated_d_ff(d_ff: int) -> int:
    """The multiple of 64 nearest to two thirds of d_ff. Other sizes run slower."""
    return max(64, round(d_ff * 2 / 3 / 64) * 64)


def _transformers(model: nn.Module, setup: Setup) -> tuple[nn.Module, Loss]:
    def own_loss(windows_BW: Tensor) -> Tensor:
        ids_BT = windows_BW[:, :-1]
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss  # its Trainer uses no cache either

    if not setup.tuned:
        return model, own_loss
    return model, next_character_loss(lambda ids_BT: model(input_ids=ids_BT, use_cache=False).logits)


class TorchEncoder(nn.Module):
    """The language model of torch's tutorial, with learned positions."""

    def __init__(self, shape: Shape, *, says_causal: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            shape.d_model, shape.num_heads, shape.d_ff, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(VOCABULARY, shape.d_model)
        self.positions = nn.Embedding(shape.context_length, shape.d_model)
        self.encoder = nn.TransformerEncoder(
            layer, shape.num_layers, norm=nn.LayerNorm(shape.d_model), enable_nested_tensor=False
        )
        self.head = nn.Linear(shape.d_model, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(shape.context_length))
        self.says_causal = says_causal or None
        """None makes torch compare the mask with a causal one at every call."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.embedding(ids_BT) + self.positions(positions_T)
        return self.head(
            self.encoder(x_BTD, mask=self.mask[: len(positions_T), : len(positions_T)], is_causal=self.says_causal)
        )


def torch_encoder(setup: Setup, shape: Shape) -> tuple[nn.Module, Loss]:
    """nn.TransformerEncoder with a causal mask; tuned: it is told that the mask is causal."""
    model = TorchEncoder(shape, says_causal=setup.tuned)
    return model, next_character_loss(model)


def next_character_loss(logits_of: Callable[[Tensor], Tensor]) -> Loss:
    """The loss of a model that maps ids_BT to logits_BTV."""

    def loss(windows_BW: Tensor) -> Tensor:
        logits_BTV = logits_of(windows_BW[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1), windows_BW[:, 1:].flatten())

    return loss


def matrix_parameters(model: nn.Module) -> int:
    """Parameters of all matrix products of a peer's model. An embedding counts only if it is the head too."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # GPT-2's transposed linear layer
            total += module.weight.numel()
        elif isinstance(module, nn.MultiheadAttention):
            total += module.in_proj_weight.numel()  # its output projection is a Linear
    return total


def autocast(trial: Trial) -> AbstractContextManager:
    """Autocast to bf16 if the set-up asks for it."""
    if trial.setup.precision == "fp32":
        return nullcontext()
    return torch.autocast(trial.device, dtype=torch.bfloat16)
