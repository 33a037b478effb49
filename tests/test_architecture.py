"""The order of the parts, held by reading imports from the syntax trees: who may import whom, how long a file may be.

An import counts wherever it stands: at the top, inside a function, or for type checking only. To allow a new edge, add
it to `ALLOWED` in the change that needs it; that line is what a reviewer looks at.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "scheduler", "server")

# module prefix -> what it may import besides the standard library and its own package; the longest prefix decides.
ALLOWED: dict[str, set[str]] = {
    # numpy: the noise on the host (kernels/philox.py), and what rules say of a step's rows (kernels/edits.py).
    "kernels": {"torch", "triton", "numpy"},
    # Rivals that may be installed where the report runs, imported inside functions.
    "kernels.gpu_report.installed": {"torch", "triton", "flash_attn", "flash_attn_interface", "flashinfer"},
    "scheduler": set(),
    "server": set(),
    "server.models": {"torch", "kernels", "safetensors", "huggingface_hub", "tqdm"},
    "server.worker": {
        "torch",
        "numpy",
        "kernels",
        "server.models",
        "scheduler.types",
        "scheduler.step_cost",
        "llguidance",
        "safetensors",
        # Progress of the capture of CUDA graphs at start.
        "tqdm",
    },
    "server.text": {"tokenizers", "jinja2", "transformers"},
    "server.engine": {"scheduler", "msgspec", "zmq"},
    "server.engine.loop": {"scheduler", "server.worker", "msgspec", "zmq"},
    "server.engine.offline": {"scheduler", "server.worker", "server.text", "server.models.locate"},
    "server.metrics": {"prometheus_client", "scheduler.types"},
    "server.api": {
        "fastapi",
        "starlette",
        "pydantic",
        "msgspec",
        "server.text",
        "server.metrics",
        "server.engine.client",
        "server.engine.config",
        "server.engine.decoding",
        "scheduler.types",
        "scheduler.policies",
    },
    "server.config": {
        "pydantic",
        "yaml",
        "scheduler.types",
        "server.engine.config",
        "server.api.settings",
        "server.values",
        "server.also",
        "server.groups",
    },
    "server.groups": {"server.config", "server.engine.config"},
    "server.also": {"server.engine.config"},
    # The names of diffusion policies.
    "server.values": {"pydantic", "scheduler.policies"},
    "server.flags": {"pydantic", "yaml", "server.config"},
    "server.protocol": {"uvicorn", "h11"},
    "server.banner": {"server.config", "server.engine.config", "server.engine.decoding"},
    "server.serve": {"*"},
    "server.__main__": {"*"},
    "server.embedded": {
        "torch",
        "numpy",
        "tokenizers",
        "safetensors",
        "tqdm",
        "matplotlib",
        "kernels",
        "server.models",
        "server.text",
        "server.engine.offline",
    },
    "server.embedded.train_head": {
        "torch",
        "kernels",
        "server.models",
        "server.worker",
        "server.embedded",
        "safetensors",
        "tokenizers",
        "tqdm",
    },
    "server.embedded.measure_drafters": {
        "torch",
        "scheduler.types",
        "server.models",
        "server.worker",
        "server.embedded",
        "tokenizers",
        "tqdm",
    },
    # Load generators: an ordinary client of any server, so nothing of ours.
    "server.bench": {"tqdm", "matplotlib"},
    # The tasks of the embedded models are data; they are asked for as any text is.
    "server.bench.diffusion_work": {"server.embedded.tasks", "server.embedded.functions"},
    # The step-time benchmark runs the engine's own parts in-process.
    "server.bench.steps": {"torch", "tqdm", "kernels", "scheduler", "server.models", "server.worker", "server.engine"},
    "server.bench.engine_alone": {"scheduler.types", "server.engine.offline"},
    "server.bench.drafting": {"scheduler.types", "server.engine", "server.models.locate", "server.text.tokenizer"},
    # So does the end-to-end part of the GPU report, beside transformers' engine.
    "server.bench.gpu_loads": {"torch", "kernels.gpu_report", "scheduler", "server.engine", "server.models"},
    "server.bench.transformers_peer": {"torch", "transformers", "server.models"},
    "server.bench.gpu_serving": {"torch", "kernels.gpu_report", "server.engine", "server.models"},
    # So does the quality benchmark of denoising, on the tasks of the embedded models.
    "server.bench.parallel": {
        "tqdm",
        "matplotlib",
        "scheduler",
        "server.engine",
        "server.embedded.tasks",
        "server.embedded.canvases",
    },
    # And the one of sparse attention, which looks into the models and asks the embedded one that retrieves.
    "server.bench.sparse": {
        "torch",
        "tqdm",
        "matplotlib",
        "safetensors",
        "kernels",
        "scheduler",
        "server.engine",
        "server.models",
        "server.worker",
        "server.text.tokenizer",
        "server.embedded.pairs",
        "server.embedded.corpus",
    },
}

# Only functions may import these: at the top they would slow every start or be missing on a plain install.
LAZY_ONLY = {
    ("server.text", "transformers"),
    ("server.bench", "transformers"),
    ("server.bench", "matplotlib"),
    ("server.embedded", "matplotlib"),
}

MAX_LINES = 300
MAX_LINES_KERNEL_OR_SCHEMA = 400
MAX_LINES_TEST = 400
# path -> (limit, reason). Raising a limit is a visible change with a reason.
LINE_LIMITS: dict[str, tuple[int, str]] = {}

FRONT_END = ("server.api.app", "server.engine.client", "server.config", "server.metrics")
ENGINE_SIDE = (
    "scheduler.scheduler",
    "kernels.select",
    "server.worker.build",
    "server.engine.loop",
    "server.engine.offline",
    "server.bench.gpu_serving",
)
HEAVY = ("torch", "transformers", "kernels", "server.worker", "server.models")
OWN_WEB = ("server.api", "server.metrics", "server.config")
WEB = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", *OWN_WEB)

# Ways to run bytes as code. Weights are safetensors, messages are msgpack.
BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec"}
BANNED_ATTRIBUTES = {
    ("torch", "load"): "safetensors are the only weights we read",
    ("yaml", "load"): "yaml.safe_load",
    ("multiprocessing", "Queue"): "it pickles; msgpack over the link",
    ("multiprocessing", "Manager"): "it pickles; msgpack over the link",
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports_of(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every (statement, module) the file imports; `from server.engine import client` gives `server.engine.client`."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node, submodule if base.split(".")[0] in PACKAGES and is_module(submodule) else base


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule_for(module: str) -> str:
    return max((prefix for prefix in ALLOWED if under(module, prefix)), key=len)


def own_package(module: str) -> str:
    """The folder a module imports freely: `server.engine` for `server.engine.loop`, `kernels` for `kernels.cpu.ops`."""
    parts = module.split(".")
    if parts[0] != "server":
        return parts[0]
    return ".".join(parts[:2])


def forbidden(module: str, target: str) -> bool:
    if target.split(".")[0] in sys.stdlib_module_names or under(target, own_package(module)):
        return False
    allowed = ALLOWED[rule_for(module)]
    return "*" not in allowed and not any(under(target, name) for name in allowed)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_follows_an_allowed_edge(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {target}; {rule_for(module_name(path))} may import "
        f"{sorted(ALLOWED[rule_for(module_name(path))]) or 'the standard library'}"
        for path in sources(package)
        for node, target in imports_of(path)
        if forbidden(module_name(path), target)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_scheduler_imports_only_the_standard_library() -> None:
    outside = {
        target.split(".")[0]
        for path in sources("scheduler")
        for _, target in imports_of(path)
        if target.split(".")[0] not in sys.stdlib_module_names
    }
    assert outside <= {"scheduler"}


def test_optional_and_slow_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {library} outside a function"
        for path in sources("server")
        for node, target in imports_of(path)
        for package, library in LAZY_ONLY
        if under(module_name(path), package) and under(target, library) and node.col_offset == 0
    ]
    assert not wrong, "\n".join(wrong)


def line_limit(path: Path) -> int:
    relative = path.relative_to(ROOT)
    if str(relative) in LINE_LIMITS:
        return LINE_LIMITS[str(relative)][0]
    if relative.parts[0] == "tests":
        return MAX_LINES_TEST
    if relative.parts[0] == "kernels" or relative.stem.startswith("schema"):
        return MAX_LINES_KERNEL_OR_SCHEMA
    return MAX_LINES


def test_no_file_is_longer_than_its_limit() -> None:
    files = sources(*PACKAGES, "tests", "docker") + [
        path for suffix in ("*.cpp", "*.h", "*.hpp", "*.cu") for path in (ROOT / "kernels").rglob(suffix)
    ]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    long = [f"{p.relative_to(ROOT)}: {n} lines, limit {line_limit(p)}" for p, n in lengths.items() if n > line_limit(p)]
    assert not long, "\n".join(long)


def test_every_exception_to_the_line_limit_names_a_file_and_a_reason() -> None:
    for path, (limit, reason) in LINE_LIMITS.items():
        assert (ROOT / path).exists(), f"{path} is gone; drop its exception"
        assert limit > MAX_LINES, path
        assert len(reason) > 20, path


def test_every_folder_has_a_readme() -> None:
    folders = {path.parent for path in sources(*PACKAGES) if path.read_text().strip()}
    folders |= {ROOT / name for name in (*PACKAGES, "configs", "docker", "tests") if (ROOT / name).is_dir()}
    without = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "README.md").exists())
    assert not without, f"no README.md in {without}"


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
    assert not [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if path.stem in drawers or path.parent.name in drawers
    ]


def dangerous(path: Path) -> Iterator[str]:
    where = path.relative_to(ROOT)
    for node, target in imports_of(path):
        if target.split(".")[0] in BANNED_MODULES:
            yield f"{where}:{node.lineno} imports {target}"
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Call):
            function = part.func
            if isinstance(function, ast.Name) and function.id in BANNED_CALLS:
                yield f"{where}:{part.lineno} calls {function.id}"
            if any(keyword.arg == "allow_pickle" for keyword in part.keywords):
                yield f"{where}:{part.lineno} uses allow_pickle"
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            reason = BANNED_ATTRIBUTES.get((part.value.id, part.attr))
            if reason:
                yield f"{where}:{part.lineno} uses {part.value.id}.{part.attr}: {reason}"


def test_nothing_runs_bytes_as_code() -> None:
    found = [problem for path in sources(*PACKAGES, "docker") for problem in dangerous(path)]
    assert not found, "\n".join(found)


def test_the_rules_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above read real trees; this one feeds them a bad file, so that a blind check cannot pass."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "scheduler" / "bad.py"
    bad.parent.mkdir()
    bad.write_text(
        "import torch\nfrom server.worker import build\nimport json\n\n"
        "def f():\n    import pickle\n    eval('1')\n    torch.load('x')\n"
    )
    targets = [target for _, target in imports_of(bad) if forbidden("scheduler.bad", target)]
    assert targets == ["torch", "server.worker"]
    assert [problem.split(" ", 1)[1].split(":")[0] for problem in dangerous(bad)] == [
        "imports pickle",
        "calls eval",
        "uses torch.load",
    ]


def loaded_after_importing(module: str) -> set[str]:
    code = f"import {module}, sys; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"import {module} failed:\n{result.stderr}"
    return set(result.stdout.split())


@pytest.mark.parametrize("module", FRONT_END)
def test_the_front_end_loads_no_tensor_library(module: str) -> None:
    if not is_module(module):
        pytest.skip(f"{module} is not written yet")
    assert sorted(name for name in loaded_after_importing(module) if name in HEAVY) == []


@pytest.mark.parametrize("module", ENGINE_SIDE)
def test_the_engine_side_loads_no_web_library_nor_what_only_some_requests_need(module: str) -> None:
    """On a machine with torch and little more, the engine serves all but structured output."""
    loaded = loaded_after_importing(module)
    assert sorted(name for name in loaded if name in (*WEB, "llguidance", "transformers", "matplotlib")) == []


def test_the_load_generator_loads_neither_torch_nor_the_server() -> None:
    loaded = loaded_after_importing("server.bench.__main__")
    assert sorted(name for name in loaded if name in (*HEAVY, *WEB, "matplotlib", "numpy")) == []


def test_transformers_does_not_take_our_kernels_folder_for_the_package_of_that_name() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr


def test_the_kernels_package_init_imports_nothing_and_is_version_zero() -> None:
    """Some transformers versions import `kernels` when they are imported themselves and compare its version."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    values = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert "0.0.0" in values
