"""The way of the settings from a command line into vLLM's engine arguments, without vLLM."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.entrypoints import command_line
from vllm_spark.errors import ConfigurationError


def test_flags_of_rank_1_beat_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun both ranks are started alike, and MASTER_ADDR names the leader."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLMSPARK_PORT", "1111")
    monkeypatch.setenv("VLLMSPARK_MAX_FRAME_MIB", "7")
    followed: list[tuple[SparkConfig, bool]] = []

    def supervise(config: SparkConfig, *, once: bool) -> int:
        followed.append((config, once))
        return 5

    monkeypatch.setattr("vllm_spark.entrypoints.join.supervise", supervise)
    with pytest.raises(SystemExit) as end:
        command_line.run_serve(argparse.Namespace(spark=True, spark_port=2222), lambda: None)
    assert end.value.code == 5
    ((config, once),) = followed
    assert (config.leader, config.port, config.max_frame_mib, once) == ("127.0.0.5", 2222, 7, True)


@pytest.mark.parametrize("value", ["maybe", '"false"', '"true"', "1", "[yes]"])
def test_spark_in_a_config_file_is_true_or_false(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM makes `--spark VALUE` of it, and argparse would take VALUE for the model or drop it."""
    path = tmp_path / "serve.yaml"
    path.write_text(f"max-model-len: 512\nspark: {value}\n")
    for words in (["--config", str(path)], [f"--config={path}"], ["--spark", "--config", str(path)]):
        monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", *words])
        with pytest.raises(SystemExit) as end:
            command_line.add_option_group(argparse.ArgumentParser())
        assert end.value.code == 2
        sentence = capsys.readouterr().err
        assert "for spark, which is neither true nor false; write `spark: true`" in sentence
        assert str(path) in sentence


@pytest.mark.parametrize("content", ["spark: true", "spark: false", "port: 8001", "- a list", "spark: [a"])
def test_without_spark_other_problems_of_a_config_file_are_vllms(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", "--config", str(path)])
    command_line.add_option_group(argparse.ArgumentParser())


def test_settings_are_resolved_once_and_stay_in_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLMSPARK_DEPTH", "8")
    args = argparse.Namespace(spark=True, spark_port=2222, additional_config={"mine": 1})
    config = command_line.request_pair(args)
    assert config is not None
    assert (config.port, config.depth) == (2222, 8)
    assert args.additional_config == {"mine": 1, "spark": config}
    assert repr(config) == "SparkConfig(port=2222, depth=8)", "as vLLM logs it"
    monkeypatch.setenv("VLLMSPARK_DEPTH", "invalid")
    assert command_line.request_pair(args) is config


def test_a_section_of_the_command_line_requests_a_pair_and_yields_to_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--additional-config '{"spark": {"port": 3333}}'`, with and without `--spark`."""
    monkeypatch.setenv("VLLMSPARK_DEPTH", "8")
    section = {"spark": {"port": 3333, "depth": 4, "max_frame_mib": 9}}
    for given in ({}, {"spark": True}):
        args = argparse.Namespace(additional_config=dict(section), **given)
        config = command_line.request_pair(args)
        assert config is not None
        assert (config.port, config.depth, config.max_frame_mib) == (3333, 8, 9)
        assert args.additional_config == {"spark": config}
    config = command_line.request_pair(argparse.Namespace(spark=True, spark_port=2222, additional_config=section))
    assert config is not None
    assert (config.port, config.depth) == (2222, 8)


def test_an_invalid_section_of_the_command_line_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for section, sentence in (
        ({"port": 0}, "port 0 is invalid: must be a whole number from 1 to 65535"),
        (5, "additional_config['spark'] is 5; give a dictionary"),
    ):
        with pytest.raises(SystemExit) as end:
            command_line.run_serve(
                argparse.Namespace(additional_config={"spark": section}), lambda: pytest.fail("vLLM's command was run")
            )
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err


def test_arguments_without_spark_stay_as_they_are() -> None:
    args = argparse.Namespace(model="a model")
    assert command_line.request_pair(args) is None
    assert command_line.run_serve(args, lambda: "served") == "served"
    assert command_line.create_engine_arguments(args, lambda: "made") == "made"
    assert vars(args) == {"model": "a model"}
    assert command_line.create_configuration(argparse.Namespace(additional_config=None), lambda: "made") == "made"


def test_a_setting_without_spark_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.run_serve(argparse.Namespace(spark_port=2222), lambda: pytest.fail("vLLM's command was run"))
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "vllm serve --spark: --spark-port was given without --spark; add --spark, or leave it out.\n"
    )


def test_settings_of_a_program_that_are_not_a_dictionary() -> None:
    with pytest.raises(ConfigurationError, match=r"additional_config\['spark'\] is 5; give a dictionary"):
        command_line.create_configuration(argparse.Namespace(additional_config={"spark": 5}), lambda: "made")
