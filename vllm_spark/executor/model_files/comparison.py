"""Do both machines hold the same files? Compared by digests of what vLLM loads from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from vllm_spark.errors import RefusedError
from vllm_spark.executor.model_files.weights import is_content, weight_files
from vllm_spark.files import TABLE_FILE, open_regular, read_regular

MIB = 1 << 20
_WHOLE_UP_TO = 64 * MIB
_EDGE = 1 * MIB
_SAMPLES = 64
_SAMPLE = 64 << 10

Kind = Literal["model", "tokenizer", "adapter", "file"]
"""What vLLM reads: a model, what a worker needs to tokenize and to process images and sound, an adapter, one file."""

_CONFIGURATION: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json", "params.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    "tokenizer": (
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
        *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
        *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    ),
    "adapter": ("adapter_config.json",),
    "file": (),
}
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # the first counts
_MODULES = "modules.json"  # lists folders of layers that sentence-transformers puts after a model
_FOLDERS_WITH_WEIGHTS = ("whisper-large-v3", "speech_tokenizer")  # that models of vLLM read beside their own
_FILES_WITH_WEIGHTS = ("colbert_linear.pt", "sparse_linear.pt")


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """Digests by file name; equal identities mean the same content, up to sampling of very large files."""

    configuration: dict[str, str]
    weights: dict[str, str]

    @classmethod
    def of(
        cls,
        place: Path,
        *,
        with_weights: bool = True,
        kind: Kind = "model",
        with_code: bool = False,
        with_tokenizer: bool = False,
        load_format: str = "hf",
    ) -> ModelIdentity:
        """Reads what vLLM would load from `place`, a folder or a single file.

        Args:
            place: where it is on this machine.
            with_weights: False if they are not loaded from there (dummy weights, object storage).
            kind: what it is.
            with_code: whether Python files in it may be executed (`--trust-remote-code`).
            with_tokenizer: whether a worker reads the tokenizer's and the processor's files there too.
            load_format: how vLLM loads a model's weights; not `auto`.

        Raises:
            RefusedError: the folder or a file cannot be read.
        """
        if kind == "file" or os.path.isfile(place):
            return cls({}, {place.name: file_digest(place)} if with_weights or kind == "file" else {})
        names = _names(place)
        wanted = _CONFIGURATION[kind] + (_CONFIGURATION["tokenizer"] if with_tokenizer else ())
        configuration = [name for name in wanted if name in names and is_content(place / name)]
        if with_code:
            configuration += [name for name in names if name.endswith(".py") and is_content(place / name)]
        weights = _weights(place, names, kind, load_format) if with_weights else []
        if kind == "model":
            more_configuration, more_weights = _beside(place, names)
            configuration += more_configuration
            weights += [name for name in more_weights if name not in weights] if with_weights else []
        return cls(*({name: file_digest(place / name) for name in chosen} for chosen in (configuration, weights)))

    @property
    def digests(self) -> dict[str, str]:
        """Of configuration and weights together."""
        return {**self.configuration, **self.weights}

    def difference(self, other: ModelIdentity, here: str = "here") -> str | None:
        """A sentence part that names what differs; None if nothing.

        Args:
            other: what this one is compared with.
            here: where this one is, as the sentence calls it.
        """
        for what, mine, theirs in (
            ("configuration", self.configuration, other.configuration),
            ("weight", self.weights, other.weights),
        ):
            for name in sorted(mine.keys() | theirs.keys()):
                if name not in mine:
                    return f"the {what} file {name} is missing {here}"
                if name not in theirs:
                    return f"the {what} file {name} exists only {here}"
                if mine[name] != theirs[name]:
                    return f"the {what} file {name} has other content {here}"
        return None


Signature = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size in bytes and time of change in nanoseconds of files."""


def signature_of(place: Path) -> Signature:
    """Name, inode, size and time of change of every file in a folder (or of one file): changes when they do.

    Costs some microseconds a file. An empty one stands for a place that cannot be looked at.
    """
    try:
        files = sorted(place.iterdir()) if os.path.isdir(place) else [place]
        states = [(file.name, file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise RefusedError(unreadable(folder, error)) from None


def _weights(folder: Path, names: list[str], kind: Kind, load_format: str) -> list[str]:
    """What vLLM would load: a folder may hold the same weights in several formats."""
    if kind == "adapter":
        return [name for name in _ADAPTER_WEIGHTS if name in names and is_content(folder / name)][:1]
    return weight_files(folder, names, load_format) if kind == "model" else []


def _beside(folder: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Configuration and weight files that some models of vLLM load too, by their names relative to `folder`."""
    configuration: list[str] = []
    weights = [name for name in _FILES_WITH_WEIGHTS if name in names and is_content(folder / name)]
    if _MODULES in names and is_content(folder / _MODULES):
        configuration.append(_MODULES)
    for inner in sorted({*_module_folders(folder, names), *(name for name in _FOLDERS_WITH_WEIGHTS if name in names)}):
        below = folder / inner
        if os.path.isdir(below):
            files = _names(below)
            configuration += [f"{inner}/config.json"] if "config.json" in files else []
            weights += [f"{inner}/{name}" for name in weight_files(below, files, "hf")]
    return configuration, weights


def _module_folders(folder: Path, names: list[str]) -> list[str]:
    if _MODULES not in names or not is_content(folder / _MODULES):
        return []
    try:
        modules = json.loads(read_regular(folder / _MODULES, TABLE_FILE))
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # its digest is compared all the same, and vLLM says what is wrong with it
    return [path for path in paths if isinstance(path, str) and path and "/" not in path and path != ".."]


def unreadable(folder: Path, error: OSError) -> str:
    """The sentence for a folder that this user may not read."""
    return f"{folder} cannot be read ({error.strerror}); let the user that serves it read it"


_digests: dict[tuple[str, int, int, int], str] = {}
"""Of files as they were read before. Models are looked at again and again while a refusal is not remedied."""


def file_digest(path: Path) -> str:
    """BLAKE2b over size and content; files over 64 MiB are sampled: both ends and 64 pieces between.

    Weight files are tens of gigabytes. Another checkpoint, quantization or fine-tune differs all over, and the
    start of a safetensors file lists every tensor; a single flipped byte may go unseen.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            state = os.fstat(file.fileno())
            key = (f"{state.st_dev}:{path}", state.st_ino, state.st_size, state.st_mtime_ns)
            if key not in _digests:
                _digests[key] = _digest_of_content(file.fileno(), state.st_size)
            return _digests[key]
    except OSError as error:
        raise RefusedError(
            f"{path} cannot be read ({error.strerror}); the model must be complete here, and this user's to read"
        ) from None


def _digest_of_content(descriptor: int, size: int) -> str:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= _WHOLE_UP_TO:
        pieces = [(offset, MIB) for offset in range(0, size, MIB)]
    else:
        pieces = [(0, _EDGE), (size - _EDGE, _EDGE)]
        pieces += [(_EDGE + i * (size - 2 * _EDGE) // _SAMPLES, _SAMPLE) for i in range(_SAMPLES)]
    for offset, length in pieces:
        digest.update(os.pread(descriptor, length, offset))
    return digest.hexdigest()
