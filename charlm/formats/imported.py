"""Models of transformers and nanoGPT, in folders of safetensors, as models of charlm where that is exact."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charlm.config import ModelConfig, UserError
from charlm.config.errors import first_line, shown
from charlm.config.load import load_config
from charlm.data.vocabulary import Vocabulary
from charlm.files import read_json, sha256_of
from charlm.formats.transformers import ACTIVATIONS, NAMES
from charlm.runs.exported import EXPORT_CONFIG, MAX_CONFIG_BYTES, TENSORS
from charlm.runs.tensors import load_tensors
from charlm.runs.trained import TrainedModel, build_model, filled

GPT2 = NAMES | {
    **{"transformer.blocks": "transformer.h", "attention_norm": "ln_1", "feed_forward_norm": "ln_2"},
    **{"transformer.embedding": "transformer.wte", "transformer.final_norm": "transformer.ln_f"},
    **{"attention.fused": "attn.c_attn", "attention.out": "attn.c_proj"},
}
NEOX = NAMES | {
    **{"transformer.blocks": "gpt_neox.layers", "transformer.embedding": "gpt_neox.embed_in"},
    **{"transformer.final_norm": "gpt_neox.final_layer_norm", "attention.fused": "attention.query_key_value"},
    **{"attention.out": "attention.dense"},
    **{"feed_forward.up": "mlp.dense_h_to_4h", "feed_forward.down": "mlp.dense_4h_to_h"},
}
KINDS = {"nanogpt": GPT2, "gpt2": GPT2, "gpt_neox": NEOX, "starcoder2": NAMES}
"""Parts of our names of parameters, and each model's."""
OPTIONS = {
    **{"num_layers": ("n_layer", "num_hidden_layers"), "num_heads": ("n_head", "num_attention_heads")},
    **{"d_model": ("n_embd", "hidden_size"), "d_ff": ("n_inner", "intermediate_size")},
    **{"context_length": ("block_size", "n_positions", "max_position_embeddings")},
}
"""Our options of a model, and the names that others have for them."""
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
NEEDED = {
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"), 1e-5),
    **{"use_parallel_residual": False, "scale_attn_by_inverse_layer_idx": False, "sliding_window": None},
    **{"scale_attn_weights": True, "add_cross_attention": False, "rope_parameters": ROTARY},
}
"""Options of transformers, with the only value that is exact."""


def read_model(folder: Path, vocabulary: Vocabulary, order: Sequence[int]) -> TrainedModel:
    """The model in a folder, with the ids that `order` gives for ours; UserError unless it computes the same."""
    path = folder / EXPORT_CONFIG
    record = read_json(path, MAX_CONFIG_BYTES, dict[str, Any])
    kind = "nanogpt" if "block_size" in record else str(record.get("model_type"))
    if kind not in KINDS:
        raise UserError(f"{path}: model_type={shown(kind)}: not one of {', '.join(KINDS)}", "model_type")
    if kind != "nanogpt":
        from charlm.hf import AutoConfig, AutoModelForCausalLM

        try:
            stock = AutoConfig.for_model(**record)
        except Exception as error:  # its validators raise several
            raise UserError(f"{path}: {first_line(error)}") from None
        record = stock.to_dict()  # with the defaults
    if vocabulary.size != (size := record.get("vocab_size")):
        raise UserError(f"{path}: vocab_size={shown(size)}: its vocabulary has {vocabulary.size:,}", "vocab_size")
    config = load_config((), {"model": _options(path, record)})
    stored = load_tensors(folder / TENSORS)[0].items()
    tensors = {name.replace("embed_out.", "lm_head."): own.float() for name, own in stored}
    ours = _renamed(tensors, kind, config.model, record.get("tie_word_embeddings", True))
    build = partial(build_model, config, vocabulary.size, [(config.model.num_layers, 1)], False)
    modules = filled(build, config.model, ours, folder / TENSORS, f"the {kind} of {EXPORT_CONFIG}")
    if kind != "nanogpt":
        model = AutoModelForCausalLM.from_config(stock, attn_implementation="eager", dtype=torch.float32)
        _check_same(path, model.eval(), tensors, modules)
    for table in (modules["transformer"].embedding, *modules["heads"].linears(config.model.num_layers, [1])):
        table.weight = nn.Parameter(table.weight.detach()[order])
    origin = {"name": folder.name, "kind": kind, "SHA-256": sha256_of(folder / TENSORS)}
    corpus, cpu = {"name": "unknown", "sha256": "unknown"}, torch.device("cpu")
    own = {"vocabulary": vocabulary, "checkpoint": "imported", "step": 0, "started_from": origin}
    return TrainedModel(config, **modules, **own, corpus=corpus, device=cpu)


def _options(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    found = {ours: next(filter(None, map(record.get, names)), None) for ours, names in OPTIONS.items()}
    for option, needed in (NEEDED | {"num_key_value_heads": found["num_heads"]}).items():
        value = record.get(option, needed)
        if (ROTARY | (value or {}) if needed is ROTARY else value) != needed:
            raise UserError(f"{path}: {option}={shown(value)}: exact only with {shown(needed)}", option)
    stock = record.get("hidden_act") or record.get("activation_function") or "gelu"  # nanoGPT does not say
    activation = {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(stock, f"{stock} of transformers")
    found["d_ff"] = found["d_ff"] or (4 * found["d_model"] if isinstance(found["d_model"], int) else None)
    position = "rotary" if "rope_parameters" in record else "input"
    return found | {"activation": activation, "position_encoding": position, "head_bias": False}


def _renamed(tensors: dict[str, Tensor], kind: str, config: ModelConfig, tied: bool) -> dict[str, Tensor]:
    """The tensors by our names; one that has no place keeps its name."""
    head, num_heads, renamed = f"heads.exits.layer{config.num_layers}.offset1.", config.num_heads, {}
    parts = {head: "lm_head.", "transformer.position_tables.0": "transformer.wpe.weight"}
    parts |= {f"{ours}.": f"{stock}." for ours, stock in KINDS[kind].items()}
    for name, tensor in tensors.items():
        if kind == "gpt2" and tensor.dim() == 2 and re.search(r"\.(attn|mlp)\.", name):
            tensor = tensor.T.contiguous()  # the library's Conv1D
        for ours, stock in parts.items():
            name = name.replace(stock, ours)
        renamed[name] = tensor
        if ".fused." in name and tensor.shape[:1].numel() % (3 * num_heads) == 0:
            whole = renamed.pop(name)
            if kind == "gpt_neox":  # query, key and value of each head
                whole = whole.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            names = (name.replace("fused", part) for part in ("query", "key", "value"))
            renamed |= zip(names, whole.chunk(3), strict=True)
    if tied and "transformer.embedding.weight" in renamed:
        renamed.setdefault(f"{head}weight", renamed["transformer.embedding.weight"])
    for name in [name for name in renamed if name.startswith(("transformer.blocks.", "transformer.final_norm."))]:
        renamed.setdefault(re.sub("weight$", "bias", name), torch.zeros(renamed[name].shape[:1]))
    return renamed


@torch.no_grad()
def _check_same(path: Path, model: nn.Module, tensors: dict[str, Tensor], modules: nn.ModuleDict) -> None:
    model.load_state_dict(tensors, strict=False)  # `filled` has compared the names
    ids_BT = torch.arange(min(model.config.max_position_embeddings, 64))[None] * 7919 % model.config.vocab_size
    ((last, states_BTD),), logits = modules["transformer"](ids_BT).items(), model(ids_BT).logits
    worst = float((modules["heads"](states_BTD, last)[:, :, 0] - logits).abs().max())
    if not worst <= 1e-5 * max(1.0, float(logits.abs().max())):
        raise UserError(f"{path}: charlm's logits would differ from those of transformers by {worst:.1e}", "logits")
