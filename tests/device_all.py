"""Every notebook and every family of networks on an emulated GPU: `make test-device`, a quarter of
an hour. What belongs to `make test` is in test_device.py."""
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import test_hub_families as hub
import torch
from conftest import notebooks
from emulated import emulated
from test_families import FAMILIES, has

import agop_book.nfa
from agop_book.nfa import nfa
from agop_book.tensors import each

TESTS = Path(__file__).parent
HUB = (hub.swin, hub.mixtral, hub.olmoe, hub.gpt_oss, hub.deepseek, hub.mamba, hub.deberta)
ALL = {**{name: build for name, (build, needs) in FAMILIES.items() if has(needs)},
       **{f"hub {build.__name__}": build for build in HUB if has("transformers")}}


def agops(build, device):
    "Names of the sites of a network and their AGOPs, computed on a device."
    def send(t):
        return t.to(device)

    torch.manual_seed(0)
    model, batch = build()
    model = model.float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # an expert without a token
        table, sites = nfa(model.to(device), each(batch, send), matrices=True, rotations=0,
                           progress=False, random_state=0)
    return list(table.site), [site.agop().cpu() for site in sites]


@pytest.mark.parametrize("name", ALL)
def test_family(name, monkeypatch):
    monkeypatch.setattr(agop_book.nfa, "compare", lambda *args: {})     # has tests of its own
    names, here = agops(ALL[name], "cpu")
    with emulated("cuda"):
        found, there = agops(ALL[name], "cuda")
    assert found == names
    for site, a, b in zip(names, here, there):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max(), site


@pytest.mark.parametrize("name", [name for name in notebooks() if name != "index.ipynb"])
def test_notebook(name, tmp_path):
    command = [sys.executable, str(TESTS / "on_device.py"), "cuda", str(tmp_path)]
    done = subprocess.run([*command, str(TESTS.parent / "nbs" / name)], text=True,
                          capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
