"Kernel machines, estimators, networks and other black boxes against brute force."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
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
from torch.utils.data import DataLoader

from agop_book.agop import agop
from agop_book.matrices import cosine, matrix_power
from agop_book.kernels import NTK, Gaussian, Laplace, Matern52
from agop_book.machines import KernelMachine
from agop_book.rfm import RFMRegressor
from test_agop import brute, f64, mlp, normal


def test_pandas_reaches_the_estimator_with_names():
    frame = pd.DataFrame(normal(40, 3).numpy(), columns=["a", "b", "c"])
    model = LinearRegression().fit(frame, frame["a"] - 2 * frame["c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A = agop(model, frame)
    assert np.allclose(A, np.outer([1, 0, -2], [1, 0, -2]), atol=1e-9)


@pytest.mark.parametrize("kernel", [Laplace(3.0), Matern52(4.0), NTK(2)])
@pytest.mark.parametrize("center", [False, True])
def test_closed_form_against_differences(kernel, center):
    machine, x = KernelMachine(kernel, normal(30, 5), normal(30, 2, seed=1)), normal(12, 5, seed=2)
    A = agop(machine, x, center=center)
    assert torch.allclose(A, machine.agop(x, center=center), atol=1e-11)
    assert torch.allclose(
        A,
        agop(machine, x, center=center, method="differences"),
        rtol=1e-5,
        atol=1e-7 * float(A.abs().max()),
    )
    holder = type("Fitted", (), {"kernel_machine": lambda self: machine, "predict": None})()
    assert torch.equal(agop(holder, x, center=center), A)
    assert torch.allclose(
        agop(machine, DataLoader(x, 5), center=center, progress=False), A, atol=1e-11
    )


def test_smooth_black_boxes_against_autograd():
    f, x = mlp(c=2), normal(50, 6) * torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=f64)

    def t(x):
        return f(x / torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=f64))

    def g(a):
        return t(torch.as_tensor(a)).numpy()

    for center in (False, True):
        exact, ours = brute(t, x, center).numpy(), agop(g, x.numpy(), center=center)
        size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        assert (abs(ours - exact) / size).max() < 1e-6
    images = normal(5, 1, 3, 2)
    assert np.allclose(
        agop(lambda a: f(torch.as_tensor(a)).numpy(), images.numpy()),
        brute(f, images),
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.fixture(scope="module")
def table():
    X = np.random.default_rng(0).normal(size=(300, 4))
    return X, 2 * X[:, 0] - X[:, 1]


@pytest.mark.parametrize(
    "model",
    [
        LinearRegression(),
        SVR(C=10),
        MLPRegressor(max_iter=400, random_state=0),
        RandomForestRegressor(30, random_state=0),
        KNeighborsRegressor(10),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_estimators(table, model, dtype):
    X, y = table
    D = np.asarray(agop(model.fit(X, y), X.astype(dtype), diag=True))
    assert D[0] > D[1] > 5 * max(D[2], D[3])
    assert 1.5 < D[0] < 6  # the true value is 4
    if isinstance(model, LinearRegression):
        assert np.allclose(D, model.coef_**2, rtol=1e-6)


def test_float32_function_needs_a_longer_step(table):
    X, y = table
    svr = SVR(C=10).fit(X, y)
    rough = agop(lambda a: svr.predict(a).astype(np.float32), X)
    assert np.allclose(rough, agop(svr, X), rtol=1e-2, atol=1e-2)


def test_classifiers_constant_features_and_steps(table):
    X, y = table
    labels = np.array(["no", "yes"])[(y > 0).astype(int)]
    logistic = LogisticRegression().fit(X, labels)
    assert np.allclose(
        agop(logistic, X), np.outer(logistic.coef_, logistic.coef_), rtol=1e-6, atol=1e-9
    )
    assert agop(SVC().fit(X, labels), X[:20]).shape == (4, 4)
    constant = np.c_[X, np.full(300, 7.0), np.zeros(300)]
    assert np.allclose(np.diag(agop(lambda a: a[:, 4] + 3 * a[:, 5], constant))[4:], [1, 9])
    assert np.allclose(agop(lambda a: a[:, 0], X, step=0.1), np.diag([1, 0, 0, 0]))
    assert np.allclose(agop(lambda a: a[:, 0], X, step=[0.1, 1, 1, 1]), np.diag([1, 0, 0, 0]))
    ints = np.arange(12).reshape(6, 2)
    assert np.allclose(agop(lambda a: a @ np.array([1.0, 2.0]), ints), [[1, 2], [2, 4]])
    assert np.array_equal(agop(lambda a: np.zeros(len(a)), X), np.zeros((4, 4)))
    with pytest.raises(NotFittedError):
        agop(SVR(), X)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: make_pipeline(StandardScaler(), m)], ids=["alone", "pipeline"]
)
@pytest.mark.parametrize(
    "model", [RFMRegressor(bandwidth=10.0, n_iter=1), SVR()], ids=["closed form", "differences"]
)
def test_frames_with_other_columns_are_refused_as_predict_refuses_them(table, model, wrap):
    frame = pd.DataFrame(table[0][:60], columns=list("abcd"))
    model = wrap(model).fit(frame, table[1][:60])
    assert list(agop(model, frame).columns) == list("abcd")
    for bad in (frame[list("bacd")], frame.rename(columns={"a": "z"}), frame[list("abc")]):
        with pytest.raises(ValueError) as ours:
            agop(model, bad)
        with pytest.raises(ValueError) as theirs:
            model.predict(bad)
        assert str(ours.value) == str(theirs.value)


class Holder(ClassifierMixin, BaseEstimator):
    "Fitted, two classes; decision_function is the difference of its two outputs, as RFM has it."

    def __init__(self, machine=None, offers=("outputs", "kernel_machine")):
        self.machine, self.offers = machine, offers

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.machine_ = self.machine  # alone it says nothing about its coordinates
        return self

    def __getattr__(self, name):
        if name in ("outputs", "kernel_machine") and name in self.__dict__.get("offers", ()):
            return getattr(self, "_" + name)
        raise AttributeError(name)

    def _outputs(self, X):
        return self.machine(2 * np.asarray(X))

    def _kernel_machine(self):
        return None

    def decision_function(self, X):
        return self._outputs(X) @ np.array([-1, 1])

    def predict(self, X):
        return self.classes_[(self.decision_function(X) > 0).astype(int)]


def close(A, B):
    return np.allclose(A, B, rtol=1e-5, atol=1e-6 * abs(B).max())


@pytest.fixture
def two_outputs(table):
    "A machine, the same as a torch function, rows and two classes."
    machine = KernelMachine(Gaussian(3.0), normal(30, 4), normal(30, 2, seed=1))

    def f(x):
        return torch.exp(-(torch.cdist(2 * x, machine.centers) ** 2) / 18) @ machine.coef

    return machine, f, table[0][:40], table[1][:40] > 0


def test_two_classes_have_two_outputs(two_outputs):
    machine, f, X, y = two_outputs
    both = brute(f, torch.tensor(X)).numpy()
    single = brute(lambda x: f(x) @ torch.tensor([-1.0, 1], dtype=f64), torch.tensor(X)).numpy()
    # half where the two outputs are opposite
    assert np.linalg.norm(both - single) > 0.3 * np.linalg.norm(both)
    assert close(agop(Holder(machine).fit(X, y), X), both)
    assert close(agop(GridSearchCV(Holder(machine), {}, cv=2).fit(X, y), X), both)
    assert close(agop(Holder(machine, offers=()).fit(X, y), X), single)
    scaler = StandardScaler().fit(X)
    mean, scale = torch.tensor(scaler.mean_), torch.tensor(scaler.scale_)
    scaled = brute(lambda x: f((x - mean) / scale), torch.tensor(X)).numpy()
    assert close(agop(make_pipeline(StandardScaler(), Holder(machine)).fit(X, y), X), scaled)


def test_machines_are_asked_for(two_outputs):
    machine, f, X, y = two_outputs
    fitted = Holder(machine).fit(X, y)
    with pytest.raises(ValueError, match="is none"):
        agop(fitted, X, method="closed_form")
    metric = 4 * torch.eye(4, dtype=f64)
    moved = KernelMachine(Gaussian(3.0), machine.centers / 2, machine.coef, metric)

    def in_the_coordinates_of_X():
        return moved

    fitted._kernel_machine = in_the_coordinates_of_X
    both = brute(f, torch.tensor(X)).numpy()
    assert close(agop(fitted, X, method="closed_form"), both)


class Plain(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, x):
        return self.layers(x)


def skorch_network(classes):
    torch.manual_seed(0)
    options = dict(max_epochs=3, lr=0.1, verbose=0, train_split=None)
    if not classes:
        return NeuralNetRegressor(Plain, **options)
    options |= dict(module__outputs=classes, criterion=nn.CrossEntropyLoss)
    return NeuralNetClassifier(Plain, **options)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_skorch_networks_in_their_own_precision(table, classes, scaled):
    X = (table[0] * [1, 300, 1e-2, 1] + [0, 1000, 0, 2]).astype(np.float32)
    y = np.digitize(table[1], [-1, 1]) if classes else table[1][:, None].astype(np.float32)
    net, scaler = skorch_network(classes), StandardScaler()
    model, mean, scale = net, 0, 1
    if scaled:
        model = make_pipeline(scaler, net).fit(X, y)
        mean, scale = torch.tensor(scaler.mean_), torch.tensor(scaler.scale_)
    else:
        X = scaler.fit_transform(X)
        model.fit(X, y)
    ours = agop(model, X)
    inner = net.module_.double()

    def f(x):
        scores = inner((x - mean) / scale)
        return scores.softmax(1) if classes else scores

    exact = brute(f, torch.tensor(X).double()).detach().numpy()
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert ours.dtype == np.float32 and (abs(ours - exact) / size).max() < 1e-3


@pytest.fixture
def frame(table):
    "A frame of numbers and truth values, a linear model of it, and the AGOP of that."
    X, y = table[0][:80], table[1][:80]
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1] > 0, "c": X[:, 2]})
    model = LinearRegression().fit(frame.astype(float), y)
    return frame, model, np.outer(model.coef_, model.coef_)


@pytest.mark.parametrize(
    "kinds",
    [
        {"a": "Float64", "b": "boolean"},
        {"a": "float32"},
        {"a": "double[pyarrow]", "b": "bool[pyarrow]"},
    ],
    ids=str,
)
def test_frames_of_every_make(frame, kinds):
    frame, model, exact = frame
    if "pyarrow" in str(kinds):
        pytest.importorskip("pyarrow")
    assert np.allclose(agop(model, frame.astype(kinds)), exact, atol=1e-6)


def test_frames_that_are_refused(frame):
    frame, model, _ = frame
    with pytest.raises(ValueError, match="x contains NaN"):
        agop(model, frame.astype("Float64").mask(frame > 2))
    with pytest.raises(TypeError, match="dates"):
        agop(model, frame.assign(a=pd.Timestamp("2024-01-01")))


def test_polars_frames(frame):
    frame, model, exact = frame
    pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    A = agop(model, polars.from_pandas(frame))
    assert list(A.columns) == list(A.index) == list("abc") and np.allclose(A, exact, atol=1e-6)
    net = nn.Linear(3, 2).double()
    B = agop(net, polars.from_pandas(frame.astype(float)))
    assert np.allclose(B, (net.weight.T @ net.weight).detach())
    assert isinstance(matrix_power(polars.from_pandas(A), 1), pd.DataFrame)
    assert cosine(polars.from_pandas(A), A) == pytest.approx(1)


def test_estimators_of_half_precision_rows(table):
    X, y = table[0][:80], table[1][:80]
    half = torch.tensor(X).bfloat16()
    assert agop(RFMRegressor(bandwidth=10.0, n_iter=0).fit(X, y), half).dtype == torch.float32
    A = agop(LinearRegression().fit(X, y), half).numpy()
    assert np.allclose(A[0, 0], 4, rtol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", ["nothing", "one row", "no_grad", "inference", "backward"])
def test_compiled_networks_whatever_they_ran_before(backend, before):
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), normal(20, 6)
    torch._dynamo.reset()
    compiled = torch.compile(net.eval(), backend=backend)
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes.get(before, torch.enable_grad)():
        if before != "nothing":
            y = compiled(x[:1] if before == "one row" else x)
        inside = agop(compiled, x, batch_size=7)
    if before == "backward":
        y.sum().backward()
    exact = brute(net, x).detach()
    for A in (inside, agop(compiled, x, batch_size=7), agop(lambda x: compiled(x) + 1, x)):
        assert (A - exact).abs().max() < 1e-12


@pytest.mark.parametrize("center", [False, True])
def test_a_machine_with_tiny_coefficients(center):
    x, coef = normal(8, 3, dtype=torch.float32), normal(8, 2, seed=1, dtype=torch.float32)

    def machine(c):
        return KernelMachine(Gaussian(2.0), x, c)

    wanted = agop(machine(coef), x.double().numpy(), center=center)
    A = agop(machine(coef * 2.0**-83), x.double().numpy(), center=center)  # 1e-25
    np.testing.assert_allclose(A * 2.0**166, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="float32 cannot hold; rescale f"):
        agop(machine(coef * 2.0**-83), x)


def test_a_module_by_differences():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = normal(9, 4)
    for data in (x, x.numpy()):
        np.testing.assert_allclose(
            agop(net, data, method="differences"), brute(net, x).detach(), rtol=1e-5, atol=1e-8
        )
    with pytest.raises(ValueError, match="eval"):
        agop(nn.Sequential(net, nn.Dropout(0.5)), x, method="differences")


def test_a_numpy_function_of_a_generator_is_told_the_method():
    x = normal(9, 3).numpy()

    def f(a):
        return np.tanh(a) @ np.ones((3, 1))

    with pytest.raises(TypeError, match="method='differences'"):
        agop(f, (x[i : i + 3] for i in (0, 3, 6)))
    np.testing.assert_allclose(
        agop(f, (x[i : i + 3] for i in (0, 3, 6)), method="differences"), agop(f, x), rtol=1e-6
    )


def test_a_step_that_rounding_swallows():
    with pytest.raises(ValueError, match="step=1e-300.*larger"):
        agop(lambda a: a**2, normal(6, 3).numpy(), step=1e-300)
