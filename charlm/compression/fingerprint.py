"""Digests of what encoder and decoder must share: the model, its vocabulary, and the machine's arithmetic."""

import hashlib
import json
import platform
from importlib.metadata import version

import constriction
import numpy as np
import torch
from torch import Tensor

from charlm.compression.settings import CodingSettings
from charlm.compression.streams import FAMILY, Streams, probabilities
from charlm.data.vocabulary import Vocabulary
from charlm.runs.trained import TrainedModel


def model_digest(trained: TrainedModel) -> bytes:
    """16 bytes that identify the model: its shape, and the parameters that predict the next symbol."""
    shape = trained.config.model.model_dump()
    shape["positions"] = shape.pop("position_encoding")  # as the digest of older files has it
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor in predicting_tensors(trained).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()[:16]


def predicting_tensors(trained: TrainedModel) -> dict[str, Tensor]:
    """Every parameter that the prediction of the next symbol depends on, by name."""
    with torch.inference_mode():
        nothing_11D = torch.zeros(1, 1, trained.config.model.d_model, device=trained.device)
        _, weight, bias = trained.heads.classifiers(nothing_11D, trained.config.model.num_layers, (1,))
    tensors = trained.transformer.state_dict() | {"head.weight": weight, "head.bias": bias}
    return dict(sorted(tensors.items()))


def vocabulary_digest(vocabulary: Vocabulary) -> bytes:
    """8 bytes that identify the vocabulary."""
    return hashlib.sha256(json.dumps(vocabulary.to_dict(), sort_keys=True).encode()).digest()[:8]


def environment(device: torch.device) -> str:
    """Versions, device and processor: the last bits of a probability depend on them."""
    if device.type == "cuda":
        place = f"{torch.cuda.get_device_name(device)} cuda {torch.version.cuda}"
    else:
        found = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest supported torch lacks it
        features = {name: value for name, value in found.items() if not name.startswith("num_")}  # of cores, sockets
        features = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()[:8]
        place = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {features}"
    return f"torch {torch.__version__}, constriction {version('constriction')}, {place}"


def probe(trained: TrainedModel, settings: CodingSettings) -> bytes:
    """8 bytes that identify the arithmetic: a digest of the logits and code words for a fixed text.

    The model reads it symbol by symbol and once more in one pass, in as many streams as the settings say. Call it
    inside `threads_set`.
    """
    context = min(settings.context, 16)
    streams = Streams(trained, settings.replace(context=context, stride=1))
    random_NS = np.random.Philox(key=0).random_raw((context + 2, settings.streams)) % trained.vocabulary.size
    digest, encoder = hashlib.sha256(), constriction.stream.queue.RangeEncoder()
    for symbols_S in random_NS:
        logits_SV = streams.append(symbols_S)
        digest.update(logits_SV.float().cpu().numpy().tobytes())
        encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
    digest.update(encoder.get_compressed().astype("<u4").tobytes())
    return digest.digest()[:8]
