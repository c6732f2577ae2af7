"""What a public repository has: workflows and a citation that are well formed and agree with
settings.ini, texts whose links and commands exist."""
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = ["README.md", "CONTRIBUTING.md"]
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
SCHEMAS = {"CITATION.cff": "citation-file-format",
           **{f".github/workflows/{p.name}": "github-workflows" for p in WORKFLOWS}}


@pytest.mark.skipif(not find_spec("check_jsonschema"), reason="check-jsonschema is not installed")
@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    command = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{SCHEMAS[name]}"]
    done = subprocess.run([sys.executable, *command, "--force-filetype", "yaml", ROOT / name],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def read(path):
    "A workflow; YAML 1.1 reads its key `on` as True."
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@each_workflow
def test_workflows_may_do_little(path):
    "They read the source, nothing else, unless a job says so; there are no secrets to lose."
    workflow, text = read(path), path.read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"} and "secrets" not in text
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items()
               if "permissions" in job}
    allowed = {"deploy": {"pages": "write", "id-token": "write"}, "publish": {"id-token": "write"}}
    assert granted.items() <= allowed.items()
    checkouts = text.count("actions/checkout@")
    assert text.count("persist-credentials: false") == checkouts


@each_workflow
def test_actions_have_a_version(path):
    steps = [s for job in read(path)["jobs"].values() for s in job.get("steps", ())]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and [u for u in used if not re.fullmatch(r"[\w/-]+@(release/)?v\d+", u)] == []


def test_the_workflows_take_the_oldest_python(settings):
    matrix = read(ROOT / ".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]
    oldest, newest = matrix["python"]
    assert oldest == settings["min_python"]
    assert tuple(map(int, newest.split("."))) > tuple(map(int, oldest.split(".")))
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_citation_is_of_this_version(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["version"]
    assert citation["repository-code"] == settings["git_url"]
    assert citation["references"][0]["doi"] == "10.1126/science.adi5639"


def test_contributing_is_the_front_page_of_the_workshop(copy_book, plain_env, tmp_path):
    book = copy_book(tmp_path, "docs/contributing.py", "nbs/workshop/index.ipynb")
    subprocess.run([sys.executable, book / "docs/contributing.py"], env=plain_env, check=True)
    written = (book / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert written == (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "run `make export`"


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_commands_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S))
    named = re.findall(r"`make (\w+)", text) + re.findall(r"^make (\w+)", blocks, re.M)
    assert named and set(named) <= targets


def test_every_requirement_has_a_reason(settings):
    "Each is named in the comments of settings.ini."
    lines = (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()
    reasons = " ".join(line for line in lines if line.startswith("#")).lower()
    parts = [settings[key].split() for key in settings if key.endswith("requirements")]
    names = [re.match(r"[\w.-]+", r)[0].lower() for part in parts for r in part]
    assert len(names) > 40 and [n for n in names if n not in reasons] == []
