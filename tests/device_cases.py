"""What runs on a device, by name: functions of a device that give arrays.

The numbers that come in are float32, so that the CPU computes as a GPU does. test_device.py runs
all of them on an emulated device, and `agop_book.book.gpu` has checks of its own for a real one."""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from agop_book.agop import AGOP, agop, matrix_power, pearson, top_directions
from agop_book.book.models import gpt2
from agop_book.cntk import CNTK, patch_agop
from agop_book.convrfm import (
    ConvRFMClassifier,
    ConvRFMRegressor,
    DeepRFMClassifier,
    DeepRFMRegressor,
)
from agop_book.allcenters import AllCenters
from agop_book.explain import additivity_gap, directions, explain, feature_importances
from agop_book.iterative import Nystrom
from agop_book.kernels import KERNELS
from agop_book.maprfm import MapRFMClassifier, MapRFMRegressor
from agop_book.nfa import nfa
from agop_book.partfit import Sample
from agop_book.partials import Block
from agop_book.patches import most_like
from agop_book.rfm import RFMClassifier, RFMRegressor
from agop_book.scattering import Scattering
from agop_book.tensors import each
from agop_book.transfer import TransferRFM

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6)).astype(np.float32)
Y = X[:, 0] * X[:, 1]
SIGNS = np.where(Y > 0, "up", "down")
IMAGES = RNG.normal(size=(16, 1, 8, 8)).astype(np.float32)
SHADES = IMAGES[:, 0, :4].mean((1, 2))
PLAIN = dict(bandwidth=3.0, reg=1e-2, metric="full", center=True)
SMALL = Nystrom(sample=200, centers=60)
CASES = {}
NETWORKS = {}


def case(run):
    CASES[run.__name__] = run
    return run


def answers(model, rows=X):
    "What a fitted model says, as numbers."
    said = model.outputs(rows) if hasattr(model, "outputs") else model.predict(rows)
    return np.asarray(said)


# --- kernel machines

def with_kernel(name):
    def run(device):
        model = RFMRegressor(**{**PLAIN, "metric": "diag"}, kernel=name, n_iter=2, device=device)
        return answers(model.fit(X, Y))
    return run


for _name in KERNELS:
    CASES[f"kernel {_name}"] = with_kernel(_name)


@case
def regressor(device):
    model = RFMRegressor(**PLAIN, n_iter=2, device=device).fit(X, Y)
    staged = list(model.staged_predict(X))
    return answers(model), model.M_, *staged, model.transform(X), agop(model, X)


@case
def in_double(device):
    model = RFMRegressor(**PLAIN, n_iter=1, device=device).fit(X.astype(float), Y.astype(float))
    return answers(model, X.astype(float)), model.transform(X.astype(float)), agop(model, X)


@case
def warm_start(device):
    model = RFMRegressor(**PLAIN, n_iter=1, warm_start=True, device=device).fit(X, Y)
    return answers(model.set_params(n_iter=2).fit(X, Y))


@case
def channels(device):
    options = {**PLAIN, "n_iter": 1, "channels": 2, "device": device}
    return tuple(answers(RFMRegressor(**{**options, "metric": m}).fit(X, Y))
                 for m in ("shared", "separable"))


@case
def weighted(device):
    model = RFMRegressor(**PLAIN, n_iter=1, device=device)
    return answers(model.fit(X, Y, sample_weight=1 + np.arange(len(X)) % 3))


@case
def classifier(device):
    model = RFMClassifier(**PLAIN, n_iter=2, device=device).fit(X, SIGNS)
    return answers(model), model.predict_proba(X)


@case
def chosen(device):
    "Everything that is open is chosen: bandwidth, ridge, metric, rounds."
    return answers(RFMRegressor(random_state=0, n_iter=1, device=device).fit(X, Y))


@case
def explained(device):
    model = RFMRegressor(**PLAIN, n_iter=1, device=device).fit(X, Y)
    return np.asarray(explain(model, X[:3])), additivity_gap(model, X[:3])


@case
def importances(device):
    model = RFMRegressor(**PLAIN, n_iter=1, device=device).fit(X, Y)
    return feature_importances(model), np.abs(directions(model, 2).vectors)


@case
def iterative(device):
    model = RFMRegressor(**PLAIN, n_iter=1, solver=Nystrom(centers=40), device=device)
    return answers(model.fit(X, Y))


@case
def by_sample(device):
    rows = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    model = RFMRegressor(solver=SMALL, random_state=0, n_iter=1, device=device)
    return answers(model.fit(rows, rows[:, 0] * rows[:, 1]), rows)


@case
def all_centers(device):
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32))
    x, Y = rows.to(device), (rows[:, :1] * rows[:, 1:2]).to(device)
    ones = torch.ones(400, device=device)
    sample = Sample(x[:300], Y[:300], ones[:300], Block(x[300:], Y[300:], ones[300:]))
    made = AllCenters(sample, KERNELS["laplace"](1.0), torch.ones(4, device=device), 1e-4)
    return made.fit(1e-2)[0](x).cpu().numpy(), made.judged(1e-2).outputs.cpu().numpy()


@case
def maps(device):
    options = dict(channels=2, n_iter=1, device=device, bandwidth=3.0, reg=1e-2)
    return (answers(MapRFMRegressor(**options).fit(X, Y)),
            answers(MapRFMClassifier(**options).fit(X, SIGNS)))


@case
def lent(device):
    source = RFMRegressor(**PLAIN, n_iter=1, device=device).fit(X, Y)
    learner = RFMRegressor(**PLAIN, n_iter=1, device=device)
    model = TransferRFM(source, learner, mode="blend", weight=(1.0, 0.5), cv=2, random_state=0)
    return answers(model.fit(X[:40], Y[:40]))


# --- images

@case
def convolutional(device):
    options = dict(depth=2, n_iter=1, random_state=0, device=device)
    regression = ConvRFMRegressor(**options).fit(IMAGES, SHADES)
    classes = ConvRFMClassifier(**options, pooling=True).fit(IMAGES, SHADES > 0)
    return answers(regression, IMAGES), regression.transform(IMAGES), answers(classes, IMAGES)


@case
def deep(device):
    options = dict(depth=2, n_iter=1, random_state=0, device=device)
    return (answers(DeepRFMRegressor(**options).fit(IMAGES, SHADES), IMAGES),
            answers(DeepRFMClassifier(**options).fit(IMAGES, SHADES > 0), IMAGES))


@case
def cntk(device):
    x, kernel = torch.tensor(IMAGES, device=device), CNTK(2, 3)
    M = torch.diag(torch.arange(1.0, 10.0)).to(device)
    coef = torch.linspace(-1, 1, len(x), device=device)[:, None]
    return kernel(x), kernel(x, x[:5], M=M), patch_agop(kernel, x[:6], x, coef, M=M)


@case
def scattering(device):
    return Scattering(J=2, L=4, device=device).fit_transform(IMAGES)


@case
def patches(device):
    shown = torch.tensor(IMAGES[:, :, :3, :3], device=device)
    return np.array([likeness for _, likeness in most_like(shown)])


# --- networks

def network(build):
    NETWORKS[build.__name__] = build
    return build


@network
def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.tensor(X)


@network
def cnn():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 2)), torch.tensor(IMAGES)


class Reads(nn.Module):
    "The last state of a recurrent network."
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


@network
def lstm():
    return Reads(), torch.tensor(X).reshape(-1, 2, 3)


@network
def language_model():
    return gpt2(7, 6, n_layer=1, n_head=2, n_embd=8), torch.arange(30).reshape(5, 6) % 7


@network
def encoder():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1), torch.tensor(X).reshape(10, 6, 6)


def compared(build):
    "The ansatz in a network, with controls."
    def run(device):
        torch.manual_seed(0)
        model, data = build()
        return numbers_of_nfa(model, data, device)
    return run


def numbers_of_nfa(model, data, device):
    "The correlations in a network on a device, with all controls."
    def send(t):
        return t.to(device)

    initial = copy.deepcopy(model)
    with torch.no_grad():
        for p in initial.parameters():
            p.add_(0.1)
    table = nfa(model.eval().to(device), each(data, send), initial=initial.eval().to(device),
                progress=False, random_state=0, rotations=1)
    return table[["pearson", "cosine", "pearson_forced", "pearson_init"]].to_numpy(float)


for _name, _build in NETWORKS.items():
    CASES[f"nfa {_name}"] = compared(_build)


@case
def with_probes(device):
    torch.manual_seed(0)
    model, data = mlp()
    model, data = model.eval().to(device), data.to(device)
    sketch = agop(model, data, probes=2, random_state=0)
    loader = [data[:20], data[20:]]
    return (agop(model, data), agop(model, loader), agop(model, data, center=True),
            sketch.matrix if hasattr(sketch, "matrix") else sketch[0])


@case
def accumulated(device):
    total = AGOP(center=True)
    for rows in torch.tensor(X, device=device).reshape(6, 10, 6).split(2):
        total.update(rows)
    return total.matrix


@case
def matrices(device):
    A = torch.tensor(X.T @ X, device=device)
    return (matrix_power(A, 0.5), top_directions(A, 2),
            np.array([pearson(A, torch.eye(6, device=device))]))


@case
def trained_here(device):
    "A few steps of AdamW: the weights become those of the CPU."
    torch.manual_seed(0)
    model, data = mlp()
    model, data = model.to(device), data.to(device)
    target = torch.tensor(Y, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(data)[:, 0], target).backward()
        optimizer.step()
    return model[0].weight.detach()
