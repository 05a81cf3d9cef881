"""What the package imports, pip installs with it, or vLLM or an extra brings along."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"yaml": "pyyaml", "nccl": "nccl4py", "pydantic_core": "pydantic"}
"""Modules whose distribution has another name, or comes with another one."""

OF_VLLM = {
    *(
        "huggingface_hub",
        "numpy",
        "prometheus_client",
        "safetensors",
        "starlette",
        "torch",
        "transformers",
        "triton",
        "vllm",
    )
}
"""vLLM, and what comes with every build of it: only what works with vLLM imports these."""


OF_THE_USER = {"modelscope", "pyverbs"}
"""Used where the user has installed it: for VLLM_USE_MODELSCOPE, and for RDMA."""


def imported() -> dict[str, str]:
    """Each foreign module that is imported, with one of the files that do."""
    found = {}
    for path in sorted([*(ROOT / "vllm_spark").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name not in ("vllm_spark", "__future__"):
                    found[name] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = {name.lower().replace("-", "_") for name in re.findall(r'"([\w.-]+)[<>=]+', text)}
    undeclared = {
        name: file
        for name, file in imported().items()
        if name not in OF_VLLM | OF_THE_USER and DISTRIBUTIONS.get(name, name).lower() not in declared
    }
    assert undeclared == {}
