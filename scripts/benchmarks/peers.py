"""The peers' models, built through their public interfaces and never patched.

Each has charlm's layers, width, heads, context and vocabulary, and otherwise what it brings: positions, activation,
norms, tied embeddings. No dropout anywhere.

Shapes: B batch, T positions, D d_model, V vocabulary, W = T + 1 characters of a window.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setups import Contestant, Job
from benchmarks.shapes import VOCABULARY, Shape

Loss = Callable[[Tensor], Tensor]
"""windows_BW to the mean loss of predicting the next character at all positions."""


def build_peer(contestant: Contestant, shape: Shape) -> tuple[nn.Module, Loss]:
    """The model of a peer, and its loss."""
    builders = {
        "x-transformers": x_transformers,
        "transformers GPT-2": gpt2,
        "transformers Llama": llama,
        "torch TransformerEncoder": torch_encoder,
    }
    return builders[contestant.library](contestant, shape)


def x_transformers(contestant: Contestant, shape: Shape) -> tuple[nn.Module, Loss]:
    """As its readme builds a decoder; tuned, its switch for flash attention, and exactly T positions."""
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
            attn_flash=contestant.tuned,
        ),
    )
    wrapper = AutoregressiveWrapper(model)
    return wrapper, next_character_loss(model) if contestant.tuned else wrapper


def gpt2(contestant: Contestant, shape: Shape) -> tuple[nn.Module, Loss]:
    """transformers' GPT-2; tuned, its GELU of one kernel, which computes what the default writes out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_inner=shape.d_ff,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh" if contestant.tuned else "gelu_new",
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _transformers(GPT2LMHeadModel(config), contestant)


def llama(contestant: Contestant, shape: Shape) -> tuple[nn.Module, Loss]:
    """transformers' Llama. Its gated layer has three matrices: two thirds of d_ff give it the others' parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=shape.context_length,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=gated_d_ff(shape.d_ff),
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _transformers(LlamaForCausalLM(config), contestant)


def gated_d_ff(d_ff: int) -> int:
    """The multiple of 64 nearest to two thirds: sizes in between run slower."""
    return max(64, round(d_ff * 2 / 3 / 64) * 64)


def _transformers(model: nn.Module, contestant: Contestant) -> tuple[nn.Module, Loss]:
    def own_loss(windows_BW: Tensor) -> Tensor:
        ids_BT = windows_BW[:, :-1]
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss  # no cache: as its Trainer does

    return model, next_character_loss(lambda ids_BT: model(input_ids=ids_BT, use_cache=False).logits) if (
        contestant.tuned
    ) else own_loss


class TorchEncoder(nn.Module):
    """A language model from torch's own layers, as its tutorial builds one, with learned positions."""

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
        """None has torch compare the mask with a causal one at every call."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.embedding(ids_BT) + self.positions(positions_T)
        return self.head(self.encoder(x_BTD, mask=self.mask, is_causal=self.says_causal))


def torch_encoder(contestant: Contestant, shape: Shape) -> tuple[nn.Module, Loss]:
    """nn.TransformerEncoder with a causal mask; tuned, it is told that the mask is causal."""
    model = TorchEncoder(shape, says_causal=contestant.tuned)
    return model, next_character_loss(model)


def next_character_loss(logits_of: Callable[[Tensor], Tensor]) -> Loss:
    """The loss of a model that maps ids_BT to logits_BTV."""

    def loss(windows_BW: Tensor) -> Tensor:
        logits_BTV = logits_of(windows_BW[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1), windows_BW[:, 1:].flatten())

    return loss


def matrix_parameters(model: nn.Module) -> int:
    """Parameters of all matrix products of a peer's model; embeddings are looked up, unless they are the head too."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # GPT-2's transposed linear layer
            total += module.weight.numel()
        elif isinstance(module, nn.MultiheadAttention):
            total += module.in_proj_weight.numel()  # its output projection is a Linear
    return total


def autocast(job: Job) -> AbstractContextManager:
    """The precision of the contestant: autocast to bf16, or nothing."""
    if job.contestant.precision == "fp32":
        return nullcontext()
    return torch.autocast(job.device, dtype=torch.bfloat16)
