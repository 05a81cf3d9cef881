"""docs/grafana/pair.json: a dashboard whose every metric of this project is one that the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.backend.metrics import SparkCollector
from vllm_spark.backend.status import STATUS_VARIABLE, EngineStatus, RankCounters

FILE = Path(__file__).parents[2] / "docs" / "grafana" / "pair.json"
METRIC = re.compile(r"\bvllm(?:_spark_|:)\w+")


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def named() -> set[str]:
    """Every metric of a query."""
    return {name for query in queries() for name in METRIC.findall(query)}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The labels of each sample that a leader exports."""
    monkeypatch.setenv(STATUS_VARIABLE, "")
    status = EngineStatus.create()
    status.write(RankCounters(0, rail_posts=(1,), rail_bytes=(1,), rail_doorbells=(1,)))
    samples = [sample for family in SparkCollector(status).collect() for sample in family.samples]
    status.unpublish()
    return {sample.name: set(sample.labels) for sample in samples}


def test_every_metric_of_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    own = {name for name in named() if name.startswith("vllm_spark_")}
    assert own - exported.keys() == set()


def test_every_exported_metric_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    assert exported.keys() - named() == set()


def test_labels_that_legends_name(exported: dict[str, set[str]]) -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for name in METRIC.findall(target["expr"]):
                if name.startswith("vllm_spark_"):
                    assert labels <= exported[name], target


def test_panels_do_not_overlap_and_are_described() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)


def test_metrics_of_vllm_exist_in_its_source() -> None:
    loggers = pytest.importorskip("vllm").__path__[0]
    source = (Path(loggers) / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    for name in named():
        if name.startswith("vllm:"):
            assert f'"{name.removesuffix("_bucket").removesuffix("_total")}"' in source, name
