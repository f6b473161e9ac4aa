"""The mixture of a network with counts of the text so far: most tests run its functions uncompiled, as plain Python."""

import importlib.util
import math
import sys
from collections import Counter

import numpy as np
import pytest

import charlm.inference
from charlm.inference import evaluation
from charlm.inference.evaluation import bits_per_character
from tiny import refused

numba = pytest.importorskip("numba", reason="not installed, see requirements-hf.txt")
V, K = 6, 3
ALL = ("heads", "counts", "match")


def load(name: str):
    """A copy of the module."""
    (folder,) = charlm.inference.__path__
    spec = importlib.util.spec_from_file_location(name, f"{folder}/experts.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain():
    """The module without numba's compiler, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", True)
        return load("plain_experts")


def text(steps: int, seed: int = 0) -> np.ndarray:
    """Streams [K, steps] that repeat themselves and each other."""
    generator = np.random.default_rng(seed)
    part = generator.integers(0, V, 13)
    noise = generator.integers(0, V, (K, steps))
    return np.where(generator.random((K, steps)) < 0.2, noise, np.resize(part, (K, steps)))


def network(steps: int, heads: int = 2) -> np.ndarray:
    """Log-probabilities [K, steps, heads, V]."""
    logits = 3 * np.random.default_rng(1).standard_normal((K, steps, heads, V))
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def experts(module, names=ALL, heads: int = 2, streams: int = K):
    return module.Experts(names, V, heads, streams)


def longest_context(made) -> np.ndarray:
    """The distribution that the longest context gives next in the only stream, [V]."""
    made._state.weights_EC[:] = 0
    made._state.weights_EC[1:, : sys.modules[type(made).__module__].STATES] = 1
    return made.predict(uniform())[0]


def uniform(streams: int = 1) -> np.ndarray:
    return np.full((streams, 1, V), -math.log(V))


def costs(made, symbols_KT: np.ndarray, log_p=None) -> np.ndarray:
    log_p = network(symbols_KT.shape[1]) if log_p is None else log_p
    return made.score(log_p, symbols_KT, np.full(symbols_KT.shape, True))


@pytest.mark.parametrize("names", [(), ("heads",), ("counts",), ("match",), ("counts", "match"), ALL])
def test_mixtures_are_distributions(plain, names):
    """Guards against a mixture that gives the true symbol more than its share, or one no chance at all."""
    made, symbols_KT, log_p = experts(plain, names), text(60), network(60)
    for t in range(60):
        p_KV = made.predict(log_p[:, t])
        assert np.abs(p_KV.sum(axis=1) - 1).max() < 1e-9
        assert p_KV.min() >= 2.0**-24
        made.update(symbols_KT[:, t])


def test_an_earlier_cost_never_depends_on_a_later_symbol(plain):
    """Guards against a symbol that is learned, in a weight, a count or a match, before it or its step is scored."""
    symbols_KT = text(30)
    before = costs(experts(plain), symbols_KT)
    for t in range(30):
        for stream in range(K):
            other = symbols_KT.copy()
            other[stream, t] = (other[stream, t] + 1) % V
            after = costs(experts(plain), other)
            others = np.arange(K) != stream
            assert np.array_equal(before[:, :t], after[:, :t])
            assert np.array_equal(before[others, t], after[others, t])
            assert before[stream, t] != after[stream, t]


def test_counts_are_those_of_all_strings(plain):
    """Guards against contexts that share counts, and against ones that streams or a restart tear apart or join."""
    made, symbols_KT = experts(plain), text(40)
    costs(made, symbols_KT)
    made.restart()
    costs(made, text(40, seed=1))
    made.read(text(50, seed=2)[0])
    texts = [(own, 17) for own in [*symbols_KT.tolist(), *text(40, seed=1).tolist()]]
    texts.append((text(50, seed=2)[0].tolist(), plain.KNOWN_LENGTHS))
    wanted = Counter()
    for own, longest in texts:
        for length in range(1, longest + 1):
            wanted.update(tuple(own[end - length : end]) for end in range(length, len(own) + 1))
    found, nodes = {}, made._state.nodes
    waiting = [(plain.ROOT, ())]
    while waiting:
        node, string = waiting.pop()
        child = nodes[node, plain.CHILD]
        while child != plain.NONE:
            waiting.append((child, (*string, int(nodes[child, plain.SYMBOL]))))
            found[waiting[-1][1]] = nodes[child, plain.COUNT]
            child = nodes[child, plain.NEXT]
    assert found == wanted


@pytest.mark.parametrize(
    ("read", "symbol", "probability"),
    [
        ([], 0, 1 / 6),
        ([0], 0, (0.4 + 0.8 / 6) / 1.2),
        ([0], 1, (0.8 / 6) / 1.2),
        # after 0 came 0 once; of two symbols both were 0
        ([0, 0], 0, (0.4 + 0.8 * (1.4 + 0.8 / 6) / 2.2) / 1.2),
        # after 1 nothing came; of three symbols two were 0 and one 1
        ([0, 0, 1], 1, (0.4 + 1.4 / 6) / 3.2),
    ],
)
def test_a_context_s_distribution_by_hand(plain, read, symbol, probability):
    """Guards against a discount or a prior that is given to the wrong context."""
    made = experts(plain, ("counts",), heads=1, streams=1)
    for one in read:
        longest_context(made)
        made.update(np.array([one]))
    assert longest_context(made)[symbol] == pytest.approx(probability, abs=1e-6)


def test_contexts_back_off_like_the_plain_recursion(plain):
    """Guards against features that do not add up to the longest context's distribution."""
    made, symbols = experts(plain, ("counts",), heads=1, streams=1), text(80)[0]

    def distribution(context: list[int], seen: list[int]) -> np.ndarray:
        shorter = distribution(context[1:], seen) if context else np.full(V, 1 / V)
        places = range(len(context), len(seen))
        c = np.bincount([seen[end] for end in places if seen[end - len(context) : end] == context], minlength=V)
        if not c.sum():
            return shorter
        return (np.maximum(c - 0.6, 0) + (0.2 + 0.6 * np.count_nonzero(c)) * shorter) / (c.sum() + 0.2)

    for t, symbol in enumerate(symbols):
        seen = symbols[:t].tolist()
        wanted = distribution(seen[max(0, t - 16) :], seen)
        assert longest_context(made) == pytest.approx(wanted, abs=1e-6)
        made.update(np.array([symbol]))


def test_step_by_step_costs_what_blocks_do(plain):
    """Guards against a block whose last streams have ended, and against a decoder that gets other bits."""
    symbols_KT, log_p = text(20), network(20)
    counts_KT = np.full((K, 20), True)
    counts_KT[1:, -1] = False
    blocks, steps = experts(plain), experts(plain)
    found = [blocks.score(log_p[:, own], symbols_KT[:, own], counts_KT[:, own]) for own in (slice(7), slice(7, 20))]
    for t in range(20):
        A = 1 if t == 19 else K
        p_AV = steps.predict(log_p[:A, t])
        assert np.array_equal(-np.log(p_AV[np.arange(A), symbols_KT[:A, t]]), np.concatenate(found, axis=1)[:A, t])
        steps.update(symbols_KT[:A, t])
    assert not found[1][1:, -1].any()


@pytest.mark.parametrize("names", [("counts",), ("match",)])
def test_what_comes_again_costs_little(plain, names):
    """Guards against counts or matches that are never used, or not shared by streams."""
    part = np.random.default_rng(0).integers(0, V, 150)
    again = np.stack([part] * K)
    again[1:] = np.roll(part, 75)
    made = experts(plain, names, heads=1)
    first, second = (costs(made, again, np.broadcast_to(uniform(), (K, 150, 1, V))) for _ in range(2))
    assert second.mean() < first.mean() / 2 < math.log(V) / 2


def test_a_network_that_is_sure_and_wrong_is_soon_ignored(plain):
    """Guards against weights that do not learn, or learn in the wrong direction."""
    sure = np.full((K, 400, 1, V), math.log(1e-4))
    sure[..., 0] = math.log(1 - 5e-4)
    symbols_KT = np.random.default_rng(0).integers(0, V, (K, 400))
    nats_KT = costs(experts(plain, heads=1), symbols_KT, sure)
    assert nats_KT[:, 0].mean() > 2 * math.log(V)
    assert nats_KT[:, 100:].mean() < 1.1 * math.log(V)


def test_weights_follow_the_gradient(plain):
    """Guards against a step of other weights than those that were mixed, or in another direction."""
    made, symbols_KT, log_p = experts(plain, streams=1), text(31)[:1], network(31)[:1]
    costs(made, symbols_KT[:, :30], log_p[:, :30])

    def cost() -> float:
        return -math.log(made.predict(log_p[:, 30])[0, symbols_KT[0, 30]])

    weights_EC, first = made._state.weights_EC, cost()
    before_EC, slopes_EC = weights_EC.copy(), np.zeros_like(weights_EC)
    for place in np.ndindex(weights_EC.shape):
        weights_EC[place] += 1e-6
        slopes_EC[place] = (cost() - first) / 1e-6
        weights_EC[place] = before_EC[place]
    cost()
    made.update(symbols_KT[:, 30])
    assert weights_EC - before_EC == pytest.approx(-0.02 / 1.03 * slopes_EC, abs=1e-5)
    assert np.count_nonzero(slopes_EC) == 3 * np.count_nonzero(made._state.states_KE >= 0) > 8


def test_a_text_read_before_is_known(plain):
    """Guards against a training split whose counts are lost, or that streams continue."""
    symbols_KT = text(60)
    made = experts(plain)
    made.read(symbols_KT[0])
    log_p = network(60)
    assert costs(made, symbols_KT, log_p).mean() < 0.9 * costs(experts(plain), symbols_KT, log_p).mean()
    assert made.predict(log_p[:, 0]).shape == (K, V)


def test_fixed_experts_learn_nothing_from_what_they_predict(plain):
    """Guards against a static figure whose counts, match or weights have seen the text, or weights of one moment."""
    made, symbols_KT, log_p = experts(plain, ("train",)), text(60), network(60)
    made.read(text(80, seed=3)[0])
    nodes, weights_EC, passed = made._state.nodes.copy(), made._state.weights_EC, []
    for t in range(60):
        made.predict(log_p[:, t])
        made.update(symbols_KT[:, t])
        passed.append(weights_EC.copy())
    made.fix()
    assert weights_EC == pytest.approx(np.mean(passed, axis=0)) != passed[-1]
    fitted_EC = weights_EC.copy()
    first = costs(made, symbols_KT, log_p)
    made.restart()
    assert np.array_equal(costs(made, symbols_KT, log_p), first)
    assert np.array_equal(made._state.nodes, nodes) and np.array_equal(weights_EC, fitted_EC)
    assert (made._state.states_KE[:, 2:] >= 0).any(axis=0).sum() > 5, "counts are asked"


def test_full_memory_stays_right(plain, monkeypatch):
    """Guards against nodes beyond the limit, and distributions that no longer sum to one."""
    monkeypatch.setattr(plain, "MOST_NODES", 50)
    made, symbols = experts(plain, streams=1), np.random.default_rng(0).integers(0, V, 400)
    made.read(symbols)
    costs(made, symbols[None, :50], network(50)[:1])
    assert made._state.used[0] == len(made._state.nodes) == 50
    assert made.predict(network(1)[:1, 0]).sum() == pytest.approx(1, abs=1e-9)


def test_an_unknown_expert_is_refused(plain):
    with refused("experts"):
        experts(plain, ("heads", "oracle"))


def test_without_numba_the_way_out_is_named(monkeypatch):
    """Guards against a traceback where an optional library is missing."""
    monkeypatch.setitem(sys.modules, "numba", None)
    with refused("experts", "charlm\\[counts\\]"):
        load("experts_without_numba")


@pytest.mark.parametrize(("names", "layers"), [(ALL, [1, 2]), (("counts",), [2])])
def test_scores_are_those_of_the_mixture(
    plain, monkeypatch, build_model, build_corpus, letters, brute_force, names, layers
):
    """Guards against log-probabilities of other symbols, streams or layers, and a figure that hides what it mixes."""
    monkeypatch.setitem(sys.modules, "charlm.inference.experts", plain)
    trained, known, ids = build_model(), letters(60, 1), letters(70) // 9
    corpus = build_corpus(ids.tobytes())
    corpus.splits["train"] = build_corpus(known.tobytes()).splits["test"]
    parts_KN, mixture = ids.reshape(2, -1), plain.Experts(names, 256, len(layers), 2)
    log_p_KLNV = np.stack([brute_force(trained, part, 3) for part in parts_KN])
    mixture.read(known)
    log_p_KNHV = log_p_KLNV[:, np.array(layers) - 1].transpose(0, 2, 1, 3)
    nats_KN = mixture.score(log_p_KNHV, parts_KN, np.full(parts_KN.shape, True))
    names = (*names, "train")
    score = bits_per_character(trained, corpus, stride=3, streams=2, experts=names)
    assert score.bits_per_character == pytest.approx(nats_KN.mean() / math.log(2), abs=1e-6)
    nats_KN = -np.take_along_axis(log_p_KLNV[:, 1], parts_KN[..., None].astype(int), axis=2)
    assert score.network == pytest.approx(nats_KN.mean() / math.log(2), abs=1e-6)
    assert (score.experts, score.streams, score.adapt) == (names, 2, None)
    layered = bits_per_character(trained, corpus, stride=3, streams=2, experts=names[:-1], all_layers=True)
    assert layered.layers["2"] == pytest.approx(score.network)
    assert layered.bits_per_character != score.bits_per_character
    learned = bits_per_character(trained, corpus, stride=3, streams=3, experts=names, adapt={"rate": 0.01})
    assert learned.bits_per_character != learned.network != score.network


def test_a_static_score_with_counts_of_the_training_split(
    plain, monkeypatch, build_model, build_corpus, letters, brute_force
):
    """Guards against weights from another text than validation's beginning, or from a network that has adapted."""
    monkeypatch.setitem(sys.modules, "charlm.inference.experts", plain)
    monkeypatch.setattr(evaluation, "FITTED", 30)
    trained, known, fitted, ids = build_model(), letters(60, 1), letters(40, 2), letters(70) // 9
    corpus = build_corpus(ids.tobytes())
    for split, own in {"train": known, "valid": fitted}.items():
        corpus.splits[split] = build_corpus(own.tobytes()).splits["test"]
    mixture = plain.Experts(("train",), 256, 1, 1)
    mixture.read(known)

    def nats(own: np.ndarray) -> np.ndarray:
        return mixture.score(brute_force(trained, own, 3)[None, -1, :, None], own[None], np.full((1, len(own)), True))

    nats(fitted[:30])
    mixture.fix()
    score = bits_per_character(trained, corpus, stride=3, experts=["train"])
    assert score.bits_per_character == pytest.approx(nats(ids).mean() / math.log(2), abs=1e-6)
    learned = bits_per_character(trained, corpus, stride=3, experts=["train"], adapt={"rate": 0.01})
    assert learned.network != score.network


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"experts": ("oracle",)}, "experts"),
        ({"experts": ALL, "batch_size": 2}, "batch_size"),
        ({"experts": ALL, "streams": 0}, "streams"),
    ],
)
def test_options_that_do_not_fit(plain, monkeypatch, build_model, build_corpus, letters, options, option):
    """Guards against a traceback, and options that are silently ignored."""
    monkeypatch.setitem(sys.modules, "charlm.inference.experts", plain)
    with refused(option):
        bits_per_character(build_model(), build_corpus(letters(70).tobytes()), **options)


def test_what_the_script_prints_and_refuses(plain, monkeypatch, run_on_disk, script):
    """Guards against a mixed figure that passes for a static one."""
    monkeypatch.setitem(sys.modules, "charlm.inference.experts", plain)
    code, out, err = script("evaluate", run_on_disk, "--experts=counts,match,train", "--limit=60")
    assert (code, err) == (0, "")
    assert "experts: counts, match, train\n" in out and "by itself" in out
    code, out, err = script("evaluate", run_on_disk, "--experts=train", "--limit=60")
    assert (code, err) == (0, "") and "experts: train (static" in out
    for flags in ("--experts=counts --early-exit", "--experts=oracle"):
        code, out, err = script("evaluate", run_on_disk, *flags.split())
        assert (code, out) == (2, "") and "experts" in err


@pytest.mark.slow
def test_compiled_functions_do_what_they_say(plain):
    """Guards against code that numba compiles to something else, and against runs that differ in a bit."""
    from charlm.inference import experts as compiled

    symbols_KT = text(400)
    found = [costs(experts(compiled), symbols_KT) for _ in range(2)]
    assert np.array_equal(*found)
    assert found[0] == pytest.approx(costs(experts(plain), symbols_KT), abs=1e-9)
    generator = np.random.default_rng(0)
    made, log_p_THV = compiled.Experts(ALL, 256, 2, 1), np.log(generator.dirichlet(np.full(256, 0.1), (3000, 2)) + 1e-9)
    for t, symbol in enumerate(np.resize(generator.integers(0, 256, 700), 3000)):
        if t % 7 == 0:
            assert abs(made.predict(log_p_THV[None, t]).sum() - 1) < 1e-9
            made.update(np.array([symbol]))
