"""Do both machines hold the same model? Compared by digests of its configuration and weight files."""

from __future__ import annotations

import hashlib
import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from vllm_spark.errors import RefusedError

MIB = 1 << 20
_CONFIGURATION = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_WHOLE_UP_TO = 64 * MIB
_EDGE = 1 * MIB
_SAMPLES = 64
_SAMPLE = 64 << 10


class ModelIdentity(msgspec.Struct, frozen=True):
    """Digests by file name; equal identities mean the same model, up to sampling of very large files."""

    configuration: dict[str, str]
    weights: dict[str, str]

    @classmethod
    def of(cls, folder: Path, *, with_weights: bool = True) -> ModelIdentity:
        """Reads the model in `folder`; without weights if they are not loaded from there (dummy weights).

        Raises:
            RefusedError: the folder or a file cannot be read.
        """
        names = _names(folder)
        configuration = [name for name in _CONFIGURATION if name in names and _is_content(folder / name)]
        weights = _weights(folder, names) if with_weights else []
        return cls(*({name: _digest(folder / name) for name in chosen} for chosen in (configuration, weights)))

    def difference(self, other: ModelIdentity) -> str | None:
        """A sentence part that names what differs, read as "here" (self) and "there" (other); None if nothing."""
        for what, mine, theirs in (
            ("configuration", self.configuration, other.configuration),
            ("weight", self.weights, other.weights),
        ):
            for name in sorted(mine.keys() | theirs.keys()):
                if name not in mine:
                    return f"the {what} file {name} is missing here"
                if name not in theirs:
                    return f"the {what} file {name} exists only here"
                if mine[name] != theirs[name]:
                    return f"the {what} file {name} has other content here"
        return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise RefusedError(_unreadable(folder, error)) from None


def _weights(folder: Path, names: list[str]) -> list[str]:
    """What vLLM would load: a folder may hold the same weights in several formats, of which it takes the first."""
    for pattern in _WEIGHTS:
        if found := [name for name in names if fnmatchcase(name, pattern) and _is_content(folder / name)]:
            return found
    return []


def _is_content(path: Path) -> bool:
    """Whether it is a file, or cannot be looked at, which who reads it is told. Reading a pipe would not end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def find_model(model: str, revision: str | None) -> Path:
    """The folder of `model` on this machine: a path, or a model of the hub that was downloaded before.

    Raises:
        RefusedError: it is not there, may not be read, or is a single file.
    """
    path = Path(os.path.expanduser(model))  # leaves a user who does not exist
    is_path = path.is_absolute() or model.startswith((".", "~"))
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        if is_path:
            raise RefusedError(_unreadable(path, error)) from None
        mode = 0  # a name of the hub, seen from a folder that this user may not enter
    except OSError:
        mode = 0
    if stat.S_ISDIR(mode):
        return path
    if stat.S_ISREG(mode):
        raise RefusedError(
            f"{model} is a single file, which --spark does not serve; give a folder in Hugging Face format"
        )
    if is_path:
        raise RefusedError(f"there is no model in {model} on this machine; copy it there from the leader")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise RefusedError(f"{model} is no folder on this machine; copy the model to the same path") from None
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        command = f"hf download {model}" + (f" --revision {revision}" if revision else "")
        raise RefusedError(f"{model} is not on this machine; download it here too: {command}") from None


def _unreadable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be read ({error.strerror}); let the user that serves it read it"


def _digest(path: Path) -> str:
    """BLAKE2b over size and content; files over 64 MiB are sampled: both ends and 64 pieces between.

    Weight files are tens of gigabytes. Another checkpoint, quantization or fine-tune differs all over, and the
    start of a safetensors file lists every tensor; a single flipped byte may go unseen.
    """
    try:
        return _digest_of_content(path)
    except OSError as error:
        raise RefusedError(
            f"{path} cannot be read ({error.strerror}); the model must be complete here, and this user's to read"
        ) from None


def _digest_of_content(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _WHOLE_UP_TO:
            while block := file.read(MIB):
                digest.update(block)
        else:
            pieces = [(0, _EDGE), (size - _EDGE, _EDGE)]
            pieces += [(_EDGE + i * (size - 2 * _EDGE) // _SAMPLES, _SAMPLE) for i in range(_SAMPLES)]
            for offset, length in pieces:
                digest.update(os.pread(file.fileno(), length, offset))
    return digest.hexdigest()
