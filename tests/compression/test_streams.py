import math
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tqdm import tqdm

from charlm.compression import streams as streams_module
from charlm.compression.coder import compressed_nats
from charlm.compression.container import environment, model_digest, probe, vocabulary_digest
from charlm.compression.streams import Streams, choose_settings, probabilities, threads_set
from charlm.config import UserError
from charlm.data.vocabulary import ByteVocabulary, CharacterVocabulary
from charlm.inference.adaptation import Learner, read_streams
from charlm.inference.evaluation import bits_per_character
from charlm.inference.scoring import negative_log_likelihoods
from tiny import refused, typed


@torch.no_grad()
def described_nats(trained, ids: np.ndarray, streams: int, context: int, stride: int, block: int) -> np.ndarray:
    """The costs by the protocol's description: a list of what each stream remembers, and no cache."""
    last = trained.config.model.num_layers
    nats = []
    for begin in range(0, len(ids), block):
        for stream in np.array_split(ids[begin : begin + block], streams):
            seen: list[int] = []
            for symbol in stream.tolist():
                if not seen:
                    nats.append(math.log(trained.vocabulary.size))
                else:
                    logits_V = trained.heads(trained.transformer(torch.tensor([seen]))[last], last)[0, -1, 0]
                    nats.append(-float(logits_V.double().log_softmax(-1)[symbol]))
                if len(seen) == context:
                    seen = seen[len(seen) - (context - stride) :]
                seen.append(symbol)
    return np.array(nats)


@pytest.mark.parametrize(
    ("length", "streams", "context", "stride", "block"),
    [(40, 1, 8, 5, 100), (61, 3, 8, 5, 30), (45, 2, 5, 5, 45), (45, 4, 8, 1, 22), (30, 2, 1, 1, 30), (5, 3, 8, 8, 3)],
)
def test_costs_are_those_that_the_protocol_describes(build_model, length, streams, context, stride, block):
    """Guards against a stream that starts or ends elsewhere, sees another's symbols or an earlier block's, and against
    a context that is forgotten a symbol too early, too late, or not in the way that is documented."""
    trained = build_model(ngrams=(2, 3))
    ids = np.random.default_rng(length).integers(0, 256, length).astype(np.uint8)
    options = {"streams": streams, "context": context, "stride": stride, "block": block}
    nats, settings = compressed_nats(trained, ids, **options)
    np.testing.assert_allclose(nats, described_nats(trained, ids, **options), rtol=1e-4, atol=1e-5)
    assert {name: getattr(settings, name) for name in options} == options


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_one_stream_costs_what_evaluation_at_its_stride_says(build_model, stride):
    """Guards against a stride that means one thing here and another in evaluate."""
    trained = build_model(position_encoding="rotary")
    ids = np.random.default_rng(1).integers(0, 256, 8 + 5 * stride + 1).astype(np.uint8)
    expected = negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=stride)[2]
    nats, _ = compressed_nats(trained, ids, streams=1, stride=stride)
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 3])
def test_what_adapts_costs_what_evaluation_says(build_model, build_corpus, streams):
    """Guards against steps at other moments than in evaluate, from other symbols, or from another context."""
    trained = build_model(ngrams=(2,))
    ids = np.random.default_rng(1).integers(0, 256, streams * (8 + 5 * 3 + 1)).astype(np.uint8)
    adapt = {"rule": "rms", "rate": 0.01, "decay": 0.1, "steps": 2}
    score = bits_per_character(trained, build_corpus(ids.tobytes()), stride=3, adapt=adapt, streams=streams)
    nats, settings = compressed_nats(trained, ids, streams=streams, stride=3, adapt=adapt)
    assert nats.sum() / math.log(2) / score.characters == pytest.approx(score.bits_per_character, rel=1e-6)
    static, _ = compressed_nats(trained, ids, streams=streams, stride=3)
    assert abs(nats.sum() - static.sum()) > 0.1
    assert settings.adapt.steps == 2


@pytest.mark.parametrize("names", [("counts", "match"), ("heads", "counts")])
def test_experts_cost_what_they_predict(build_model, names):
    """Guards against experts that learn a symbol early, twice or never, or that are given another layer."""
    pytest.importorskip("numba", reason="not installed, see requirements-hf.txt")
    from charlm.inference.experts import Experts

    trained = build_model()
    layers = [1, 2] if "heads" in names else [2]
    ids = np.tile(np.random.default_rng(1).integers(0, 256, 30), 3)[: 3 * (8 + 5 * 3 + 1)].astype(np.uint8)
    experts = Experts(names, vocabulary_size=256, num_heads=len(layers), streams=3)
    learner, expected = Learner(trained.transformer, trained.heads, None, layers), 0.0
    for symbols_SQ, counts_SQ, logits_LSQV in read_streams(learner, ids, streams=3, stride=3):
        log_p_SQLV = logits_LSQV.double().log_softmax(-1).permute(1, 2, 0, 3).numpy()
        expected += experts.score(log_p_SQLV, ids[symbols_SQ], counts_SQ).sum()
    nats, settings = compressed_nats(trained, ids, streams=3, stride=3, experts=names)
    assert settings.experts == names
    assert nats.sum() == pytest.approx(expected, rel=1e-5)
    assert abs(nats.sum() - compressed_nats(trained, ids, streams=3, stride=3)[0].sum()) > 1


@pytest.mark.parametrize(("context_length", "stride"), [(1, 1), (2, 2), (7, 5), (8, 5), (512, 257)])
def test_the_default_keeps_as_much_as_generation(build_model, context_length, stride):
    """Guards against defaults that differ: generation keeps context_length // 2 symbols, one at least."""
    assert choose_settings(build_model(context_length=context_length), 10).stride == stride
    assert context_length - stride + 1 == max(1, context_length // 2)


def test_reading_again_in_pieces(build_model, monkeypatch):
    """Guards against pieces that overlap or leave a gap where many streams are read again."""
    trained = build_model(ngrams=(2,))
    ids = np.random.default_rng(2).integers(0, 256, 70).astype(np.uint8)
    expected, _ = compressed_nats(trained, ids, streams=2, stride=2)
    monkeypatch.setattr(streams_module, "READ_AT_ONCE", 6)
    np.testing.assert_allclose(compressed_nats(trained, ids, streams=2, stride=2)[0], expected, rtol=1e-4, atol=1e-5)


def test_shapes_do_not_depend_on_the_text(build_model, monkeypatch):
    """Guards against a batch that shrinks where streams end: other shapes may take another way through the library."""
    trained = build_model()
    shapes = []
    monkeypatch.setattr(
        trained.transformer, "forward", lambda ids_BT, **rest: (shapes.append(ids_BT.shape), forward(ids_BT, **rest))[1]
    )
    forward = type(trained.transformer).forward.__get__(trained.transformer)
    for text in (bytes(41), bytes(range(41))):
        compressed_nats(trained, np.frombuffer(text, np.uint8), streams=4, stride=3)
    assert shapes[:10] == shapes[10:] and {shape[0] for shape in shapes} == {4}
    assert [shape[1] for shape in shapes[:10]] == [1] * 8 + [6, 1]


def test_every_symbol_comes_once(build_model):
    """Guards against a symbol that is coded twice or never, for any length against any number of streams."""
    trained = build_model()
    for num_streams in (1, 2, 5):
        settings = choose_settings(trained, 1, streams=num_streams)
        streams = Streams(trained, settings)
        for length in range(1, 14):
            met = []
            for where_A, logits_AV in streams.walk(np.zeros(length, np.uint8), tqdm(disable=True)):
                assert len(where_A) == len(logits_AV)
                met.extend(where_A.tolist())
            assert sorted(met) == list(range(length))


def test_threads_are_those_of_the_settings_and_then_those_of_before():
    """Guards against arithmetic with as many threads as happen to be set, and against leaving them changed."""
    assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), threads_set(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "given",
    typed("streams=0 streams=1000000 context=9 stride=9 stride=0 threads=0 precision=int8 precision=fp16"),
)
def test_options_out_of_range(build_model, given):
    """Guards against an option that is taken, and then fails with a traceback or gives nonsense."""
    option, value = given.split("=")
    with refused(option):
        choose_settings(build_model(), 100, **{option: int(value) if value.isdigit() else value})


@pytest.mark.parametrize("names", [("counts", "match") * 30, ("train",), ("heads", "train")])
def test_experts_that_no_file_can_have(build_model, names):
    """Guards against a header that cannot hold what was asked for, and a decoder that has to read validation."""
    with refused("experts"):
        choose_settings(build_model(), 100, experts=names)


def test_more_streams_than_memory_holds(build_model, monkeypatch):
    """Guards against a file whose header, or a user whose option, makes the system end other processes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    with refused("streams", "their keys and values take"):
        choose_settings(build_model(), 100, streams=100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=50_000))
    choose_settings(build_model(), 100, streams=10)
    for own in ({"experts": ("counts",)}, {"adapt": {}}):
        with refused("streams"):
            choose_settings(build_model(), 100, streams=10, **own)


def test_default_streams_grow_with_the_text(build_model):
    """Guards against many short streams, each of which begins without context."""
    trained = build_model()
    assert [choose_settings(trained, 2**n).streams for n in (0, 12, 14, 16, 30)] == [1, 1, 2, 8, 64]
    assert [choose_settings(trained, 2**n, adapt={}).streams for n in (14, 16, 30)] == [1, 2, 64]


def test_probabilities_of_a_model_that_diverged():
    """Guards against a traceback from inside the coder."""
    with pytest.raises(UserError, match="not finite"):
        probabilities(torch.tensor([[0.0, math.nan]]))


def test_digests_name_what_matters(build_model):
    """Guards against a file decoded by a model that merely looks the same: other weights, heads, or shape."""
    one, same, other_layer, other_head = (build_model() for _ in range(4))
    other_layer.transformer.blocks[0].attention.key.bias.data[0] += 1e-6
    other_head.heads.exits["layer2"]["offset1"].bias.data[3] += 1e-3
    models = {model_digest(model) for model in (one, other_layer, other_head, build_model(num_heads=4))}
    assert len(models) == 4 and model_digest(same) == model_digest(one)
    settings = choose_settings(one, 1, streams=2)
    probes = {probe(one, settings), probe(other_head, settings), probe(one, settings.replace(streams=3))}
    probes |= {probe(one, settings.replace(adapt={"rate": rate})) for rate in (0.1, 0.2)}
    assert len(probes) == 5 and probe(same, settings) == probe(one, settings)
    vocabularies = (ByteVocabulary(), CharacterVocabulary("ab"), CharacterVocabulary("ac"))
    assert len(set(map(vocabulary_digest, vocabularies))) == 3


def test_the_environment_names_versions_and_processor():
    """Guards against a file that another version of torch, or another processor, takes for its own."""
    here = environment(torch.device("cpu"))
    assert torch.__version__ in here and "constriction" in here and torch.backends.cpu.get_cpu_capability() in here
    assert len(here.encode()) < 100  # a header of 200 bytes holds it


def test_bf16(build_model):
    """Guards against a cache of another type than the arithmetic, and an autocast that reaches the heads."""
    trained = build_model()
    ids = np.random.default_rng(3).integers(0, 256, 40).astype(np.uint8)
    exact, _ = compressed_nats(trained, ids, streams=2)
    nats, settings = compressed_nats(trained, ids, streams=2, precision="bf16")
    assert settings.precision == "bf16"
    assert nats.sum() == pytest.approx(exact.sum(), rel=0.1) and (nats != exact).any()
