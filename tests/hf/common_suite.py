"""transformers' own tests of causal models on `CharlmForCausalLM`; test_common.py runs them.

Not collected by itself: that library's tests have to be on the path, as the package `tests`.
"""

import copy
import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers import GenerationMixin, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from charlm.hf import CharlmConfig, CharlmForCausalLM

MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["charlm"] = "RandomCharlmForCausalLM"  # else it gets no labels
MODEL = {"num_layers": 2, "num_heads": 4, "d_model": 32, "d_ff": 37, "context_length": 128}


NO_BASE = "there is no base model: the network without heads is no model of the library"
OWN_LAYER = "asks for the library's own layer; test_transformers.py compares the gradients"
NO_GRAPH = "the number of positions is read from the cache, so that a step is not one graph"
INAPPLICABLE = {
    "test_correct_missing_keys": NO_BASE,
    "test_model_base_model_prefix": NO_BASE,
    "test_model_weights_reload_no_missing_tied_weights": "a folder that lacks tensors is refused",
    "test_gradient_checkpointing_enable_disable": OWN_LAYER,
    "test_training_gradient_checkpointing": OWN_LAYER,
    "test_custom_4d_attention_mask": "a mask says what is padding, and nothing else",
    "test_generate_compile_model_forward_fullgraph": NO_GRAPH,
    "test_generate_compilation_all_outputs": NO_GRAPH,
    "test_sdpa_can_compile_dynamic": NO_GRAPH,
    "test_torch_compile_for_training": NO_GRAPH,
}
"""Tests by the beginnings of their names, with the reason why they say nothing about this model. The library skips
others itself: those of attention weights, which are not returned, and of hardware and packages that are missing."""


class RandomCharlmForCausalLM(CharlmForCausalLM, GenerationMixin):
    """With heads that are not zero, as new ones are."""

    _can_compile_fullgraph = True  # else tests of static caches are skipped

    def __init__(self, config):
        super().__init__(config)
        for name, parameter in self.heads.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2 and parameter.device.type != "meta":
                torch.nn.init.normal_(parameter, std=0.5)


class Tester:
    """What the library's tests ask for: a config, and inputs."""

    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads, is_training = 3, 7, 2, 32, 4, True
    options = {"model": MODEL}  # noqa: RUF012

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        heads = {"pairs": [[1, 1], [2, 1]], "last_tower": False}
        return CharlmConfig(vocab_size=99, options=copy.deepcopy(self.options), heads=heads)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 99)
        mask = torch.ones_like(ids)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class PerLayerTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """The paper's positions."""

    all_model_classes = (RandomCharlmForCausalLM,)
    has_attentions = False
    test_resize_embeddings = False
    kind = Tester
    inapplicable = INAPPLICABLE

    def setUp(self):
        for name, reason in self.inapplicable.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        set_seed(0)
        self.model_tester = self.kind(self)
        # The library takes a model that does not return its attention weights for one without attention.
        self.has_attentions = "padding" in self.id() or "4d" in self.id()


class RotaryTester(Tester):
    options = {"model": MODEL | {"position_encoding": "rotary", "norm": "post"}}  # noqa: RUF012


class RotaryTest(PerLayerTest):
    """Rotary positions and post-norm."""

    kind = RotaryTester


class NgramTester(Tester):
    options = {"model": MODEL | {"ngrams": [2, 4], "ngram_buckets": 97, "ngram_width": 8}}  # noqa: RUF012


class NgramTest(PerLayerTest):
    """Tables of n-grams."""

    kind = NgramTester
    inapplicable = INAPPLICABLE | dict.fromkeys(["test_inputs_embeds"], "n-grams need ids")
