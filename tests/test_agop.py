"The operator against brute force, across families, devices, processes and bad input."
import math
import os
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agop_book import memory
from agop_book.accumulator import AGOP
from agop_book.agop import Sketch, agop
from agop_book.matrices import cosine, matrix_power, pearson, top_directions
from agop_book.differences import choose_steps, differences
from agop_book.jacobians import pullbacks, random_signs
from agop_book.kernels import NTK, Gaussian, Laplace, Matern52
from agop_book.machines import KernelMachine
from agop_book.rfm import RFMRegressor

f64 = torch.float64
quick = settings(max_examples=15, deadline=None)


def normal(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(d=6, c=3, width=16, seed=0, dtype=f64):
    W, V = normal(d, width, seed=seed, dtype=dtype), normal(width, c, seed=seed + 1, dtype=dtype)
    return lambda x: torch.tanh(x.flatten(1) @ W) @ V


def brute(f, x, center=False, diag=False):
    J = torch.func.vmap(torch.func.jacrev(lambda r: f(r[None])[0]))(x).reshape(len(x), -1, x[0].numel())
    J = J - J.mean(0) if center else J
    A = torch.einsum("ncd,nce->de", J, J) / len(x)
    return A.diagonal() if diag else A


# exact -----------------------------------------------------------------------------------------------------------------

@quick
@given(n=st.integers(2, 9), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), c=st.integers(1, 7), center=st.booleans(), diag=st.booleans(),
       chunk=st.integers(1, 8), batch=st.integers(1, 9))
def test_any_shape_chunk_and_batch(n, shape, c, center, diag, chunk, batch):
    x = normal(n, *shape, seed=n)
    f = mlp(math.prod(shape), c)
    A = agop(f, x, center=center, diag=diag, chunk=chunk, batch_size=batch)
    assert A.shape == ((x[0].numel(),) if diag else (x[0].numel(),) * 2)
    assert (A - brute(f, x, center, diag)).abs().max() < 1e-10


@pytest.mark.parametrize("center", [False, True])
def test_outputs_of_any_shape(center):
    x, W = normal(7, 5), normal(5, 12)
    g = lambda x: torch.sin(x @ W)
    assert torch.allclose(agop(lambda x: g(x).reshape(-1, 3, 2, 2), x, center=center), agop(g, x, center=center), atol=1e-12)
    assert torch.allclose(agop(lambda x: g(x)[:, 0], x, center=center), agop(lambda x: g(x)[:, :1], x, center=center), atol=1e-12)


def test_rotation():
    R, x, f = torch.linalg.qr(normal(6, 6)).Q, normal(20, 6), mlp()
    assert torch.allclose(agop(lambda x: f(x @ R.T), x), R.T @ agop(f, x @ R.T) @ R, atol=1e-11)


def test_merge_equals_one_pass_and_large_means():
    J = normal(60, 4, 5) + 1e7
    spread = J - J.mean(0)
    expected = torch.einsum("ncd,nce->de", spread, spread) / 60
    parts = [AGOP(center=True).update(p) for p in J.split([1, 20, 9, 30])]
    total = parts[0] + parts[1] + AGOP(center=True) + (parts[2] + parts[3])
    assert total.n == 60 and torch.allclose(total.matrix, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose((AGOP(center=True) + parts[1]).matrix, parts[1].matrix)
    assert parts[0].n == 1                                        # + leaves its operands alone


def test_more_centred_outputs_than_memory_holds(monkeypatch):
    "The mean Jacobian is the one thing that grows with the outputs."
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 2**18)
    x, W = normal(2, 50), normal(50, 1000)
    def f(x): return torch.tanh(x @ W)
    with pytest.raises(MemoryError, match="mean Jacobian .* 50 features.*Pass probes"):
        AGOP(center=True).update(pullbacks(f, x))
    assert AGOP(center=True, probes=4).update(pullbacks(f, x, random_signs(4, torch.Generator(), fixed=True))).n == 2


def test_memory_does_not_grow_with_outputs():
    x = normal(512, 1024, dtype=torch.float32)              # 2 MiB: 32 outputs fit the budget
    W = normal(1024, 100, dtype=torch.float32)
    sizes = [g.nbytes for g in pullbacks(lambda x: x @ W, x)]
    assert max(sizes) <= 2**26 and sum(sizes) == 100 * x.nbytes


def test_operation_that_cannot_be_batched():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return 2 * x
        @staticmethod
        def backward(ctx, g): return torch.as_tensor(2 * g.numpy())
    x = normal(5, 3)
    assert torch.allclose(agop(Twice.apply, x), 4 * torch.eye(3, dtype=f64))


def test_contexts_and_side_effects():
    net, x = nn.Linear(4, 2).double(), normal(5, 4)
    with torch.no_grad(): A = agop(net, x)
    with torch.inference_mode(): B = agop(net, normal(5, 4))
    assert torch.equal(A, B) and all(p.grad is None for p in net.parameters()) and not x.requires_grad and not A.requires_grad
    x.requires_grad_()
    assert torch.equal(agop(net, x), A) and x.grad is None


# families --------------------------------------------------------------------------------------------------------------

@quick
@given(dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), center=st.booleans(), diag=st.booleans())
def test_dtypes(dtype, center, diag):
    W = normal(5, 3)
    A = agop(lambda x: torch.tanh(x @ W.to(x.dtype)), normal(40, 5).to(dtype), center=center, diag=diag)
    assert A.dtype == (dtype if dtype in (torch.float64, torch.float32) else torch.float32)
    expected = brute(lambda x: torch.tanh(x @ W), normal(40, 5).to(dtype).double(), center, diag)
    assert (A.double() - expected).norm() <= {f64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype] * expected.norm()


def test_same_family_out():
    X, net = normal(30, 4), nn.Linear(4, 2).double()
    frame = pd.DataFrame(X.numpy(), columns=list("abcd"))
    A = agop(net, X)
    assert isinstance(agop(net, X.numpy()), np.ndarray) and np.allclose(agop(net, X.numpy()), A)
    B, D = agop(net, frame), agop(net, frame, diag=True)
    assert list(B.columns) == list(B.index) == list(D.index) == list("abcd") and np.allclose(B, A)
    assert agop(net, X.float().numpy()).dtype == np.float32
    assert isinstance(agop(net, DataLoader(X, 8), progress=False), torch.Tensor)
    assert np.allclose(agop(net, X.tolist()), A)
    assert isinstance(matrix_power(B, 0.5), pd.DataFrame) and isinstance(top_directions(B, 2), pd.DataFrame) and isinstance(matrix_power(D, 0.5), pd.Series)


def test_loaders_and_iterables():
    x, f = normal(23, 6), mlp()
    expected = brute(f, x)
    for loader in (DataLoader(x, 5), DataLoader(TensorDataset(x, torch.zeros(23)), 5, shuffle=True), iter(x.split(4)), (b.numpy() for b in x.split(9))):
        assert np.allclose(agop(f, loader, progress=False), expected, atol=1e-12)


def test_pandas_reaches_the_estimator_with_names():
    frame = pd.DataFrame(normal(40, 3).numpy(), columns=["a", "b", "c"])
    model = LinearRegression().fit(frame, frame["a"] - 2 * frame["c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = agop(model, frame)
    assert np.allclose(A, np.outer([1, 0, -2], [1, 0, -2]), atol=1e-9)


# probes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("center,probes", [(False, 2), (False, 5), (True, 4), (True, 7)])
def test_probes_unbiased_with_honest_error(center, probes):
    x, f = normal(30, 6), mlp(c=20)
    exact, runs = brute(f, x, center), [agop(f, x, center=center, probes=probes, random_state=s, batch_size=11) for s in range(150)]
    mean = sum(r.matrix for r in runs) / len(runs)
    true = np.mean([float((r.matrix - exact).norm() ** 2) for r in runs]) ** 0.5
    promised = np.mean([r.error**2 for r in runs]) ** 0.5
    assert (mean - exact).norm() < 3 * true / len(runs) ** 0.5 and 0.8 < promised / true < 1.25


def test_probes_repeat_and_unpack():
    x, f = normal(10, 6), mlp()
    A, error = agop(f, x, probes=4, random_state=3)
    again = agop(f, x, probes=4, random_state=3)
    assert torch.equal(A, again.matrix) and error == again.error and isinstance(again, Sketch) and again.relative == pytest.approx(error / float(A.norm()))
    one = agop(mlp(c=1), x, probes=2, center=True, random_state=0)
    assert torch.allclose(one.matrix, brute(mlp(c=1), x, True), atol=1e-12) and one.error < 1e-12
    assert agop(f, x, probes=4, diag=True).matrix.shape == (6,)


# kernel machines and black boxes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", [Laplace(3.0), Matern52(4.0), NTK(2)])
@pytest.mark.parametrize("center", [False, True])
def test_closed_form_against_differences(kernel, center):
    machine, x = KernelMachine(kernel, normal(30, 5), normal(30, 2, seed=1)), normal(12, 5, seed=2)
    A = agop(machine, x, center=center)
    assert torch.allclose(A, machine.agop(x, center=center), atol=1e-11)
    assert torch.allclose(A, agop(machine, x, center=center, method="differences"), rtol=1e-5, atol=1e-7 * float(A.abs().max()))
    holder = type("Fitted", (), {"kernel_machine": lambda self: machine, "predict": None})()
    assert torch.equal(agop(holder, x, center=center), A)
    assert torch.allclose(agop(machine, DataLoader(x, 5), center=center, progress=False), A, atol=1e-11)


def test_smooth_black_boxes_against_autograd():
    f, x = mlp(c=2), normal(50, 6) * torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=f64)
    g = lambda a: f(torch.as_tensor(a) / torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=f64)).numpy()
    t = lambda x: f(x / torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=f64))
    for center in (False, True):
        exact, ours = brute(t, x, center).numpy(), agop(g, x.numpy(), center=center)
        size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        assert (abs(ours - exact) / size).max() < 1e-6
    images = normal(5, 1, 3, 2)
    assert np.allclose(agop(lambda a: f(torch.as_tensor(a)).numpy(), images.numpy()), brute(f, images), rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def table():
    X = np.random.default_rng(0).normal(size=(300, 4))
    return X, 2 * X[:, 0] - X[:, 1]


@pytest.mark.parametrize("model", [LinearRegression(), SVR(C=10), MLPRegressor(max_iter=400, random_state=0), RandomForestRegressor(30, random_state=0), KNeighborsRegressor(10)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_estimators(table, model, dtype):
    X, y = table
    D = np.asarray(agop(model.fit(X, y), X.astype(dtype), diag=True))
    assert D[0] > D[1] > 5 * max(D[2], D[3])
    assert 1.5 < D[0] < 6                                         # the true value is 4
    if isinstance(model, LinearRegression): assert np.allclose(D, model.coef_**2, rtol=1e-6)


def test_float32_function_needs_a_longer_step(table):
    X, y = table
    svr = SVR(C=10).fit(X, y)
    rough = agop(lambda a: svr.predict(a).astype(np.float32), X)
    assert np.allclose(rough, agop(svr, X), rtol=1e-2, atol=1e-2)


def test_classifiers_constant_features_and_steps(table):
    X, y = table
    labels = np.array(["no", "yes"])[(y > 0).astype(int)]
    logistic = LogisticRegression().fit(X, labels)
    assert np.allclose(agop(logistic, X), np.outer(logistic.coef_, logistic.coef_), rtol=1e-6, atol=1e-9)
    assert agop(SVC().fit(X, labels), X[:20]).shape == (4, 4)
    constant = np.c_[X, np.full(300, 7.0), np.zeros(300)]
    assert np.allclose(np.diag(agop(lambda a: a[:, 4] + 3 * a[:, 5], constant))[4:], [1, 9])
    assert np.allclose(agop(lambda a: a[:, 0], X, step=0.1), np.diag([1, 0, 0, 0]))
    assert np.allclose(agop(lambda a: a[:, 0], X, step=[0.1, 1, 1, 1]), np.diag([1, 0, 0, 0]))
    ints = np.arange(12).reshape(6, 2)
    assert np.allclose(agop(lambda a: a @ np.array([1.0, 2.0]), ints), [[1, 2], [2, 4]])
    assert np.array_equal(agop(lambda a: np.zeros(len(a)), X), np.zeros((4, 4)))
    with pytest.raises(NotFittedError): agop(SVR(), X)


# estimators of all kinds -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: make_pipeline(StandardScaler(), m)], ids=["alone", "pipeline"])
@pytest.mark.parametrize("model", [RFMRegressor(n_iter=1), SVR()], ids=["closed form", "differences"])
def test_frames_with_other_columns_are_refused_as_predict_refuses_them(table, model, wrap):
    frame = pd.DataFrame(table[0][:60], columns=list("abcd"))
    model = wrap(model).fit(frame, table[1][:60])
    assert list(agop(model, frame).columns) == list("abcd")
    for bad in (frame[list("bacd")], frame.rename(columns={"a": "z"}), frame[list("abc")]):
        with pytest.raises(ValueError) as ours: agop(model, bad)
        with pytest.raises(ValueError) as theirs: model.predict(bad)
        assert str(ours.value) == str(theirs.value)


class Holder(ClassifierMixin, BaseEstimator):
    "A fitted two-class classifier whose decision_function is the difference of its two outputs, like the RFM classifiers."
    def __init__(self, machine=None, offers=("outputs", "kernel_machine")): self.machine, self.offers = machine, offers

    def fit(self, X, y):
        self.classes_, self.machine_ = np.unique(y), self.machine                # machine_ alone says nothing about its coordinates
        return self

    def __getattr__(self, name):
        if name in ("outputs", "kernel_machine") and name in self.__dict__.get("offers", ()): return getattr(self, "_" + name)
        raise AttributeError(name)
    def _outputs(self, X): return self.machine(2 * np.asarray(X))
    def _kernel_machine(self): return None
    def decision_function(self, X): return self._outputs(X) @ np.array([-1, 1])
    def predict(self, X): return self.classes_[(self.decision_function(X) > 0).astype(int)]


def test_two_classes_have_two_outputs_and_machines_are_asked_for(table):
    X, y = table[0][:40], table[1][:40] > 0
    machine = KernelMachine(Gaussian(3.0), normal(30, 4), normal(30, 2, seed=1))
    f = lambda x: (torch.exp(-torch.cdist(2 * x, machine.centers) ** 2 / 18) @ machine.coef)
    both, single = brute(f, torch.tensor(X)).numpy(), brute(lambda x: f(x) @ torch.tensor([-1.0, 1], dtype=f64), torch.tensor(X)).numpy()
    assert np.linalg.norm(both - single) > 0.3 * np.linalg.norm(both)                # half where the two outputs are opposite
    fitted = Holder(machine).fit(X, y)
    close = lambda A, B: np.allclose(A, B, rtol=1e-5, atol=1e-6 * abs(B).max())
    assert close(agop(fitted, X), both) and close(agop(GridSearchCV(Holder(machine), {}, cv=2).fit(X, y), X), both)
    assert close(agop(Holder(machine, offers=()).fit(X, y), X), single)
    scaler = StandardScaler().fit(X)
    scaled = brute(lambda x: f((x - torch.tensor(scaler.mean_)) / torch.tensor(scaler.scale_)), torch.tensor(X)).numpy()
    assert close(agop(make_pipeline(StandardScaler(), Holder(machine)).fit(X, y), X), scaled)
    with pytest.raises(ValueError, match="is none"): agop(Holder(machine).fit(X, y), X, method="closed_form")
    moved = KernelMachine(Gaussian(3.0), machine.centers / 2, machine.coef, 4 * torch.eye(4, dtype=f64))
    fitted._kernel_machine = lambda: moved                                            # the same function, in the coordinates of X
    assert close(agop(fitted, X, method="closed_form"), both)


class Plain(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs))
    def forward(self, x): return self.layers(x)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_skorch_networks_in_their_own_precision(table, classes, scaled):
    X = (table[0] * [1, 300, 1e-2, 1] + [0, 1000, 0, 2]).astype(np.float32)
    y = np.digitize(table[1], [-1, 1]) if classes else table[1][:, None].astype(np.float32)
    torch.manual_seed(0)
    options = dict(max_epochs=3, lr=0.1, verbose=0, train_split=None)
    net = NeuralNetClassifier(Plain, module__outputs=3, criterion=nn.CrossEntropyLoss, **options) if classes else NeuralNetRegressor(Plain, **options)
    if not scaled: X = StandardScaler().fit_transform(X)
    model = (make_pipeline(StandardScaler(), net) if scaled else net).fit(X, y)
    inner, (mean, scale) = model[-1].module_ if scaled else model.module_, (torch.tensor(model[0].mean_), torch.tensor(model[0].scale_)) if scaled else (0, 1)
    ours = agop(model, X)
    inner.double()
    exact = brute(lambda x: inner((x - mean) / scale).softmax(1) if classes else inner((x - mean) / scale), torch.tensor(X).double()).detach().numpy()
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert ours.dtype == np.float32 and (abs(ours - exact) / size).max() < 1e-3
    inner.float()


def test_frames_of_every_make(table):
    X, y = table[0][:80], table[1][:80]
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1] > 0, "c": X[:, 2]})
    model = LinearRegression().fit(frame.astype(float), y)
    exact = np.outer(model.coef_, model.coef_)
    kinds = {"a": "Float64", "b": "boolean"}, {"a": "float32"}
    for kind in kinds: assert np.allclose(agop(model, frame.astype(kind)), exact, atol=1e-6)
    assert agop(RFMRegressor(n_iter=0).fit(X, y), torch.tensor(X).bfloat16()).dtype == torch.float32
    assert np.allclose(agop(LinearRegression().fit(X, y), torch.tensor(X).bfloat16()).numpy()[0, 0], 4, rtol=1e-2)
    with pytest.raises(ValueError, match="x contains NaN"): agop(model, frame.astype("Float64").mask(frame > 2))
    with pytest.raises(TypeError, match="dates"): agop(model, frame.assign(a=pd.Timestamp("2024-01-01")))
    pytest.importorskip("pyarrow")
    assert np.allclose(agop(model, frame.astype({"a": "double[pyarrow]", "b": "bool[pyarrow]"})), exact, atol=1e-6)
    polars = pytest.importorskip("polars")
    A = agop(model, polars.from_pandas(frame))
    assert list(A.columns) == list(A.index) == list("abc") and np.allclose(A, exact, atol=1e-6)
    net = nn.Linear(3, 2).double()
    assert np.allclose(agop(net, polars.from_pandas(frame.astype(float))), (net.weight.T @ net.weight).detach())
    assert isinstance(matrix_power(polars.from_pandas(A), 1), pd.DataFrame) and cosine(polars.from_pandas(A), A) == pytest.approx(1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", ["nothing", "one row", "no_grad", "inference", "backward"])
def test_compiled_networks_whatever_they_ran_before(backend, before):
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval(), normal(20, 6)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(before, torch.enable_grad)():
        if before != "nothing": y = compiled(x[:1] if before == "one row" else x)
        inside = agop(compiled, x, batch_size=7)
    if before == "backward": y.sum().backward()
    exact = brute(net, x).detach()
    for A in (inside, agop(compiled, x, batch_size=7), agop(lambda x: compiled(x) + 1, x)): assert (A - exact).abs().max() < 1e-12


# sums ------------------------------------------------------------------------------------------------------------------

def test_what_is_no_jacobian_leaves_the_sums_alone():
    J = normal(5, 2, 3)
    acc = AGOP(center=True).update(J)
    before = acc.matrix
    masked = np.ma.masked_array(J.numpy(), mask=J.numpy() > 1)
    cases = [(J * math.nan, ValueError, "not finite at 5 of 5"), (J.clone().index_fill_(0, torch.tensor([1]), math.inf), ValueError, "not finite at 1 of 5"), (J + 1j, ValueError, "complex"),
             (J.numpy() + 1j, ValueError, "complex"), (masked, TypeError, "masked"), (np.full((1, 2, 3), "2020-01-01", "datetime64[D]"), TypeError, "dates"),
             (J[:, :1], ValueError, "1 outputs"), (normal(5, 3, 3), ValueError, "3 outputs"), (J * 1e200, ValueError, "overflow float64"), (J[:0], ValueError, "empty")]
    for bad, error, words in cases[:6] + cases[7:]:
        with pytest.raises(error, match=f"jacobians.*{words}"): acc.update(bad)
        assert torch.equal(acc.matrix, before) and acc.n == 5
    for bad in ([J, J * math.nan], [J[:, :1], J[:4, 1:]], [J[:, :1]]):
        acc = AGOP(center=True).update(J)
        with pytest.raises(ValueError, match="jacobians"): acc.update(iter(bad))
        with pytest.raises(ValueError, match="halfway"): acc.matrix
        with pytest.raises(ValueError, match="halfway"): AGOP(center=True).merge(acc)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_outside_of_single_precision(scale):
    J = normal(40, 3, 5).float() * scale
    exact = torch.einsum("ncd,nce->de", J.double(), J.double()) / 40
    for options in ({}, {"diag": True}):
        A = AGOP(**options).update(J).matrix
        assert torch.allclose(A, exact.diagonal() if options else exact, rtol=1e-5)
    x = normal(9, 5).float()
    with pytest.raises(ValueError, match="float32 cannot hold; rescale f, or pass x in float64"): agop(lambda x: x * scale, x)
    assert torch.allclose(agop(lambda x: x * scale, x.double()), torch.eye(5, dtype=f64) * scale**2, rtol=1e-5)


MEASURE = """
import gc, sys, threading, time, numpy as np, psutil, torch
import agop_book.predictors as module
from agop_book.agop import agop
from agop_book.kernels import Laplace
from agop_book.machines import KernelMachine
way, options, dtype, d = sys.argv[1], {k: {"center": True, "diag": True, "probes": 3}[k] for k in sys.argv[2].split()}, getattr(torch, sys.argv[3]), int(sys.argv[4])
plans, plan = [], module.plan
module.plan = lambda need, *a, **k: plans.append(plan(need, *a, **k))
x, W = torch.randn(40, d, dtype=dtype), torch.randn(d, 2, dtype=dtype)
f = KernelMachine(Laplace(99.0), torch.randn(50, d, dtype=dtype), torch.randn(50, 2, dtype=dtype)) if way == "closed_form" else lambda x: torch.tanh(x @ W)
agop(f, x[:2], diag=True)                               # what is allocated once
warm = torch.randn(300, 300, dtype=dtype)
warm = warm @ warm
plans.clear()
gc.collect()
process, running, peak = psutil.Process(), True, [0]
def watch():
    while running:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.0005)
before, thread = process.memory_info().rss, threading.Thread(target=watch)
thread.start()
A = agop(f, x, **options)
running = False
thread.join()
print(plans[0], peak[0] - before)
"""


@pytest.mark.parametrize("way,options,dtype", [("pullbacks", "center", "float32"), ("pullbacks", "probes", "float64"), ("closed_form", "", "float64")])
def test_the_plan_is_what_the_process_takes(way, options, dtype):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", MEASURE, way, options, dtype, "5000"], env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    planned, taken = map(int, out.split())
    assert taken > 8e7 and 0.9 * taken <= planned <= 1.3 * taken, (planned, taken)


def test_memory_is_planned_before_the_work_and_diagonals_pass(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 2**30)
    x, d = torch.zeros(2, 60_000), 60_000
    fail = lambda x: pytest.fail("it began to work")
    machine = KernelMachine(Laplace(), torch.ones(2, d), torch.ones(2, 1))
    for call in (lambda **k: agop(fail, x, **k), lambda **k: agop(machine, x, **k), lambda **k: agop(lambda a: fail(a), x.numpy(), **k)):
        with pytest.raises(MemoryError, match="AGOP of 60,000 features takes .* GiB.*diag=True"): call()
    assert agop(lambda x: 2 * x[:, :1], x, diag=True).shape == agop(machine, x, diag=True).shape == (d,)
    with pytest.raises(MemoryError, match="60,000 features"): AGOP().update(torch.zeros(1, 1, d))
    with pytest.raises(MemoryError, match="probes"): agop(lambda x: x, normal(9, 6), probes=2**31 - 1)


# processes -------------------------------------------------------------------------------------------------------------

WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_agop import mlp, normal, settings_of_processes
from agop_book.agop import agop
dist.init_process_group("gloo")
share = normal(41, 6).split([13, 28])[dist.get_rank()]
found = [agop(mlp(), share, **kw) for kw in settings_of_processes()]
own = agop(mlp(), share, reduce=False)
lonely = [normal(41, 6)] if dist.get_rank() == 0 else []              # a process without samples
found += [agop(mlp(), iter(lonely), center=c, progress=False).double() for c in (False, True)]
if dist.get_rank() == 1: torch.save([f.matrix if hasattr(f, "matrix") else f for f in found] + [own], sys.argv[1])
dist.destroy_process_group()
"""


def settings_of_processes():
    return [{}, dict(center=True), dict(diag=True), dict(center=True, diag=True), dict(center=True, probes=3, random_state=0), dict(probes=40, random_state=0)]


def test_two_processes_equal_one(two_processes):
    *found, empty, empty_centred, own = torch.load(two_processes(WORKER), weights_only=True)
    x = normal(41, 6)
    for kw, A in zip(settings_of_processes()[:-1], found):
        B = agop(mlp(), x, **kw)
        assert (A - getattr(B, "matrix", B)).abs().max() < 1e-11, kw
    assert (found[-1] - brute(mlp(), x)).norm() < 0.3 * brute(mlp(), x).norm()   # fresh signs differ by process: equal in expectation
    assert torch.allclose(own, agop(mlp(), x[13:]))
    assert torch.allclose(empty, brute(mlp(), x), rtol=1e-5) and torch.allclose(empty_centred, brute(mlp(), x, True), rtol=1e-5)


FAILING_WORKER = """
import sys, time, datetime, torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, sys.argv[2])
from test_agop import mlp, normal
from agop_book.accumulator import AGOP
from agop_book.agop import agop
from agop_book.processes import all_or_none
from agop_book.nfa import nfa
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=25))
rank, net = dist.get_rank(), nn.Sequential(nn.Linear(6, 3)).double()
def late(x):                                                   # fails on process 1, at its second batch
    if rank == 1 and len(x) == 3: raise KeyError("out of luck")
    return mlp()(x)
def direct():
    with all_or_none(): AGOP().update(torch.full((2, 3, 6), float("nan") if rank else 1.0)).all_reduce()
bad = torch.full((5, 6), float("nan")) if rank == 1 else normal(5, 6)
found = []
for call in (lambda: agop(late, normal(13, 6), batch_size=10), lambda: agop(mlp(), bad), lambda: agop(mlp(), normal(5, 6), probes=3 if rank == 0 else -1),
             lambda: agop(lambda a: mlp()(torch.as_tensor(a)).numpy(), bad.numpy()), direct, lambda: agop(mlp(c=3 - rank), normal(5, 6)), lambda: agop(mlp(d=6 + rank), normal(5, 6 + rank)),
             lambda: nfa(net, bad, progress=False)):
    start = time.perf_counter()
    try: call()
    except Exception as error: found.append(f"{time.perf_counter() - start < 20} {type(error).__name__}: {error}")
    else: found.append("no error")
torch.save((found, agop(mlp(), normal(9, 6))), f"{sys.argv[1]}{rank}")
dist.destroy_process_group()
"""


def test_a_process_that_fails_is_named_by_the_others_at_once(two_processes):
    path = two_processes(FAILING_WORKER, timeout=60)
    (first, A), (second, B) = (torch.load(f"{path}{rank}", weights_only=True) for rank in (0, 1))
    *at_first, by_sizes, by_nfa = first
    assert all(text.startswith("True RuntimeError: process 1 of 2 failed") for text in [*at_first, by_nfa]), first
    for text, reason in zip(second, ("KeyError: 'out of luck'", "ValueError: x contains NaN", "ValueError: probes must", "ValueError: x contains NaN", "ValueError: jacobians are not finite", "ValueError: the Jacobians of this process have 2 outputs", "", "ValueError")):
        assert text.startswith(f"True {reason}"), second
    assert "process 0 of 2 failed" in second[6] and "jacobians have 7 features" in by_sizes   # the shared width is 7, the first has 6
    assert torch.equal(A, B) and torch.allclose(A, brute(mlp(), normal(9, 6)))              # afterwards they still work together


# bad input -------------------------------------------------------------------------------------------------------------

x0 = normal(6, 4)
BAD = [
    (lambda: agop(mlp(4), torch.full((3, 4), math.nan)), ValueError, "x contains NaN"),
    (lambda: agop(mlp(4), torch.full((3, 4), math.inf)), ValueError, "x contains NaN or inf"),
    (lambda: agop(mlp(4), DataLoader(torch.full((3, 4), math.nan), 2), progress=False), ValueError, "batch 0 of x"),
    (lambda: agop(mlp(4), x0[0]), ValueError, r"x\[None\]"),
    (lambda: agop(mlp(4), x0[:0]), ValueError, "empty"),
    (lambda: agop(mlp(4), [x0[:0]][:0]), (ValueError, TypeError), "x "),
    (lambda: agop(mlp(4), iter([]), progress=False), ValueError, "empty"),
    (lambda: agop(mlp(4), x0 + 0j), ValueError, "complex"),
    (lambda: agop(mlp(4), np.array([["a", "b"]])), TypeError, "x must"),
    (lambda: agop(mlp(4), "x"), TypeError, "got str"),
    (lambda: agop(mlp(4), {"x": x0}), TypeError, "got dict"),
    (lambda: agop(mlp(4), iter([{"x": x0}]), progress=False), TypeError, "batch 0 of x is a dict"),
    (lambda: agop(mlp(4), TensorDataset(x0)), TypeError, "DataLoader"),
    (lambda: agop(LinearRegression().fit(x0, x0[:, 0]), pd.DataFrame({"a": ["u", "v"], "b": [1, 2]})), TypeError, r"\['a'\]"),
    (lambda: agop(mlp(4), x0.long()), TypeError, "embeddings"),
    (lambda: agop(nn.Linear(4, 1), x0.long().numpy()), TypeError, "int64"),
    (lambda: agop(mlp(4), x0[:1], center=True), ValueError, "one sample"),
    (lambda: agop(lambda x: x.sum(), x0), ValueError, "first axis"),
    (lambda: agop(lambda x: x.sum(0), x0), ValueError, "first axis"),
    (lambda: agop(lambda x: (x,), x0), TypeError, "returned tuple"),
    (lambda: agop(lambda x: x.argmax(1), x0), TypeError, "int64"),
    (lambda: agop(lambda x: x + 0j, x0), TypeError, "complex"),
    (lambda: agop(lambda x: x.detach().numpy(), x0), TypeError, "pass x as numpy"),
    (lambda: agop(lambda x: (x - x).sqrt(), x0), ValueError, "not finite"),
    (lambda: agop(lambda a: a.sum(), x0.numpy()), ValueError, "first axis"),
    (lambda: agop(lambda a: np.array(["u"] * len(a)), x0.numpy()), TypeError, "real numbers"),
    (lambda: agop(lambda a: a * np.nan, x0.numpy()), ValueError, "not finite"),
    (lambda: agop(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x0.float()), ValueError, r"eval\(\)"),
    (lambda: agop(nn.BatchNorm1d(4, track_running_stats=False).eval(), x0.float()), ValueError, "running statistics"),
    (lambda: agop(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), x0.float()), ValueError, r"eval\(\)"),
    (lambda: agop(mlp(4), x0, probes=1), ValueError, "at least 2; got 1|at least 2 .*got 1"),
    (lambda: agop(mlp(4), x0, probes=2.5), ValueError, "2.5"),
    (lambda: agop(LinearRegression().fit(x0, x0[:, 0]), x0, probes=4), ValueError, "probes=4"),
    *[(lambda v=v, n=n: agop(mlp(4), x0, **{n: v}), ValueError, f"{n} must be") for n in ("batch_size", "chunk", "probes") for v in (0, -1, True, 2.0, 2**63, "3")],
    *[(lambda v=v: agop(lambda a: a, x0.numpy(), step=v), ValueError, "step must be") for v in (True, 0, -1.0, math.nan, math.inf, 1j, "1", [0.1] * 3, np.datetime64("2020-01-01"))],
    *[(lambda v=v: choose_steps(lambda a: a, x0.numpy(), pilot=v), ValueError, "pilot must be") for v in (0, True, 2**63)],
    *[(lambda v=v: random_signs(v, torch.Generator()), ValueError, "k must be") for v in (0, True, 2**63)],
    *[(lambda v=v: AGOP(probes=v), ValueError, "probes must be") for v in (0, 1, True, 2**63)],
    (lambda: list(pullbacks(mlp(4), x0, chunk=0)), ValueError, "chunk must be"),
    (lambda: differences(lambda a: a, x0.numpy(), np.zeros(4)), ValueError, "steps must be"),
    (lambda: agop(lambda a: np.ma.masked_array(a, a > 0), x0.numpy()), TypeError, "masked"),
    (lambda: agop(mlp(4), x0, method="guess"), ValueError, "'guess'"),
    (lambda: agop(mlp(4), x0, method="closed_form"), ValueError, "kernel machine"),
    (lambda: agop(3, x0), TypeError, "got int"),
    (lambda: agop(lambda a: a, x0.numpy(), step=-1.0), ValueError, "step"),
    (lambda: agop(lambda a: a, x0.numpy(), step=[1.0, 2.0]), ValueError, "step"),
    (lambda: agop(KernelMachine(Laplace(), x0, x0[:, :1]), x0[:, :3]), ValueError, "features"),
    (lambda: AGOP().matrix, ValueError, "empty"),
    (lambda: AGOP().update(torch.zeros(2, 3)), ValueError, "shape"),
    (lambda: AGOP().update(torch.zeros(2, 3, 4)).update(torch.zeros(2, 3, 5)), ValueError, "5 features"),
    (lambda: AGOP() + AGOP(center=True), ValueError, "differ"),
    (lambda: matrix_power(-torch.eye(3), 0.5), ValueError, "eigenvalue -1"),
    (lambda: matrix_power(torch.diag(torch.tensor([1.0, 0.0])), -1), ValueError, "ridge"),
    (lambda: matrix_power(torch.ones(2, 3), 1), ValueError, "square"),
    (lambda: matrix_power(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1), ValueError, "symmetric"),
    (lambda: matrix_power(torch.eye(2), math.nan), ValueError, "p must"),
    (lambda: top_directions(torch.eye(3), 4), ValueError, "from 1 to 3"),
    (lambda: top_directions(torch.ones(3)), ValueError, "full matrix"),
    *[(lambda v=v, g=g: g(v), error, f"A .*{words}") for g in (lambda A: matrix_power(A, 0.5), top_directions, lambda A: cosine(A, np.eye(2)), lambda A: pearson(A, np.eye(2))) for v, error, words in (
        (torch.eye(2) + 0j, ValueError, "complex"), (np.eye(2) + 0j, ValueError, "complex"), (pd.DataFrame(np.eye(2) + 0j), ValueError, "complex"), (np.eye(2) * math.nan, ValueError, "NaN"),
        (np.ma.masked_array(np.eye(2), np.eye(2) > 0), TypeError, "masked"), (np.full((2, 2), "2020-01-01", "datetime64[D]"), TypeError, "dates"), (pd.DataFrame({"u": ["a", "b"], "v": [1, 2]}), TypeError, "not numbers"),
        (np.zeros((0, 0)), ValueError, "empty"))],
    *[(lambda v=v: top_directions(torch.eye(3), v), ValueError, "k must be") for v in (True, 0, 2**63, 1.0)],
    *[(lambda v=v: matrix_power(torch.eye(3), v), ValueError, "p must be") for v in (True, 1j, "1", math.inf)],
    (lambda: matrix_power(torch.eye(3).double() * 1e300, 2), ValueError, "overflows"),
    (lambda: cosine(torch.eye(2), torch.eye(3)), ValueError, "agree"),
    (lambda: pearson(torch.eye(2) * math.nan, torch.eye(2)), ValueError, "A contains NaN"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, error, words = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=words): call()


def test_outputs_that_ignore_x():
    with pytest.warns(UserWarning, match="do not depend"): A = agop(lambda x: torch.ones(len(x), 2), x0)
    assert torch.equal(A, torch.zeros(4, 4, dtype=f64))
    p = torch.ones(1, requires_grad=True)
    assert torch.equal(agop(lambda x: p.expand(len(x), 1), x0), torch.zeros(4, 4, dtype=f64))


def test_eval_modules_pass():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).eval()
    assert agop(net, x0.float()).shape == (4, 4) and agop(net, x0).dtype == f64     # a module gets its own dtype


# matrices --------------------------------------------------------------------------------------------------------------

@quick
@given(d=st.integers(1, 8), p=st.sampled_from([0, 0.25, 0.5, 1, 2, -0.5, -1]), seed=st.integers(0, 50))
def test_powers(d, p, seed):
    B = normal(d, 2 * d, seed=seed)
    A = B @ B.T + 0.1 * torch.eye(d, dtype=f64)
    P = matrix_power(A, p)
    assert torch.allclose(P @ matrix_power(A, 1 - p), A, rtol=1e-8, atol=1e-8)
    assert torch.allclose(matrix_power(A.diagonal(), p), A.diagonal() ** p)
    assert np.allclose(matrix_power(A.numpy(), p), P) and matrix_power(A.float(), p).dtype == torch.float32


def test_power_clipped():
    A = np.diag([2.0, -1.0])
    np.testing.assert_array_equal(matrix_power(A, 2, clip=True), np.diag([4.0, 0.0]))
    np.testing.assert_array_equal(matrix_power(A.diagonal(), 2, clip=True), [4.0, 0.0])


def test_power_of_a_rounded_low_rank_matrix():
    u = normal(200, 2, dtype=torch.float32)
    root = matrix_power(u @ u.T, 0.5)
    assert torch.isfinite(root).all() and torch.allclose(root @ root, u @ u.T, atol=1e-2)


def test_directions():
    Q = torch.linalg.qr(normal(6, 6)).Q
    A = (Q * torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=f64)) @ Q.T
    V, w = top_directions((A + A.T) / 2, 3, values=True)
    assert torch.allclose(w, torch.tensor([6.0, 5, 4], dtype=f64)) and V.shape == (3, 6)
    assert torch.allclose((V @ Q[:, :3]).abs(), torch.eye(3, dtype=f64), atol=1e-12)
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()


def test_likeness():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1]) and pearson(a, a.numpy()) == pytest.approx(1)
    assert cosine(1e200 * a, 1e-200 * a) == pytest.approx(1)
    with pytest.warns(UserWarning, match="A is constant"): assert math.isnan(pearson(torch.ones(3, 3) * 0.1, torch.eye(3)))
    with pytest.warns(UserWarning, match="B is zero"): assert math.isnan(cosine(torch.eye(3), torch.zeros(3, 3)))


# functions that are not as they should be ------------------------------------------------------------------------------

def test_a_function_may_change_what_it_gets():
    def doubled(a):
        a *= 2
        return a[:, :1] ** 2
    x = normal(9, 3)
    wanted = torch.zeros(3, 3, dtype=f64)
    wanted[0, 0] = (8 * x[:, 0]).square().mean()                          # f(x) = 4 x_0^2
    for data in (x.clone(), x.clone().numpy()):
        np.testing.assert_allclose(agop(doubled, data), wanted, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(data, x)


@pytest.mark.parametrize("x", [normal(6, 3), normal(6, 3).numpy()], ids=["torch", "numpy"])
def test_outputs_that_cannot_be_differentiated(x):
    with pytest.raises(ValueError, match=r", 0\).*no output"): agop(lambda a: a[:, :0], x)
    with pytest.raises(TypeError, match="scores"): agop(lambda a: a > 0, x)


def test_a_sparse_output_is_refused():
    with pytest.raises(TypeError, match="sparse"): agop(lambda a: a.to_sparse(), normal(6, 3))


@pytest.mark.parametrize("family", [torch.Tensor.clone, torch.Tensor.numpy, lambda t: (t, t[:, 0])], ids=["tensors", "arrays", "tuples"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_batches(family, kind):
    x, smooth = normal(9, 3), mlp(3, 2)
    f = lambda a: smooth(torch.as_tensor(a))
    A = agop(f, kind([family(x[:4]), family(x[4:8]), family(x[8:])]))
    assert A.shape == (3, 3)
    np.testing.assert_allclose(A, brute(smooth, x), rtol=1e-5, atol=1e-8)


def test_a_list_of_rows_is_an_array():
    x = normal(6, 3)
    f = lambda a: np.tanh(a[:, :2]) * a[:, 2:]
    wanted = agop(f, x.numpy())
    for rows in (x.tolist(), list(x.numpy()), tuple(x.numpy())): np.testing.assert_array_equal(agop(f, rows), wanted)


@pytest.mark.parametrize("options", [{}, {"center": True}, {"probes": 4}, {"diag": True}])
def test_the_number_of_outputs_must_not_vary(options):
    f = lambda a: a[:, :len(a)]**2                                        # as many outputs as samples
    for sizes in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="outputs.*before.*same outputs"): agop(f, [normal(n, 4) for n in sizes], **options)


def test_merging_demands_equal_outputs():
    with pytest.raises(TypeError, match="AGOP"): AGOP().merge(None)
    one, two = AGOP().update(normal(4, 2, 3)), AGOP().update(normal(4, 1, 3))
    with pytest.raises(ValueError, match="outputs"): one.merge(two)


@pytest.mark.parametrize("x", [normal(6, 3), normal(6, 3).numpy()], ids=["torch", "numpy"])
def test_gradients_whose_squares_vanish_are_told(x):
    with pytest.warns(UserWarning, match="1.0e-200.*rescale"): agop(lambda a: 1e-200 * a, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(agop(lambda a: 1e-120 * a, x) * 1e120 * 1e120, np.eye(3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("center", [False, True])
def test_a_machine_with_tiny_coefficients(center):
    x, coef = normal(8, 3, dtype=torch.float32), normal(8, 2, seed=1, dtype=torch.float32)
    machine = lambda c: KernelMachine(Gaussian(2.0), x, c)
    wanted = agop(machine(coef), x.double().numpy(), center=center)
    A = agop(machine(coef * 2.0**-83), x.double().numpy(), center=center)   # 1e-25
    np.testing.assert_allclose(A * 2.0**166, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="float32 cannot hold; rescale f"): agop(machine(coef * 2.0**-83), x)


def test_a_module_by_differences():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = normal(9, 4)
    for data in (x, x.numpy()): np.testing.assert_allclose(agop(net, data, method="differences"), brute(net, x).detach(), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="eval"): agop(nn.Sequential(net, nn.Dropout(0.5)), x, method="differences")


def test_a_numpy_function_of_a_generator_is_told_the_method():
    x = normal(9, 3).numpy()
    f = lambda a: np.tanh(a) @ np.ones((3, 1))
    with pytest.raises(TypeError, match="method='differences'"): agop(f, (x[i:i + 3] for i in (0, 3, 6)))
    np.testing.assert_allclose(agop(f, (x[i:i + 3] for i in (0, 3, 6)), method="differences"), agop(f, x), rtol=1e-6)


def test_a_step_that_rounding_swallows():
    with pytest.raises(ValueError, match="step=1e-300.*larger"): agop(lambda a: a**2, normal(6, 3).numpy(), step=1e-300)
