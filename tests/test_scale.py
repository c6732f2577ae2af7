"Fits to more rows than a dense solver takes: sources, processes, a cluster, going on, bad input."

import os
import signal
import socket
import subprocess
import sys
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from agop_book.agop import agop
from agop_book.directions import cuts
from agop_book.growing import Growth, softened
from agop_book.iterative import Nystrom, NystromSolver
from agop_book.kernels import Gaussian, L1Laplace, Laplace, Matern32
from agop_book.nystrom import Falkon
from agop_book.partfit import Sample
from agop_book.partials import Block, LocalParts
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.rowstream import rows_of
from agop_book.solvers import CholeskySolver, rounds
from agop_book.structures import Diagonal, Full
from agop_book.tiles import Tiles

SMALL = Nystrom(sample=1200, centers=300)


def table(n=1500, d=5, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(np.float32)
    y = X[:, 0] * X[:, 1] + np.abs(X[:, 2]) + 0.1 * rng.standard_normal(n).astype(np.float32)
    return X, y


def truth(X):
    return X[:, 0] * X[:, 1] + np.abs(X[:, 2])


def model(**changes):
    return RFMRegressor(**{"solver": SMALL, "random_state": 0, "n_iter": 1, **changes})


@cache
def fitted():
    return model().fit(*table())


# The solver


@pytest.mark.parametrize("kernel", [Laplace(3.0), Gaussian(2.0), Matern32(3.0), L1Laplace(5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_falkon_is_the_least_squares_solution(kernel, dtype):
    X, y = (torch.from_numpy(a).double() for a in table(500, 4))
    w = 0.5 + torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Y = torch.stack([y, y * y], 1)
    K = kernel(X, X[:50])
    exact = torch.linalg.solve(K.T @ (w[:, None] * K) + 0.1 * K[:50], K.T @ (w[:, None] * Y))
    block = Block(*(t.to(dtype) for t in (X, Y, w)))
    parts = LocalParts(block.pieces(123))
    squares = (w[:, None] * Y**2).sum(0)
    solver = Falkon(Tiles(kernel, block.x[:50]), parts, float(w.sum()), squares, 0.1)
    *_, last = solver.steps(solver.start(), 1e-9, 200)
    off = K @ solver.coef(last.beta) - K @ exact
    assert off.abs().max() < (1e-3 if dtype == torch.float64 else 1e-2) * Y.abs().max()
    again = solver.start(solver.coef(last.beta))
    assert again.residual < 1e-7        # it goes on where it was


def test_rounding_says_when_single_precision_is_not_enough():
    X, y = (torch.from_numpy(a) for a in table(2000, 3))
    Y = (y - y.mean())[:, None]
    kernel, m = Matern32(6.0), 500
    K = kernel(X.double(), X[:m].double())
    errors, said = [], []
    for reg in (10.0, 1e-5):
        block = Block(X, Y, None)
        solver = Falkon(Tiles(kernel, X[:m]), LocalParts([block]), 2000.0, (Y**2).sum(0), reg)
        *_, last = solver.steps(solver.start(), 1e-6, 100)
        a = solver.coef(last.beta)
        exact = torch.linalg.solve(K.T @ K + reg * K[:m], K.T @ Y.double())
        errors.append(float((K @ a - K @ exact).square().mean() / Y.square().mean()))
        said.append(solver.rounding(a))
    assert said[0] < 1e-4 < said[1] and errors[0] < 1e-4, (said, errors)
    double = Block(X.double(), Y.double(), None)
    tiles = Tiles(kernel, double.x[:m])
    solver = Falkon(tiles, LocalParts([double]), 2000.0, (Y**2).sum(0), 1e-5)
    assert solver.rounding(exact) < 1e-9


@pytest.mark.parametrize("structure", [Full(), Diagonal()])
def test_with_all_rows_as_centres_the_rounds_are_the_dense_ones(structure):
    X, y = (torch.from_numpy(a).double() for a in table(300, 4))
    options = ([1e-2], structure, True, 0.5 + torch.rand(300, dtype=torch.float64))
    exact = list(rounds(CholeskySolver(Laplace(3.0), X, y[:, None], *options), 2))
    near = Nystrom(error=1e-9, centers=300)(Laplace(3.0), X, y[:, None], *options)
    assert isinstance(near, NystromSolver)
    for a, b in zip(exact, rounds(near, 2)):
        assert (a.fitted - b.fitted).abs().max() < 3e-3
        if a.M is not None:
            assert (a.M - b.M).abs().max() < 1e-2 * a.M.abs().max()


# M on growing parts


def grown(metric, n=6000, d=20):
    X, y = (torch.from_numpy(a) for a in table(n, d))
    Y = (y - y.mean())[:, None]
    held = Block(X[-500:], Y[-500:], torch.ones(500))
    sample = Sample(X[:-500], Y[:-500], torch.ones(n - 500), held)
    structure = Full() if metric == "full" else Diagonal()
    growth = Growth(sample, Laplace(1.0), structure, 1e-2, 3, 1e-3, 1000)
    for M in growth.rounds(structure.identity(X)):
        continue
    growth.cut(M)
    return growth


@pytest.mark.parametrize("metric", ["full", "diag"])
def test_growing_parts_find_the_three_directions(metric):
    growth = grown(metric)
    M = growth.best.M
    assert growth.best.machine.compared_centers.shape[1] == 3
    inside = M[:3].sum() / M.sum() if M.ndim == 1 else M[:3, :3].trace() / M.trace()
    assert inside > 0.98
    assert growth.best.loss < 0.03 * growth.sample.variance()


def test_cuts_keep_what_is_above_a_gap():
    V = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    M = (V * torch.tensor([1.0, 0.8, 0.01, 0.009, 0.008, 0.007])) @ V.T
    as_is, equal = cuts(M)[0]
    assert torch.allclose(equal, V[:, :2] @ V[:, :2].T, atol=1e-5)
    assert torch.allclose(as_is, (V[:, :2] * torch.tensor([1.0, 0.8])) @ V[:, :2].T, atol=1e-5)
    assert cuts(torch.ones(4)) == []
    assert torch.isclose(softened(M).trace(), torch.tensor(1.0))


# Sources


def test_every_source_gives_the_same_fit(tmp_path):
    X, y = table()
    wanted = fitted().predict(X[:50])
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    frame = pd.DataFrame(X, columns=list("abcde")).assign(y=y)
    frame.iloc[:700].to_parquet(tmp_path / "part-0.parquet")
    frame.iloc[700:].to_parquet(tmp_path / "part-1.parquet")

    def batches():
        for start in range(0, 1500, 400):
            yield X[start : start + 400], y[start : start + 400]

    for rows in (rows_of(mapped, y, batch_size=333), rows_of(batches)):
        assert np.allclose(model().fit(rows).predict(X[:50]), wanted, atol=1e-4)
    stored = model().fit(rows_of(str(tmp_path / "part-*.parquet"), target="y"))
    assert np.allclose(stored.predict(frame[list("abcde")].iloc[:50]), wanted, atol=1e-4)
    assert list(stored.feature_names_in_) == list("abcde")


def test_blocks_that_do_not_fit_are_made_anew(monkeypatch):
    X, y = table()
    monkeypatch.setattr(RFMRegressor, "_parts", _streamed)
    assert np.allclose(model().fit(X, y).predict(X[:50]), fitted().predict(X[:50]), atol=1e-4)


def _streamed(self, rows, n, prepare, sample):
    from agop_book.preparing import StreamedBlocks
    return LocalParts([StreamedBlocks(rows, prepare)])


def test_history_says_what_was_done():
    history = fitted().history_
    assert set(history["stage"]) >= {"search", "M", "bandwidth", "reg", "centers", "all rows"}
    last = history.iloc[-1]
    assert (last["rows"], last["centers"]) == (1500, 300)
    assert last["residual"] <= 2.5e-4 and last["train_score"] > 0.95
    X, _ = table(seed=1)
    assert np.corrcoef(fitted().predict(X), truth(X))[0, 1] ** 2 > 0.97


def test_auto_takes_the_dense_solver_for_few_rows():
    small = RFMRegressor(random_state=0, n_iter=1).fit(*table(400))
    assert "stage" not in small.history_
    assert RFMRegressor().solver == "auto"
    X, y = table(400)
    by_batches = RFMRegressor(random_state=0, n_iter=1).fit(rows_of(X, y, batch_size=90))
    assert np.array_equal(by_batches.predict(X), small.predict(X))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    X, _ = table()
    path = tmp_path / "model.safetensors"
    fitted().save(path)
    loaded = RFMRegressor.load(path)
    assert np.array_equal(loaded.predict(X[:50]), fitted().predict(X[:50]))
    assert loaded.solver == SMALL
    G = agop(loaded, X[:40].astype(np.float64))
    assert np.allclose(G, agop(loaded, X[:40].astype(np.float64), method="differences"),
                       atol=2e-2 * np.abs(G).max())


def test_classes_of_words_and_weights():
    X, _ = table(1500)
    y = np.where(X[:, 0] * X[:, 1] > 0, "yes", "no").astype(object)
    y[:30] = "rare"
    found = RFMClassifier(solver=SMALL, random_state=0, n_iter=1, class_weight="balanced")
    found.fit(X, y, sample_weight=np.full(1500, 2.0))
    assert found.classes_.tolist() == ["no", "rare", "yes"]
    assert np.allclose(found.predict_proba(X[:20]).sum(1), 1)
    Z, _ = table(seed=1)
    right = found.predict(Z) == np.where(Z[:, 0] * Z[:, 1] > 0, "yes", "no")
    assert right.mean() > 0.7


# Interrupted, and gone on


def test_an_interrupted_fit_goes_on(tmp_path, monkeypatch):
    X, y = table()
    path = tmp_path / "fit.safetensors"
    passes = []

    def interrupted(self, step):
        passes.append(step.number)
        if self.total > 1400 and step.number == 1: raise KeyboardInterrupt
        return following(self, step)

    following = Falkon.next
    monkeypatch.setattr(Falkon, "next", interrupted)
    broken = model()
    with pytest.raises(KeyboardInterrupt):
        broken.fit(X, y, checkpoint=path)
    assert path.exists() and len(broken.predict(X[:3])) == 3       # it keeps what it has
    with pytest.raises(ValueError, match="n_iter='1', and this one has n_iter='2'"):
        model(n_iter=2).fit(X, y, checkpoint=path)
    with pytest.raises(ValueError, match="rows=1500, and this one has rows=1000"):
        model().fit(X[:1000], y[:1000], checkpoint=path)
    monkeypatch.setattr(Falkon, "next", following)
    again = model().fit(X, y, checkpoint=path)
    assert np.allclose(again.predict(X[:50]), fitted().predict(X[:50]), atol=1e-4)
    assert not path.exists()


def test_interrupted_while_m_is_learned(tmp_path, monkeypatch):
    X, y = table()
    path = tmp_path / "fit.safetensors"

    def stop(self, M, search):
        raise KeyboardInterrupt

    monkeypatch.setattr(Growth, "cut", stop)
    with pytest.raises(KeyboardInterrupt):
        model().fit(X, y, checkpoint=path)
    monkeypatch.undo()
    again = model().fit(X, y, checkpoint=path)
    assert (again.history_["stage"] == "search").sum() == (
        fitted().history_["stage"] == "search").sum()
    assert np.corrcoef(again.predict(X), truth(X))[0, 1] ** 2 > 0.97


# Bad input


def test_bad_rows_are_named():
    X, y = table()
    wrong = y.copy()
    wrong[1203] = np.nan
    with pytest.raises(ValueError, match="1,?203"):
        model().fit(X, wrong)
    wrong = X.copy()
    wrong[1203, 2] = np.inf
    with pytest.raises(ValueError, match="1,?203"):
        model().fit(wrong, y)
    with pytest.raises(ValueError, match="bandwidth='auto'"):
        model(bandwidth=3.0).fit(rows_of(X, y))
    with pytest.raises(ValueError, match="y is missing"):
        model().fit(rows_of(X))
    with pytest.raises(ValueError, match="generator"):
        model().fit(rows_of((X, y) for _ in range(2)))
    with pytest.raises(ValueError, match="error must"):
        Nystrom(error=-1)
    with pytest.raises(ValueError, match="solver must be 'auto'"):
        RFMRegressor(solver="lu").fit(X[:50], y[:50])


def test_a_memory_limit_too_small_for_any_solver():
    X, y = table()
    with pytest.raises(MemoryError, match="larger memory_limit"):
        model(solver=Nystrom(sample=1200), memory_limit=3e5).fit(X, y)


def test_categories_far_from_their_median():
    "The last solve and the machine have one origin; with 0 and 1 the median is not the mean."
    X, y = table()
    frame = pd.DataFrame(X[:, :4], columns=list("abcd"))
    frame["e"] = pd.Categorical(np.where(np.arange(1500) % 10, "often", "rare"))
    y = y + 3 * (np.arange(1500) % 10 == 0)
    found = model().fit(frame, y)
    assert np.isclose(found.score(frame, y), found.history_.iloc[-1]["train_score"], atol=1e-3)


def test_a_missing_number_is_a_value():
    X, y = table()
    X = X.copy()
    X[::7, 3] = np.nan
    found = model().fit(X, y)
    assert np.isfinite(found.predict(X)).all()


# Many processes

WORKER = """
import sys, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from test_scale import SMALL, model, table
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, (X, y) = dist.get_rank(), table()
mine = slice(0, 600) if rank == 0 else slice(600, None)
found = model(solver=replace(SMALL, together=True)).fit(X[mine], y[mine])
if rank == 1: torch.save([torch.from_numpy(found.predict(X[:50]))], sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_are_one(two_processes):
    found, = torch.load(two_processes(WORKER), weights_only=True)
    X, _ = table()
    assert np.abs(found.numpy() - fitted().predict(X[:50])).max() < 1e-4


WORDS = """
import sys, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from test_scale import SMALL, classifier, kinds
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, (X, y) = dist.get_rank(), kinds()
mine = y == "high" if rank == 0 else y != "high"
found = classifier(solver=replace(SMALL, together=True)).fit(X[mine], y[mine])
right = found.classes_.tolist() == ["high", "low", "medium"]
if rank == 1: torch.save([torch.tensor(right), torch.tensor(found.score(X, y))], sys.argv[1])
dist.destroy_process_group()
"""


def kinds():
    X, y = table()
    return X, np.array(["low", "medium", "high"])[np.digitize(y, [0.0, 1.0])]


def classifier(**changes):
    return RFMClassifier(**{"solver": SMALL, "random_state": 0, "n_iter": 1, **changes})


def test_processes_may_have_words_of_their_own(two_processes):
    right, score = torch.load(two_processes(WORDS), weights_only=True)
    X, y = kinds()
    assert right and abs(float(score) - classifier().fit(X, y).score(X, y)) < 0.02


FRAMES = """
import sys, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from test_scale import SMALL, framed, model
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, (X, y) = dist.get_rank(), framed()
mine = slice(0, 600) if rank == 0 else slice(600, None)
mine = X[mine].assign(e=X["e"][mine].cat.remove_unused_categories()), y[mine]
assert set(mine[0]["e"].cat.categories) != set(X["e"].cat.categories)
found = model(solver=replace(SMALL, together=True)).fit(*mine)
wrong = {"columns": (X.rename(columns={"a": "A"}), X), "width": (X.drop(columns="a"), X),
         "categories": (X.drop(columns="e").assign(e=0.0), X)}
said = []
for name, parts in wrong.items():
    try:
        model(solver=replace(SMALL, together=True)).fit(parts[rank], y)
    except ValueError as error:
        said.append(f"have {name} " in str(error) and "those of process 1" in str(error))
if rank == 1:
    torch.save([torch.from_numpy(found.predict(X[:50])), torch.tensor(said)], sys.argv[1])
dist.destroy_process_group()
"""


def framed():
    "A frame whose first rows have other categories than the last, and holes."
    X, y = table()
    frame = pd.DataFrame(X, columns=list("abcdf"))
    frame.iloc[7::50] = np.nan
    kinds = np.where(np.arange(1500) % 3, "often", np.where(np.arange(1500) < 600, "early", "late"))
    return frame.assign(e=pd.Categorical(kinds)), y + 2 * (kinds == "often")


def test_processes_may_have_categories_of_their_own_but_not_columns(two_processes):
    found, said = torch.load(two_processes(FRAMES), weights_only=True)
    X, y = framed()
    assert np.abs(found.numpy() - model().fit(X, y).predict(X[:50])).max() < 1e-4
    assert said.tolist() == [True] * 3


RESUMING = """
import sys, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from pathlib import Path
from agop_book.growing import Growth
from agop_book.nystrom import Falkon
from test_scale import SMALL, model, table
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, (X, y) = dist.get_rank(), table()
mine = slice(0, 600) if rank == 0 else slice(600, None)
path = Path(sys.argv[1]).with_name("fit.safetensors")

def fit():
    return model(solver=replace(SMALL, together=True)).fit(X[mine], y[mine], checkpoint=path)

def broken(cls, name, at):
    "A call of the method fails in the second process."
    whole, calls = getattr(cls, name), []
    def method(self, *args):
        calls.append(1)
        if rank == 1 and len(calls) == at: raise OSError("no disk")
        return whole(self, *args)
    setattr(cls, name, method)
    try:
        fit()
    except (OSError, RuntimeError) as error:
        assert path.exists() and "process 1" in f"{error} process {rank}"
    else:
        raise AssertionError("it should have failed")
    setattr(cls, name, whole)

broken(Growth, "cut", 1)
type(model())._run_search = None       # from here on there is no search any more
broken(Falkon, "steps", 12)
found = fit()
dist.barrier()      # the first process removes the file
assert not path.exists()
if rank == 1: torch.save([torch.from_numpy(found.predict(X[:50]))], sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_go_on_where_they_were(two_processes):
    found, = torch.load(two_processes(RESUMING), weights_only=True)
    X, _ = table()
    assert np.abs(found.numpy() - fitted().predict(X[:50])).max() < 1e-3


DYING = """
import os, signal, sys, torch, torch.distributed as dist
from agop_book.partials import LocalParts, Block
dist.init_process_group("gloo")
parts = LocalParts([Block(torch.ones(2, 1), torch.ones(2, 1), None)], together=True)
for i in range(100):
    if i == 5 and dist.get_rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    parts.sum(lambda block: block.x.double().sum()[None])
"""


def test_a_killed_process_is_named_by_the_others():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [subprocess.Popen([sys.executable, "-c", DYING], stderr=subprocess.PIPE, text=True,
                                  env=os.environ | settings | {"RANK": str(rank)})
                 for rank in range(2)]
    _, said = processes[0].communicate(timeout=60)
    assert processes[1].wait(60) == -signal.SIGKILL
    assert processes[0].returncode == 1
    assert "process 1 of 2 has died" in said


# A cluster


def test_a_cluster_is_one_machine():
    da = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")
    X, y = table()
    A, b = da.from_array(X, chunks=(400, 5)), da.from_array(y, chunks=400)
    without = model().fit(rows_of(A, b)).predict(X[:50])
    options = dict(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None)
    with distributed.Client(**options):
        found = model().fit(A, b)
    assert np.allclose(found.predict(X[:50]), fitted().predict(X[:50]), atol=1e-4)
    assert np.allclose(without, fitted().predict(X[:50]), atol=1e-4)


def test_a_worker_that_fails_is_told():
    da = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")
    X, y = table()
    wrong = y.copy()
    wrong[1203] = np.inf
    with distributed.Client(n_workers=1, threads_per_worker=1, processes=False,
                            dashboard_address=None):
        with pytest.raises(ValueError, match="1,?203"):
            model().fit(da.from_array(X, chunks=(400, 5)), da.from_array(wrong, chunks=400))
