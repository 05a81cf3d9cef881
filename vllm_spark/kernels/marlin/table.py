"""Tables of Marlin's parameters: one JSON file for a kernel, a shape and a device.

The file's name is made of what is in it (`MarlinShape.file_name`), as vLLM does for its FusedMoE tables, so that a
table is found without reading others and a broken one costs one shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from vllm_spark.files import atomic_write_text
from vllm_spark.kernels.table import Provenance, explained, read_json, row_numbers

FOLDER = "marlin"
"""Folder of these tables, in `configs/` and in a user's folder of tuned tables."""

Kernel = Literal["moe_w13", "moe_w2", "dense"]


class MarlinShape(BaseModel):
    """The shape of one GEMM of one rank: [rows, size_k] times [size_k, size_n] for each expert.

    Attributes:
        kernel: `moe_w13` (an expert's gate and up), `moe_w2` (its down), `dense` (any other linear layer).
        experts: of this rank; 1 for `dense`.
        top_k: experts of a token, for both kernels of the experts; 1 for `dense`.
        size_n: output width.
        size_k: input width.
        group_size: weights that share a scale; -1 if a whole column does.
        quant_type: name of vLLM's scalar type: `uint4b8` (GPTQ), `uint4` (AWQ), `float4_e2m1f` (MXFP4).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Kernel
    experts: StrictInt = Field(gt=0)
    top_k: StrictInt = Field(gt=0)
    size_n: StrictInt = Field(gt=0)
    size_k: StrictInt = Field(gt=0)
    group_size: StrictInt = Field(ge=-1)
    quant_type: str

    def file_name(self, device: str) -> str:
        """The name of the table for `device`, a name as in `devices.device_file_name`."""
        experts = "" if self.kernel == "dense" else f",E={self.experts},top_k={self.top_k}"
        return (
            f"kernel={self.kernel}{experts},N={self.size_n},K={self.size_k},group_size={self.group_size},"
            f"quant_type={self.quant_type},device_name={device}.json"
        )


class MarlinParameters(BaseModel):
    """Parameters of the kernel for one number of rows.

    Attributes:
        thread_k: a block's tile along the input; -1, with `thread_n`: the kernel's own rule.
        thread_n: a block's tile along the output.
        blocks_per_sm: thread blocks started for each multiprocessor, 1 to 4; -1 with the kernel's own rule.
        block_size_m: rows of one expert in a tile, which vLLM chooses; the entry holds for this value only.
            None for `dense`, where the kernel chooses.
        use_atomic_add: add partial sums of a column straight into the output.
        use_fp32_reduce: pass partial sums on in float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    thread_k: StrictInt = -1
    thread_n: StrictInt = -1
    blocks_per_sm: StrictInt = -1
    block_size_m: StrictInt | None = None
    use_atomic_add: StrictBool = False
    use_fp32_reduce: StrictBool = True

    @property
    def uses_default_tile(self) -> bool:
        """Whether the kernel chooses tile and blocks itself."""
        return self.thread_k == -1 and self.thread_n == -1 and self.blocks_per_sm == -1

    @property
    def has_effect(self) -> bool:
        """Whether they change anything in vLLM's call."""
        return not self.uses_default_tile or self.use_atomic_add or not self.use_fp32_reduce

    @property
    def blocks(self) -> int:
        """Blocks for each multiprocessor, if a tile is given: -1 means 1 to the kernel."""
        return 1 if self.blocks_per_sm == -1 else self.blocks_per_sm


class MarlinRow(MarlinParameters):
    """Parameters with their provenance."""

    provenance: Provenance | None = None


class MarlinTable(BaseModel):
    """A table: the shape, the device, and parameters for some numbers of rows.

    Attributes:
        device: as in `devices.device_file_name`.
        shape: what it is for.
        models: for people: whose layers have this shape, at which tensor-parallel size.
        rows: tokens of a step (for both kernels of the experts, whatever `top_k` makes of it) to parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    shape: MarlinShape
    models: tuple[str, ...] = ()
    rows: Annotated[dict[int, MarlinRow], BeforeValidator(row_numbers)] = Field(min_length=1)

    @property
    def file_name(self) -> str:
        """The file name that this table must have."""
        return self.shape.file_name(self.device)

    @property
    def effective_rows(self) -> list[int]:
        """The rows that change a call, in ascending order."""
        return sorted(rows for rows, entry in self.rows.items() if entry.has_effect)

    def row(self, rows: int) -> MarlinRow | None:
        """The entry for a step of `rows` tokens: the nearest, of two the smaller; None below the smallest row and above
        the largest, where vLLM's rule applies.
        """
        if not min(self.rows) <= rows <= max(self.rows):
            return None
        return self.rows[min(sorted(self.rows), key=lambda known: abs(known - rows))]


def load_marlin_table(path: Path) -> MarlinTable:
    """The table in `path`.

    Raises:
        ConfigurationError: it cannot be read or is not such a table; the message names the file and the fault.
    """
    with explained(path, "Marlin table"):
        return MarlinTable.model_validate(read_json(path))


def store_marlin_table(table: MarlinTable, folder: Path) -> Path:
    """Writes `table` atomically into `folder`, which is created if needed, and returns the file's path.

    Raises:
        ConfigurationError: it cannot be written.
    """
    path = folder / table.file_name
    ordered = table.model_copy(update={"rows": dict(sorted(table.rows.items()))})
    atomic_write_text(path, ordered.model_dump_json(indent=2, exclude_none=True) + "\n", "table")
    return path
