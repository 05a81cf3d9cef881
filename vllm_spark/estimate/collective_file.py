"""Collectives as `vllm-spark bench collective --json FILE` measured them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from vllm_spark.errors import ConfigurationError
from vllm_spark.estimate.collectives import NCCL_BYTES, NCCL_HIDDEN, OWN_HIDDEN, Collectives
from vllm_spark.files import TABLE_FILE, read_regular
from vllm_spark.records import first_fault

_REMEDY = "write one: vllm-spark bench collective --json FILE"


class _Row(BaseModel):
    candidate: str
    mode: str
    bytes: Annotated[int, Field(gt=0)]
    median: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    collective: Literal["all_reduce"] = "all_reduce"


class _Report(BaseModel):
    rows: list[_Row]
    settings: _Settings = _Settings()


def load_collectives(path: Path) -> tuple[Collectives, ...]:
    """Every candidate whose all-reduce was measured in CUDA graphs, in the order of the file.

    Raises:
        ConfigurationError: the file cannot be read, has times of another collective than an all-reduce, or no times in
            graphs of two sizes or more.
    """
    try:
        report = _Report.model_validate_json(read_regular(path, TABLE_FILE))
    except OSError as error:
        raise ConfigurationError(f"the collectives {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    except ValidationError as error:
        raise ConfigurationError(f"the collectives {path} are invalid: {first_fault(error)}; {_REMEDY}") from None
    times: dict[str, dict[int, float]] = {}
    for row in report.rows:
        if row.mode == "graph":
            times.setdefault(row.candidate, {})[row.bytes] = row.median
    found = tuple(_collectives(name, sizes) for name, sizes in times.items() if len(sizes) > 1)
    if not found:
        raise ConfigurationError(f"the collectives {path} have no times in CUDA graphs of several sizes; {_REMEDY}")
    return found


def _collectives(name: str, sizes: dict[int, float]) -> Collectives:
    nccl = name.lower().startswith("nccl")
    hidden, rank_bytes = (NCCL_HIDDEN, NCCL_BYTES) if nccl else (OWN_HIDDEN, 0.0)
    return Collectives(name, tuple(sorted(sizes.items())), None, hidden, rank_bytes=rank_bytes)
