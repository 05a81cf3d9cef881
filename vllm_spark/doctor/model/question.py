"""What `vllm-spark doctor MODEL` asks each machine about a model, as a record that is sent to the other one."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.memory.need import MemoryNeed


@dataclasses.dataclass(frozen=True)
class ModelQuestion:
    """A model that is to be served.

    Attributes:
        name: a path of the asking machine, or a name on the hub.
        need: what a rank allocates of its machine's memory, in bytes; no weights if that is not known.
        token_bytes: that a rank keeps in its KV cache for each token; 0 if none, or not known.
        longest: tokens of the longest sequence that the model takes; 0 if it is not known.
        has_files: whether the model has files: the configurations that come with this project have none.
        files: as the asking machine has them; None on that machine itself, and if they are not complete there.
        sends_files: whether the asking machine sends what the other one lacks.
    """

    name: str
    need: MemoryNeed
    token_bytes: Annotated[int, Field(ge=0)] = 0
    longest: Annotated[int, Field(ge=0)] = 0
    has_files: bool = True
    files: LoadedFiles | None = None
    sends_files: bool = True
