"""Everything that is measured on two GPUs of one machine, in one command; figures, plots and logs go to a folder.

    python -m benchmarks.two_gpus FOLDER [--quick]

Needs vllm_spark with its kernels, vLLM's CUDA build, pytest and matplotlib in one environment; nccl4py too, or NCCL is
called through torch; compute-sanitizer, or it is left out. About 25 minutes; with --quick, fewer samples and no
torch.compile, about 10. A part that fails does not keep the next from running.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

COLLECTIVES = ("all_reduce", "all_gather", "logits_gather")


def parts(folder: Path, quick: bool) -> dict[str, list[str]]:
    """The command of each part, by name."""
    bench = [sys.executable, "-m", "vllm_spark", "bench"]
    samples = ["--samples", "20"] if quick else []
    steps = ["--steps", "100"] if quick else ["--rounds", "3"]
    commands = {"tests": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]}
    if shutil.which("compute-sanitizer") is not None:
        for tool in ("memcheck", "racecheck"):
            program = [sys.executable, "-m", "tests.gpu.every_kernel"]
            commands[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *program]
    for name in COLLECTIVES:
        files = ["--json", str(folder / f"{name}.json"), "--plot", str(folder / f"{name}.png")]
        commands[name] = [*bench, "collective", "--device", "cuda", "--collective", name, *samples, *files]
    for path in ("direct", "wire"):
        commands[f"calibrate-{path}"] = [
            *(*bench, "calibrate", "--path", path, "--out", str(folder / f"calibrate-{path}.json"))
        ]
    for name, extra in {"decode": [], "decode-compile": ["--compile"]}.items():
        files = ["--json", str(folder / f"{name}.json"), "--keep-logs", str(folder / f"{name}-logs")]
        commands[name] = [*bench, "decode", "--device", "cuda", "--profile", *steps, *extra, *files]
    if quick:
        del commands["decode-compile"]
    return commands


def main() -> int:
    """Runs all parts; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, command in parts(args.folder, args.quick).items():
        start = time.monotonic()
        with (args.folder / f"{name}.txt").open("w") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        print(f"== {name}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
        print((args.folder / f"{name}.txt").read_text()[-8000:], flush=True)
        failed += code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
