"""Placements that MoETuner's are compared with. All of them give every rank of each layer as many experts (one more or
less where they do not divide), and the same at every call.

``exflow`` is the integer program of ExFlow (arXiv 2401.08383) in our words: min of the tokens whose next expert is on
another rank, with E / G experts of each layer on every rank. Small cases go to HiGHS; its linear relaxation is worth
nothing (every expert spread evenly over the ranks), so larger ones are searched: annealing, then each layer in turn
placed optimally between its neighbours, an assignment problem.
"""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
from scipy.optimize import linear_sum_assignment

from methods.moetuner import joint
from methods.moetuner.balance import Stage
from methods.moetuner.highs import Program
from methods.moetuner.objective import Problem, crossings, random_owner

MAX_BINARIES = 96  # of ExFlow's program on HiGHS
ROUNDS = 3


def contiguous(problem: Problem) -> np.ndarray:
    """Experts in index order: Megatron-LM's."""
    profile = problem.profile
    return np.tile(np.arange(profile.num_experts) * problem.num_ranks // profile.num_experts, (profile.num_layers, 1))


def chance(problem: Problem, seed: int = 0) -> np.ndarray:
    """One random placement."""
    return random_owner(problem, np.random.default_rng([seed, 1]))


def greedy(problem: Problem) -> np.ndarray:
    """Experts by falling load, each to the rank that carries least and has a free slot: EPLB without replicas."""
    from methods.moetuner import kernels  # numba takes its time to import

    load = problem.profile.load.astype(np.float64)
    return np.stack([kernels.largest_first(layer, problem.num_ranks, True) for layer in load])


def exflow(problem: Problem, gap: float = 0.025, time_limit_s: float = 60.0, *, proven: bool = True) -> Stage:
    """Owner, tokens that change ranks, and a bound of it (0 where no program ran). ``proven``: small cases go to
    HiGHS; else the search must do."""
    began = time.perf_counter()
    flat = dataclasses.replace(problem, cost=1.0 - np.eye(problem.num_ranks))
    owner, best = contiguous(problem), math.inf
    for seed in range(ROUNDS):
        start = random_owner(flat, np.random.default_rng(seed))
        whole = max(1.0, float(flat.profile.flow.sum()))
        found = joint.search(flat, start, (0.0, 0.0, 1 / whole), 0.1, False, seed)
        found = _each_between_its_neighbours(flat, found)
        if (value := leaving(flat, found)) < best:
            owner, best = found, value
        if time.perf_counter() - began > time_limit_s:
            break
    bound, ended = 0.0, "search"
    if proven and owner.size * problem.num_ranks <= MAX_BINARIES:
        left = time_limit_s - (time.perf_counter() - began)
        owner, bound, ended = _program(flat, owner, best, gap, left)
        best = leaving(flat, owner)
    return Stage(owner, best, bound, ended, time.perf_counter() - began)


def leaving(problem: Problem, owner: np.ndarray) -> float:
    """Tokens whose next expert is on another rank."""
    between = crossings(problem.profile, owner, problem.num_ranks)
    return float(between.sum() - np.trace(between, axis1=1, axis2=2).sum())


def _each_between_its_neighbours(problem: Problem, start: np.ndarray) -> np.ndarray:
    """Until no layer can be placed better with the others as they are."""
    owner, flow, num_ranks = start.copy(), problem.profile.flow, problem.num_ranks
    value = leaving(problem, owner)
    while True:
        for layer in range(len(owner)):
            together = np.zeros((owner.shape[1], num_ranks))  # tokens that stay, of each expert on each rank
            if layer:
                np.add.at(together.T, owner[layer - 1], flow[layer - 1].astype(np.float64))
            if layer + 1 < len(owner):
                np.add.at(together.T, owner[layer + 1], flow[layer].T.astype(np.float64))
            slots = np.sort(owner[layer])
            owner[layer] = slots[linear_sum_assignment(-together[:, slots])[1]]
        if (after := leaving(problem, owner)) >= value:
            return owner
        value = after


def _program(
    problem: Problem, start: np.ndarray, value: float, gap: float, time_limit_s: float
) -> tuple[np.ndarray, float, str]:
    """x[l, e, g], and for every pair of experts that share tokens s >= x - x' on each rank: 1 if they lie apart.
    Symmetry: expert 0 of layer 0 is on the rank that the start has it on."""
    flow, num_ranks = problem.profile.flow, problem.num_ranks
    x = np.arange(start.size * num_ranks).reshape(*start.shape, num_ranks)
    layer, e1, e2 = np.nonzero(flow)
    split = x.size + np.arange(len(layer))
    cost = np.concatenate([np.zeros(x.size), flow[layer, e1, e2]])
    program = Program(cost, np.arange(len(cost)) < x.size, np.ones(len(cost)))
    program.row(x[0, 0, start[0, 0]], 1.0, 1, 1)
    for of_layer, owners in zip(x, start, strict=True):
        for expert in of_layer:
            program.row(expert, 1.0, 1, 1)
        for rank, count in enumerate(np.bincount(owners, minlength=num_ranks)):
            program.row(of_layer[:, rank], 1.0, count, count)
    for i in range(len(layer)):
        for rank in range(num_ranks):
            pair = np.array([split[i], x[layer[i], e1[i], rank], x[layer[i] + 1, e2[i], rank]])
            program.row(pair, np.array([1.0, -1.0, 1.0]), 0, np.inf)
    answer = program.solve(gap, time_limit_s, value)
    owner = start
    if answer.x is not None:
        found = answer.x[x.ravel()].reshape(x.shape).argmax(2)
        owner = found if leaving(problem, found) < value else start
    return owner, max(0.0, answer.bound), answer.ended
