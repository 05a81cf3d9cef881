"""Environment variables: their prefix, their old names, and names that other software uses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vllm_spark.config.settings import (
    ENABLE_VARIABLE,
    SECRET_VARIABLE,
    SparkConfig,
    enabled_by_environment,
    environment_warnings,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.processes.managed import LAUNCH_VARIABLES
from vllm_spark.variables import find_variable, old_name, variable_name

ROOT = Path(__file__).parents[2]
KUBERNETES = {
    "PORT": "tcp://10.96.0.7:29650",
    "PORT_29650_TCP": "tcp://10.96.0.7:29650",
    "PORT_29650_TCP_ADDR": "10.96.0.7",
    "PORT_29650_TCP_PORT": "29650",
    "PORT_29650_TCP_PROTO": "tcp",
    "SERVICE_HOST": "10.96.0.7",
    "SERVICE_PORT": "29650",
    "SERVICE_PORT_HTTP": "29650",
}
"""Ends of the names of the variables that Kubernetes sets in a pod for one Service, with their values."""
APACHE_SPARK = (
    *("AUTH_SECRET", "CONF_DIR", "CONNECT_MODE", "DAEMON_MEMORY", "DRIVER_MEMORY", "EXECUTOR_CORES", "LAUNCHER"),
    *("HOME", "LOCAL_DIRS", "LOCAL_HOSTNAME", "LOCAL_IP", "LOG_DIR", "MASTER", "MASTER_HOST", "MASTER_PORT"),
    *("PID_DIR", "PUBLIC_DNS", "REMOTE", "SCALA_VERSION", "SHUFFLE_OPTS", "USER", "WORKER_CORES", "WORKER_PORT"),
)
"""Ends of the names of Apache Spark's variables."""


@pytest.mark.parametrize("name", SparkConfig.model_fields)
def test_a_setting_is_read_from_its_old_variable_too(name: str) -> None:
    now, before = variable_name(name), f"SPARK_{name.upper()}"
    assert (now, before) == (f"VLLMSPARK_{name.upper()}", old_name(now))
    assert find_variable(now, {}) is find_variable(now, {now: "", before: ""}) is None
    assert find_variable(now, {now: "1"}) == (now, "1")
    assert find_variable(now, {before: "1"}) == find_variable(now, {now: "", before: "1"}) == (before, "1")
    assert find_variable(now, {now: "1", before: "1"}) == find_variable(now, {now: "1", before: ""}) == (now, "1")
    assert environment_warnings({now: "1", before: "1"}) == environment_warnings({before: ""}) == []
    assert environment_warnings({before: "1"}) == [
        f"Variables have their old names, which the next release will not read; rename {before} to {now}."
    ]


def test_old_variables_have_an_effect_and_one_warning() -> None:
    old = {"SPARK_PORT": "4711", "SPARK_DEPTH": "8", "SPARK_ENABLE": "1", "SPARK_SECRET": "one of sixteen bytes"}
    config = SparkConfig.resolve(environment=old)
    assert (config.port, config.depth) == (4711, 8)
    assert enabled_by_environment(old)
    assert load_secret(config, "10.0.0.1", old) == b"one of sixteen bytes"
    (warning,) = environment_warnings(old)
    for name in old:
        assert f"{name} to VLLM{name}" in warning


def test_an_invalid_value_is_reported_with_the_name_of_its_variable() -> None:
    with pytest.raises(ConfigurationError, match=r"^SPARK_PORT http is invalid: must be "):
        SparkConfig.resolve(environment={"SPARK_PORT": "http"})
    with pytest.raises(ConfigurationError, match=r"^SPARK_ENABLE=maybe is neither"):
        enabled_by_environment({"SPARK_ENABLE": "maybe"})
    with pytest.raises(ConfigurationError, match=r"^the secret in SPARK_SECRET has 5 bytes"):
        load_secret(SparkConfig(), "10.0.0.1", {"SPARK_SECRET": "short"})


def test_different_values_of_both_names_are_an_error_that_names_both_and_no_secret() -> None:
    for variable, read in (
        (variable_name("port"), lambda both: SparkConfig.resolve(environment=both)),
        (ENABLE_VARIABLE, enabled_by_environment),
        (SECRET_VARIABLE, lambda both: load_secret(SparkConfig(), "10.0.0.1", both)),
    ):
        with pytest.raises(ConfigurationError) as caught:
            read({variable: "a value of the new name", old_name(variable): "another value"})
        assert str(caught.value) == (
            f"{variable} and {old_name(variable)}, its old name, have different values; "
            f"set {variable}, and unset {old_name(variable)}"
        )


@pytest.mark.parametrize(
    "others",
    [
        {f"SPARK_{name}": value for name, value in KUBERNETES.items()},
        {f"VLLM_SPARK_{name}": value for name, value in KUBERNETES.items()},
        {f"SPARK_{name}": "7077" for name in APACHE_SPARK},
    ],
    ids=["Service spark", "Service vllm-spark", "Apache Spark"],
)
def test_variables_of_other_software_are_ignored(others: dict[str, str]) -> None:
    assert SparkConfig.resolve(environment=others) == SparkConfig()
    assert environment_warnings(others) == []
    assert SparkConfig.resolve(environment={**others, "VLLMSPARK_PORT": "4711"}).port == 4711


def test_a_service_of_this_name_is_explained_and_the_rest_of_its_variables_ignored() -> None:
    service = {f"VLLMSPARK_{name}": value for name, value in KUBERNETES.items()}
    with pytest.raises(ConfigurationError) as caught:
        SparkConfig.resolve(environment=service)
    assert str(caught.value) == (
        "VLLMSPARK_PORT tcp://10.96.0.7:29650: it is not a port but the address of a Service; Kubernetes sets "
        'VLLMSPARK_PORT for a Service named "vllmspark": rename the Service, or set `enableServiceLinks: false` for '
        "the pod"
    )
    assert environment_warnings(service) == []


@pytest.mark.parametrize("prefix", ["VLLMSPARK_", "SPARK_", "VLLM_SPARK_"])
def test_misspelt_variables_are_named(prefix: str) -> None:
    for written, meant in (("ADRESS", "ADDRESS"), ("PROT", "PORT"), ("JOINTIMEOUT", "JOIN_TIMEOUT")):
        assert environment_warnings({prefix + written: "x"}) == [
            f"The variable {prefix}{written} is not read; did you mean VLLMSPARK_{meant}?"
        ]


def test_a_child_gets_neither_names() -> None:
    for name in ("VLLMSPARK_PORT", "SPARK_PORT", "VLLMSPARK_SECRET", "SPARK_SECRET"):
        assert LAUNCH_VARIABLES.match(name)


def test_one_module_defines_the_prefix() -> None:
    found = []
    for path in (ROOT / "vllm_spark").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or id(node) in documentation:
                continue
            if isinstance(node.value, str) and "SPARK_" in node.value:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value}")
    assert {line.partition(":")[0] for line in found} == {"vllm_spark/variables.py"}, found
