"""Digests of what encoder and decoder must share: model, vocabulary and arithmetic."""

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
from charlm.runs.checkpoints import digest
from charlm.runs.trained import TrainedModel


def model_digest(trained: TrainedModel) -> bytes:
    """16 bytes that identify the model's shape and `predicting_tensors`."""
    shape = trained.config.model.model_dump()
    shape["positions"] = shape.pop("position_encoding")  # as in older files
    hashed = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor in predicting_tensors(trained).items():
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous()
        hashed.update(values.view(torch.uint8).numpy().data)
    return hashed.digest()[:16]


def predicting_tensors(trained: TrainedModel) -> dict[str, Tensor]:
    """The parameters that predict the next symbol, by name."""
    model = trained.config.model
    with torch.inference_mode():
        nothing_11D = torch.zeros(1, 1, model.d_model, device=trained.device)
        _, weight, bias = trained.heads.classifiers(nothing_11D, model.num_layers, (1,))
    head = {"head.weight": weight, "head.bias": bias}
    return dict(sorted((trained.transformer.state_dict() | head).items()))


def vocabulary_digest(vocabulary: Vocabulary) -> bytes:
    """8 bytes that identify the vocabulary."""
    return bytes.fromhex(digest(vocabulary.to_dict()))[:8]


def environment(device: torch.device) -> str:
    """Versions, device and processor: the last bits of a probability depend on them."""
    if device.type == "cuda":
        place = f"{torch.cuda.get_device_name(device)} cuda {torch.version.cuda}"
    else:
        found = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest supported torch lacks it
        # Not the numbers of cores and sockets.
        features = {name: value for name, value in found.items() if not name.startswith("num_")}
        kernels = torch.backends.cpu.get_cpu_capability()
        place = f"{device.type} {platform.machine()} {kernels} {digest(features)[:8]}"
    return f"torch {torch.__version__}, constriction {version('constriction')}, {place}"


def probe(trained: TrainedModel, settings: CodingSettings) -> bytes:
    """8 bytes that identify the arithmetic by logits and code words; use it in `threads_set`."""
    context = min(settings.context, 16)
    streams = Streams(trained, settings.replace(context=context, stride=1))
    encoder = constriction.stream.queue.RangeEncoder()
    hashed = hashlib.sha256()
    shape = (context + 2, settings.streams)
    random_NS = np.random.Philox(key=0).random_raw(shape) % trained.vocabulary.size
    for symbols_S in random_NS:
        logits_SV = streams.append(symbols_S)
        hashed.update(logits_SV.float().cpu().numpy().tobytes())
        encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
    hashed.update(encoder.get_compressed().astype("<u4").tobytes())
    return hashed.digest()[:8]
