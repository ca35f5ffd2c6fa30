"""Training and evaluation of a policy import no package that a bare GPU machine lacks.

`benchmarks/gpu_packages.txt` lists what is on that machine and what is carried to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LIST = ROOT / "benchmarks" / "gpu_packages.txt"
PACKAGES = ("ppo", "modeling", "config", "environments")
MODULES = ("rlhf.evaluation", "rlhf.gates")

#: Hides packages as if they were not installed: optional imports find nothing and go on.
SCRIPT = """
import importlib, json, sys

hidden, modules = json.loads(sys.argv[1])

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failures[module] = str(error)
print(json.dumps(failures))
"""


def packages():
    """Names and given versions of the list's packages, by where they come from."""
    sources = {}
    for line in LIST.read_text().splitlines():
        if line and not line.startswith("#"):
            source, requirement = line.split()
            name, _, version = requirement.partition("==")
            sources.setdefault(source, {})[canonicalize_name(name)] = version
    return sources


def requirements(name):
    """What a package needs without its extras."""
    found = (Requirement(text) for text in metadata.requires(name) or ())
    return [r for r in found if not r.marker or r.marker.evaluate({"extra": ""})]


def with_requirements(names):
    """Packages and everything that is installed with them."""
    closure, left = set(), [*names]
    while left:
        name = left.pop()
        if name not in closure:
            closure.add(name)
            left += [canonicalize_name(r.name) for r in requirements(name)]
    return closure


def failures(modules, names):
    """Messages of the modules that can't be imported where only these packages are installed."""
    hidden = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if module != "rlhf" and not {canonicalize_name(d) for d in distributions} & names
    ]
    assert {"flows", "tasks"} < {*hidden}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([hidden, modules])],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def bare_machine():
    sources = packages()
    return with_requirements([*sources["machine"], *sources["wheels"]])


def test_every_module_is_imported_without_prefect_trl_and_boto3():
    modules = [*MODULES]
    for package in PACKAGES:
        files = sorted((ROOT / "rlhf" / package).rglob("*.py"))
        parts = (path.relative_to(ROOT).with_suffix("").parts for path in files)
        modules += [".".join(p).removesuffix(".__init__") for p in parts]
    assert len(modules) > 40
    names = bare_machine()
    assert not names & {"prefect", "trl", "datasets", "boto3", "cyclopts", "beartype"}
    assert failures(modules, names) == {}


def test_packages_are_hidden():
    """The test above would fail."""
    modules = ["rlhf.sft", "rlhf.store.s3", "rlhf.report.render", "flows.cli"]
    assert [*failures(modules, bare_machine() - {"jinja2"})] == modules


def test_carried_packages_fit_each_other():
    sources = packages()
    assert sources.keys() == {"wheels", "trl", "machine", "machine-tests", "machine-trl"}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for name in sources["wheels"]:
        assert metadata.version(name) == pins[name]
        for requirement in requirements(name):
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier
            assert canonicalize_name(requirement.name) in sources["wheels"]
    for name, version in sources["trl"].items():
        assert version or name in pins
