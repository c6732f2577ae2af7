"A network is watched and comes back as it was: checkpoints, modes, threads."

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import FEW, normal, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from agop_book.nfa import nfa
from agop_book.watch import watching

pytestmark = pytest.mark.usefixtures("seed", "nothing_left_behind")


class Deep(nn.Module):
    def __init__(self, widths, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths, widths[1:])
        )
        self.options = options

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, **self.options) if self.options else layer(x)
        return x


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (3, 6, 2, 5)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant, widths):
    model, x = Deep(widths, use_reentrant=reentrant).double(), normal(5, widths[0])
    table, sites = nfa(model, x, matrices=True, **FEW)
    model.options = {}
    want, wanted = nfa(model, x, matrices=True, **FEW)
    assert table.equals(want) and all(
        torch.equal(s.agop(), w.agop()) for s, w in zip(sites, wanted)
    )
    model.options = dict(use_reentrant=reentrant)
    y = model(x.requires_grad_())  # and checkpoints work again afterwards
    assert ("Checkpoint" in type(y.grad_fn).__name__) == reentrant
    y.sum().backward()


class Frozen(nn.Module):
    "A backbone under no_grad."

    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(
                nn.Linear(4, 4), nn.Tanh(), nn.MultiheadAttention(4, 2, batch_first=True)
            ),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        with torch.no_grad():
            h = self.backbone[:2](x)
            h = self.backbone[2](h, h, h)[0]
        return self.head(h)


def test_parts_under_no_grad():
    model, x = Frozen(), torch.randn(5, 3, 4)
    with pytest.warns(UserWarning, match=r"backbone.0.weight \(runs under torch.no_grad"):
        table = nfa(model, x, **FEW)
    assert list(table.site[table.reached]) == ["head"]
    with torch.no_grad():
        h = model.backbone[2](*(model.backbone[:2](x),) * 3)[0]
    assert np.allclose(table.pearson.iloc[-1], nfa(model.head, h, **FEW).pearson[0])


def test_inference_mode():
    model, x = Deep((4, 4, 4)), torch.randn(5, 4)
    want = nfa(model, x, **FEW)
    with torch.inference_mode():
        made, other = x.clone(), Deep((4, 4, 4))
        assert nfa(model, made, **FEW).equals(want)
    for data in (made, [made, made], {"x": made}):
        assert np.allclose(nfa(model, data, **FEW).pearson, want.pearson)
    with pytest.raises(ValueError, match=r"layers.0.0.weight.*inference_mode"):
        nfa(other, x, **FEW)


def test_one_model_from_several_threads():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), normal(8, 4)
    attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    want, stop = nfa(model, x, **FEW), threading.Event()

    def measure():
        tables = []
        for _ in range(5):
            tables.append(nfa(model, x, **FEW))
            nfa(attend, x.reshape(4, 2, 4), **FEW)
        return tables

    def infer():
        while not stop.is_set():
            model(x), attend(x[:, None])

    with ThreadPoolExecutor(4) as pool:
        other = pool.submit(infer)
        found = [pool.submit(measure) for _ in range(3)]
        try:
            tables = [table for future in found for table in future.result()]
        finally:
            stop.set()
        other.result()
    assert len(tables) == 15 and all(table.equals(want) for table in tables)
    assert all(p.requires_grad for p in model.parameters())


def test_a_watch_puts_everything_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2))
    with pytest.raises(KeyError), watching(model) as watch:
        assert [tap.name for tap in watch.taps] == ["0", "1.gates"] and not model[
            0
        ].weight.requires_grad
        raise KeyError("mine")
    assert model[0].weight.requires_grad and "forward" not in vars(model[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_vmap_is_told():
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return torch.vmap(lambda u: torch.tanh(self.W @ u))(x)

    with pytest.raises(
        ValueError, match="site 'W' runs inside torch.vmap|Site 'W' runs inside torch.vmap"
    ):
        nfa(Each(), torch.randn(5, 4), **FEW)


def test_complex_weights_are_called_complex():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.o = nn.Linear(4, 6, dtype=torch.complex128), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.o(self.c(x.to(torch.complex128)).real)

    with pytest.raises(TypeError, match="site 'c' multiplies complex numbers"):
        nfa(Both(), normal(5, 4), **FEW)
    assert nfa(Both(), normal(5, 4), only="o", **FEW).site.tolist() == ["o"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_named():
    model, x = small(), normal(5, 4)
    with pytest.raises(ValueError, match="TorchScript"):
        nfa(torch.jit.trace(model, x), x, **FEW)
    part = nn.Sequential(torch.jit.trace(model[:2], x), model[2])
    with pytest.warns(UserWarning, match="runs inside TorchScript"):
        assert nfa(part, x, **FEW).site.tolist() == ["1"]
