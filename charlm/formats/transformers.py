"""Exported folders for transformers: of every model for `charlm.hf`, and of some for the library alone."""

import json
from pathlib import Path

from charlm.config import UserError
from charlm.runs.exported import CARD, card, files_of, write_folder
from charlm.runs.trained import TrainedModel

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "relu_squared": "relu2"}
NAMES = {
    "transformer.embedding": "model.embed_tokens",
    "transformer.blocks": "model.layers",
    "transformer.final_norm": "model.norm",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
"""Parts of our names of parameters, and Starcoder2's."""
PADDING = {"bytes": 255, "sentencepiece": 0}  # ids that no text in UTF-8 has


def save_model(trained: TrainedModel, folder: Path | str, name: str | None = None) -> Path:
    """As charlm's own format; config.json also says what the Auto classes ask for."""
    size = trained.vocabulary.size
    config = {"model_type": "charlm", "architectures": ["CharlmForCausalLM"], "vocab_size": size, "dtype": "float32"}
    files = files_of(trained, name or Path(folder).name, "transformers", **config)
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "CharlmTokenizer"}) + "\n"
    files["generation_config.json"] = json.dumps({"pad_token_id": size}) + "\n"
    return write_folder(Path(folder), trained.modules.state_dict(), files)


def save_stock(trained: TrainedModel, folder: Path | str, name: str | None = None) -> Path:
    """A stock Starcoder2, which loads without charlm. Raises UserError unless it computes the same."""
    from charlm.hf.tokenizer import OPTIONS, fast_tokenizer

    model, heads = trained.config.model, trained.heads
    bias = heads.linears(model.num_layers, [1])[-1].bias
    needed = {
        "model.position_encoding=rotary": model.position_encoding == "rotary",
        "model.norm=pre": model.norm == "pre",
        "model.ngrams=[]": not model.ngrams,
        "aux.layers.head=linear": not heads.last_tower,
        "keep_heads=false": len(heads.pairs) == 1,
        "model.head_bias=false": bias is None or not bias.any(),
    }
    for option in (option for option, holds in needed.items() if not holds):
        text = f"format=transformers-stock: is exact only with {option}; --format transformers takes any model"
        raise UserError(text, option.partition("=")[0])
    tensors = trained.modules.state_dict()
    tensors.pop(f"heads.exits.layer{model.num_layers}.offset1.bias", None)
    for ours, theirs in ({f"heads.exits.layer{model.num_layers}.offset1": "lm_head"} | NAMES).items():
        tensors = {key.replace(f"{ours}.", f"{theirs}."): tensor for key, tensor in tensors.items()}
    tokenizer, padding = fast_tokenizer(trained.vocabulary), PADDING.get(trained.vocabulary.name)
    config = {
        **{"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], "dtype": "float32"},
        **{"vocab_size": trained.vocabulary.size, "tie_word_embeddings": False},
        **{"hidden_size": model.d_model, "intermediate_size": model.d_ff, "num_hidden_layers": model.num_layers},
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), model.num_heads),
        **{"hidden_act": ACTIVATIONS[model.activation], "norm_epsilon": 1e-5, "rope_theta": 10_000.0},
        **{"attention_dropout": model.attention_dropout, "residual_dropout": model.residual_dropout},
        **{"max_position_embeddings": model.context_length, "bos_token_id": None, "eos_token_id": None},
    }
    pad_token = None if padding is None else tokenizer.id_to_token(padding)
    options = OPTIONS | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad_token}
    texts = {"config": config, "generation_config": {"pad_token_id": padding}, "tokenizer_config": options}
    texts["vocabulary"] = trained.vocabulary.to_dict()  # to import it again
    files = {f"{file}.json": json.dumps(text, indent=2) + "\n" for file, text in texts.items()}
    files["tokenizer.json"] = tokenizer.to_str() + "\n"
    files[CARD] = card(trained, name or Path(folder).name, "stock", "transformers")
    return write_folder(Path(folder), tensors, files)
