"""Writes the tables that come with this project: `python -m vllm_spark.tune.fused_moe.published`.

They are made of the sets in `configs/published/`. Rows around those of a set are the installed vLLM's own choice;
serving replaces them by those of its own version.
"""

from __future__ import annotations

from pathlib import Path

from vllm_spark.compat.versions import installed_vllm, vllm_source
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.compile import kernel_source
from vllm_spark.kernels.fused_moe.published import published_sets, published_table
from vllm_spark.kernels.fused_moe.table import store_fused_moe_table
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows


def write_tables(configs: Path, folder: Path) -> list[Path]:
    """Writes a table for each set in `configs` into `folder`, and returns their paths.

    Raises:
        ConfigurationError: vLLM, whose choice the other rows have, is not installed; a set is invalid, or has no row
            that differs from vLLM's choice; or a table cannot be written.
    """
    if installed_vllm() is None or kernel_source() is None:
        raise ConfigurationError("vLLM, whose own choice the tables have in most rows, is not installed; install it")
    version = vllm_source()
    written = []
    for name, published in published_sets(configs).items():
        table, provenance = published_table(published, {"vllm": version})
        if not effective_rows(table.rows, provenance, published.shape.table, published.device):
            raise ConfigurationError(
                f"each row of the published set {name} is what vLLM {version} chooses itself; remove the set, or use "
                "another version of vLLM"
            )
        place = folder / fused_moe_table.FOLDER
        written.append(store_fused_moe_table(published.shape.table, published.device, table, provenance, place))
    return written


def main() -> None:
    """Writes the tables into `configs/`."""
    for path in write_tables(configs_folder(), configs_folder()):
        print(path)


if __name__ == "__main__":
    main()
