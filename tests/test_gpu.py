"The command that checks and times a GPU: to its end on a CPU, one file, and again from there."
import json
from functools import partial

import pytest
import torch

from agop_book.book import gpu
from agop_book.book.gpu_checks import CHECKS
from agop_book.book.gpu_times import TIMES, traffic

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("AGOP_BOOK_SCALE", "quick")
    monkeypatch.setenv("AGOP_BOOK_DEVICE", "cpu")
    monkeypatch.setenv("AGOP_BOOK_OUT", str(tmp_path))


def test_it_runs_to_its_end(tmp_path, capsys):
    assert gpu.main(["--device", "cpu"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["device"] == "cpu" and record["rates"]["bytes/s"] > 0
    assert list(record["parts"]) == list(gpu.all_parts())
    assert len(record["parts"]) == len(CHECKS) + len(TIMES)
    for name, part in record["parts"].items():
        assert "error" not in part, (name, part)
        if name.startswith("check"):
            assert part["difference"] < 1e-8, name      # the CPU against itself
    assert "not as they should be: none" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(tmp_path, capsys):
    calls = []

    def part(name, device, rates):
        calls.append(name)
        if name == "b" and calls.count("b") == 1: raise MemoryError("too large")
        return {"seconds": 1.0}

    parts = {name: (partial(part, name), 1) for name in "abc"}
    file = tmp_path / "gpu.json"
    first = gpu.run_parts(file, CPU, parts=parts)
    assert calls == ["a", "b", "c"] and first["parts"]["b"]["error"] == "MemoryError: too large"
    again = gpu.run_parts(file, CPU, parts=parts)
    assert calls == ["a", "b", "c", "b"] and again["parts"]["b"]["seconds"] == 1.0
    assert json.loads(file.read_text()) == again
    file.write_text(json.dumps({**again, "device": "another card"}))
    gpu.run_parts(file, CPU, parts=parts)
    assert calls[4:] == ["a", "b", "c"]
    capsys.readouterr()


def test_nothing_is_begun_without_time(capsys):
    assert gpu.main(["--seconds", "0"]) == 1
    assert "check rfm: no time left; the same command goes on" in capsys.readouterr().out


def test_a_check_that_fails_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "difference", lambda name, device: float(name == "rfm"))
    monkeypatch.setattr(gpu, "TIMES", {})
    assert gpu.main([]) == 1
    assert "not as they should be: check rfm\n" in capsys.readouterr().out


def test_traffic_counts_what_is_read_and_written():
    a, b = torch.ones(100, 50), torch.ones(50, 20)
    assert traffic(lambda: a @ b) == 4 * (100 * 50 + 50 * 20 + 100 * 20)
    assert traffic(lambda: a.T[:3].reshape(-1, 1)) == 4 * 2 * 3 * 100      # views are free
