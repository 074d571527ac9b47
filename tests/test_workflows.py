"""The workflows of .github: what they run is there, what they fetch is pinned, and they may do no more than read."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="the tests are not in a checkout")
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path: Path) -> str:
    return "\n".join(step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step)


def test_there_are_workflows_for_each_purpose():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheels"]


@each_workflow
def test_a_workflow_may_read_and_nothing_else(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in workflow["jobs"].items() if "permissions" in job] == []
    assert "secrets." not in path.read_text()
    checkouts = [step for job in workflow["jobs"].values() for step in job["steps"] if "actions/checkout" in step.get("uses", "")]
    assert len(checkouts) == len(workflow["jobs"])
    assert all(step["with"] == {"persist-credentials": False} for step in checkouts)
    # YAML 1.1 reads the key `on` as True. This trigger would run the code of strangers with the rights of the repository.
    assert "pull_request_target" not in workflow[True]


@each_workflow
def test_a_workflow_pins_what_it_fetches(path):
    """Actions by commit, with their version beside it, packages and machines by version."""
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []
    installed = [package for line in re.findall(r"pip install (.*)", commands(path)) for package in line.split()]
    assert [package for package in installed if "==" not in package] == []
    for job in jobs(path).values():
        machines = job.get("strategy", {}).get("matrix", {}).get("runner", [job["runs-on"]])
        assert all(re.fullmatch(r"ubuntu-\d\d\.\d\d(-arm)?", machine) for machine in machines)
        assert 0 < job["timeout-minutes"] <= 120


def test_workflows_agree_on_the_version_of_an_action():
    used = {tuple(action.split("@")) for path in WORKFLOWS for action in re.findall(r"uses: (.*)", path.read_text())}
    assert len(used) == len({name for name, _ in used})


def test_every_target_of_make_that_is_run_exists():
    """In workflows and in the script of continuous integration."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = {path.name: commands(path) for path in WORKFLOWS} | {"run": (ROOT / ".ci/run").read_text()}
    run = {(name, target) for name, text in texts.items() for target in re.findall(r"^ *make ([\w-]+)", text, re.MULTILINE)}
    assert {"lint", "test", "docs", "build"} <= {target for _, target in run}
    assert {(name, target) for name, target in run if target not in targets} == set()


def test_files_that_workflows_and_cibuildwheel_name_exist():
    named = re.findall(r"\{project\}/([\w/.]+)", (ROOT / "pyproject.toml").read_text())
    paths = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())[True]["pull_request"]["paths"]
    named += [path.removesuffix("/**") for path in paths]
    assert len(named) > 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_wheels_are_built_for_the_pythons_that_the_package_names():
    text = (ROOT / "pyproject.toml").read_text()
    built = set(re.findall(r'"cp3(\d+)-manylinux\*"', text))
    assert set(re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)) <= built
    (oldest,) = re.findall(r'requires-python = ">=3\.(\d+)"', text)
    assert min(map(int, built)) == int(oldest)
