"""A mixture of a network with exact counts of the text so far, which learns while it predicts.

Each string of up to O symbols that was read is a node of a trie, so no two contexts share counts. numba compiles the
functions, without threads and without reordering sums: the same calls give the same bits.

Shapes: K streams, A of which still have symbols, T symbols of a stream, N of a text, H heads, O context lengths from 0
on, E = H + O + 1 experts, V vocabulary, C weights of an expert.
"""

import math
from collections import namedtuple
from collections.abc import Sequence
from typing import get_args

import numpy as np

from charlm.config import UserError
from charlm.config.adapt import ExpertName, fixed
from charlm.inference.scoring import progress_bar

try:
    from numba import njit
except ModuleNotFoundError as error:
    raise UserError("experts: needs numba; pip install 'charlm[counts]'", "experts") from error

LENGTHS = 17
KNOWN_LENGTHS = 12  # of a text that is only counted, so that there is room for a long one
MOST_NODES = 2**28  # of 16 bytes; later strings are not counted
NONE, ROOT = 0, 1  # nodes of a string that was not read, and of the empty one
SYMBOL, COUNT, CHILD, NEXT = range(4)  # columns of a node; its child read last begins a list
DISCOUNT, PRIOR = 0.6, 0.2
FIRST_RATE, LAST_RATE = 0.02, 0.002  # steps of the weights: the first falls with the number of symbols, to the last
LEAST = 2.0**-24  # probability of any symbol: one unit of the range coder
STATES = 18

State = namedtuple(
    "State", "nodes used contexts_KO matches_K runs_K shared_K2 asked_E weights_EC states_KE features_KEV means_KE"
)
"""Everything learned, and what the last prediction saw; its parts are explained where `Experts` makes them."""


class Experts:
    """Predicts symbols from all experts, and then learns them. Streams share all that was learned.

    Experts are the network's heads, the counts after contexts of each length, and the longest match. Each is a
    distribution, and so is the normalised product of p_i^w_i (Mattern 2012, Mixing Strategies in Data Compression). Its
    weights are sums of three, for the expert's state, the last symbol and the longest known context, and follow the
    gradient (Mahoney 2005, Adaptive Weighing of Context Models).
    """

    def __init__(self, names: Sequence[str], vocabulary_size: int, num_heads: int, streams: int):
        """`names` need not have "heads": the network always gives `num_heads` distributions. "train": `read` it.

        `fixed` ones count only what they `read`, and are followed by `fix`.
        """
        if unknown := ",".join(set(names) - set(get_args(ExpertName))):
            raise UserError(f"experts={unknown}: must be some of {', '.join(get_args(ExpertName))}", "experts")
        K, E = streams, num_heads + LENGTHS + 1
        self._counts, self._learns, self._sum_EC = not fixed(names), True, 0.0
        asked = {name: name in names or fixed(names) for name in ("counts", "match")}
        weights_E1 = np.array([[1 / num_heads]] * num_heads + [[0.2]] * LENGTHS + [[0.3]])
        self._state = State(
            nodes=np.zeros((ROOT + 1, 4), np.int32),
            used=np.array([ROOT + 1, 0]),  # nodes, and symbols that weights were learned from
            contexts_KO=np.zeros((K, LENGTHS + 1), np.int32),  # nodes of the last 0 to O symbols
            matches_K=np.zeros(K, np.int64),  # what followed the longest known context the last time, or -1
            runs_K=np.zeros(K, np.int64),  # how many times in a row that was right
            shared_K2=np.zeros((K, 2), np.int64),  # columns of all experts: of the last symbol and the longest context
            asked_E=np.array([True] * num_heads + [asked["counts"]] * LENGTHS + [asked["match"]]),
            weights_EC=np.pad(np.tile(weights_E1, STATES), ((0, 0), (0, vocabulary_size + LENGTHS + 1))),
            states_KE=np.zeros((K, E), np.int64),  # -1: without an opinion
            features_KEV=np.zeros((K, E, vocabulary_size)),
            means_KE=np.zeros((K, E)),  # of the features under the mixture
        )
        self.restart()

    def restart(self) -> None:
        """Begin all streams anew, without context; what was learned stays."""
        self._state.contexts_KO[:] = [ROOT] + [NONE] * LENGTHS
        self._state.runs_K[:] = 0
        self._state.shared_K2[:] = STATES

    def read(self, ids_N: np.ndarray, show_progress: bool = True) -> None:
        """Count the symbols of a text; streams begin anew."""
        self.restart()
        with progress_bar(len(ids_N), "counting", show_progress) as bar:
            for ids_T in np.array_split(ids_N, 1 + len(ids_N) // 2**16):
                self._make_room(len(ids_T))
                _read(self._state, ids_T.astype(np.int64)[:, None], KNOWN_LENGTHS, True)
                bar.update(len(ids_T))
        self.restart()

    def predict(self, log_p_AHV: np.ndarray) -> np.ndarray:
        """Mix the network's distributions, given as logarithms, with the others: [A, V], each at least 2^-24."""
        return _predict(self._state, np.ascontiguousarray(log_p_AHV, np.float64))

    def update(self, symbols_A: np.ndarray) -> None:
        """Learn the symbols that `predict` was about, in the order of the streams."""
        self._make_room(len(symbols_A) * self._counts)
        _update(self._state, np.ascontiguousarray(symbols_A, np.int64), self._counts, self._learns)
        if self._learns and not self._counts:
            self._sum_EC += len(symbols_A) * self._state.weights_EC

    def fix(self) -> None:
        """Learn nothing from now on. Weights become their mean over all updates (Polyak and Juditsky 1992)."""
        self._state.weights_EC[:] = self._sum_EC / self._state.used[1]
        self._learns = False
        self.restart()

    def score(self, log_p_KTHV: np.ndarray, symbols_KT: np.ndarray, counts_KT: np.ndarray) -> np.ndarray:
        """Costs in nats, [K, T], step by step; 0 where `counts_KT` is false, as it may be in the last streams."""
        nats_KT = np.zeros(symbols_KT.shape)
        for t, num_active in enumerate(counts_KT.sum(axis=0)):
            symbols_A = symbols_KT[:num_active, t]
            p_AV = self.predict(log_p_KTHV[:num_active, t])
            nats_KT[:num_active, t] = -np.log(p_AV[np.arange(num_active), symbols_A])
            self.update(symbols_A)
        return nats_KT

    def _make_room(self, num_symbols: int) -> None:
        nodes = self._state.nodes
        needed = min(int(self._state.used[0]) + num_symbols * LENGTHS, MOST_NODES) - len(nodes)
        if needed > 0:
            more = max(needed, min(len(nodes), MOST_NODES - len(nodes)))
            grown = np.zeros((len(nodes) + more, 4), np.int32)  # np.pad would touch all of it
            grown[: len(nodes)] = nodes
            self._state = self._state._replace(nodes=grown)


@njit
def _predict(state, log_p_AHV):
    A, H, V = log_p_AHV.shape
    p_AV = np.empty((A, V))
    for a in range(A):
        states_E, features_EV, p_V = state.states_KE[a], state.features_KEV[a], p_AV[a]
        features_EV[:H] = np.maximum(log_p_AHV[a], math.log(LEAST))
        states_E[:H] = min(int(-3 * features_EV[H - 1].max()), 7)
        match = _ask_counts(state.nodes, state.contexts_KO[a, :-1], p_V, features_EV[H:-1], states_E[H:-1])
        state.matches_K[a] = match
        if match >= 0:
            features_EV[-1] = 0.0
            features_EV[-1, match] = math.log(V)
            states_E[-1] = min(int(math.log2(1 + state.runs_K[a])), STATES - 1)
        state.shared_K2[a, 1] = STATES + V + (states_E[H:-1] >= 0).sum()
        states_E[:] = np.where(state.asked_E, states_E, -1)
        p_V[:] = 0.0
        for i, own in enumerate(states_E):
            if own >= 0:
                weights_C, shared_2 = state.weights_EC[i], state.shared_K2[a]
                p_V += (weights_C[own] + weights_C[shared_2[0]] + weights_C[shared_2[1]]) * features_EV[i]
        p_V[:] = np.exp(p_V - p_V.max())
        p_V[:] = p_V * ((1 - V * LEAST) / p_V.sum()) + LEAST
        for i, own in enumerate(states_E):
            if own >= 0:
                state.means_KE[a, i] = (p_V * features_EV[i]).sum()
    return p_AV


@njit
def _ask_counts(nodes, contexts_O, shares_V, features_OV, states_O):
    """Fill in what each context says; returns what followed the longest known one the last time, or -1.

    Counts c, of sum C and number U, give each symbol p_n = (max(c - discount, 0) + (prior + discount U) p_(n-1)) /
    (C + prior) after a context of length n (Teh 2006, section 4), and p_(-1) is uniform. A feature is log p_n / p_(n-1)
    less its value for symbols without counts, so that weights of 1 give the longest context's p_n.
    """
    states_O[:] = -1
    shares_V[:] = 1.0 / len(shares_V)  # p_n / scale
    scale, match = 1.0, -1
    for order, context in enumerate(contexts_O):
        child = nodes[context, CHILD]
        if child == NONE:
            break
        match = nodes[child, SYMBOL]
        total = distinct = most = 0
        while child != NONE:
            count = nodes[child, COUNT]
            total, distinct, most = total + count, distinct + 1, max(most, count)
            child = nodes[child, NEXT]
        scale *= (PRIOR + DISCOUNT * distinct) / (total + PRIOR)
        features_OV[order] = 0.0
        child = nodes[context, CHILD]
        while child != NONE:
            symbol = nodes[child, SYMBOL]
            own = (nodes[child, COUNT] - DISCOUNT) / (total + PRIOR) / scale
            features_OV[order, symbol] = math.log1p(own / shares_V[symbol])
            shares_V[symbol] += own
            child = nodes[child, NEXT]
        sure = 2 if distinct == 1 else 1 if 2 * most > total else 0
        states_O[order] = 3 * min(int(math.log2(total)), 5) + sure
    return match


@njit
def _update(state, symbols_A, counts, learns):
    rate = learns * max(LAST_RATE, FIRST_RATE / (1 + state.used[1] / 1000))
    state.used[1] += len(symbols_A)
    for a, symbol in enumerate(symbols_A):
        for i, own in enumerate(state.states_KE[a]):
            if own >= 0:
                for column in (own, state.shared_K2[a, 0], state.shared_K2[a, 1]):
                    state.weights_EC[i, column] += rate * (state.features_KEV[a, i, symbol] - state.means_KE[a, i])
        state.runs_K[a] = state.runs_K[a] + 1 if state.matches_K[a] == symbol else 0
        state.shared_K2[a, 0] = STATES + symbol
    _read(state, symbols_A.reshape(1, -1), LENGTHS, counts)


@njit
def _read(state, symbols_TA, lengths, counts):
    for symbols_A in symbols_TA:
        for a, symbol in enumerate(symbols_A):
            contexts_O, context = state.contexts_KO[a], ROOT
            for order in range(1, lengths + 1):
                child = _count(state.nodes, state.used, context, symbol, counts)
                context, contexts_O[order] = contexts_O[order], child


@njit
def _count(nodes, used, context, symbol, counts):
    """The node of a symbol after a context; if it `counts`, count it and begin the context's list with it."""
    child, before = nodes[context, CHILD], NONE
    while child != NONE and nodes[child, SYMBOL] != symbol:
        child, before = nodes[child, NEXT], child
    if not counts:
        return child
    if child == NONE:
        if context == NONE or used[0] == len(nodes):
            return NONE
        child = used[0]
        used[0] += 1
        nodes[child, SYMBOL] = symbol
    elif before != NONE:
        nodes[before, NEXT] = nodes[child, NEXT]
    nodes[child, COUNT] += 1
    if nodes[context, CHILD] != child:
        nodes[child, NEXT] = nodes[context, CHILD]
        nodes[context, CHILD] = child
    return child
