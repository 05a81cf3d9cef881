"""The initramfs: what a machine needs until this host's root is mounted, as a cpio archive in memory.

It holds a static busybox, the few modules for 9p and overlay, `init.sh`, and the paths that this needs. Every other
module is loaded later with the host's own modprobe, from the cache folder.
"""

from __future__ import annotations

import io
import lzma
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from .errors import CannotRun
from .kernel import Kernel

EARLY_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
AGENT = Path(__file__).with_name("agent.py")
INIT = Path(__file__).with_name("init.sh")
FOLDERS = ("bin", "dev", "host", "layer", "modules", "proc", "root", "sys")


def initramfs(kernel: Kernel, shared: Path) -> bytes:
    """The archive for this kernel, and machines that share the folder `shared` with the host.

    Raises:
        CannotRun: busybox or a module is missing.
    """
    archive = Archive()
    for folder in FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, _busybox())
    archive.add("init", stat.S_IFREG | 0o755, INIT.read_bytes())
    paths = {"modules": kernel.modules, "shared": shared, "python": sys.executable, "agent": AGENT}
    lines = [f"{name}={shlex.quote(str(path))}\n" for name, path in paths.items()]
    archive.add("paths", stat.S_IFREG | 0o644, "".join(lines).encode())
    # The kernel opens this one before there is a /dev.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for position, module in enumerate(_with_dependencies(kernel, EARLY_MODULES)):
        archive.add(f"modules/{position:02d}-{module.name.split('.')[0]}.ko", stat.S_IFREG | 0o644, _decompress(module))
    return archive.finish()


class Archive:
    """A cpio archive in the "newc" format, which the kernel unpacks."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._entries = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Adds a file, a folder or a device, whose folder must have been added before."""
        self._entries += 1
        encoded = name.encode() + b"\0"
        owner_and_group, links, modified, checksum, filesystem = (0, 0), 1, 0, 0, (0, 0)
        fields = (
            *(self._entries, mode, *owner_and_group, links, modified, len(content)),
            *(*filesystem, *device, len(encoded), checksum),
        )
        self._bytes.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._align()
        self._bytes.write(content)
        self._align()

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return self._bytes.getvalue()

    def _align(self) -> None:
        self._bytes.write(bytes(-self._bytes.tell() % 4))


def _busybox() -> bytes:
    path = shutil.which("busybox")
    if path is None:
        raise CannotRun("the program busybox is missing (Debian package busybox-static)")
    return Path(path).read_bytes()


def _with_dependencies(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """The files of these modules and of all that they need, in the order in which they can be loaded."""
    needs: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        file, _, dependencies = line.partition(":")
        files[_module_name(file)] = file
        needs[_module_name(file)] = [_module_name(needed) for needed in dependencies.split()]
    built_in = {_module_name(file) for file in (kernel.modules / "modules.builtin").read_text().split()}
    ordered: list[str] = []

    def load(name: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise CannotRun(f"kernel {kernel.version} has no module {name}; delete {kernel.root} to fetch another one")
        for needed in needs[name]:
            load(needed)
        ordered.append(name)

    for name in names:
        load(name)
    return [kernel.modules / files[name] for name in ordered]


def _module_name(file: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", file.rpartition("/")[2]).replace("-", "_")


def _decompress(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", str(module)], capture_output=True, timeout=60, check=True).stdout
    return module.read_bytes()
