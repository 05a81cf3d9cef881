"""`vllm-spark estimate`: its table, files and errors, and that it loads neither torch nor vLLM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spark.cli import main
from vllm_spark.estimate.published import EAGLE3_HEAD
from vllm_spark.models.config import read_model_config

from .wires import wire_file

CODER = "qwen3-coder-30b-a3b-int4"


def estimated(tmp_path: Path, *words: str) -> dict[str, dict[str, object]]:
    """The candidates of the JSON file by name."""
    file = tmp_path / "estimate.json"
    assert main(["estimate", *words, "--json", str(file)]) == 0
    (content,) = json.loads(file.read_text())
    return {each["name"]: each for each in content["candidates"]}


def test_the_table_and_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", CODER, "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    for words in ("one machine", "two, vllm_spark", "two, NCCL", "routed experts", "tokens per second", "weights, GB"):
        assert words in printed
    assert "\nTP=2 pays: two machines make" in printed
    assert "collectives (vllm_spark) take" in printed
    assert re.search(r"hidden behind kernels\) .* \(0\.\d\d\) .* \(\d\.\d\d\) ", printed)
    assert main(["estimate", CODER, "--collective-us", "20"]) == 0
    assert "hidden" not in capsys.readouterr().out


def test_json_has_parts_that_add_up(tmp_path: Path) -> None:
    for each in estimated(tmp_path, CODER, "--speculate", "2", "--draft", "ngram").values():
        parts = each["parts"]
        assert isinstance(parts, list)
        assert sum(part["us"] for part in parts) == pytest.approx(each["step_us"])
        assert each["tokens_per_s"] == pytest.approx((1 + 0.6 + 0.36) / float(str(each["step_us"])) * 1e6)


def test_options_change_what_they_name(tmp_path: Path) -> None:
    def speed(*words: str) -> float:
        _, two, *_ = estimated(tmp_path, CODER, *words).values()
        return float(str(two["tokens_per_s"]))

    plain = speed()
    slow = wire_file(tmp_path / "wire.json", 40.0, 1.0)
    assert speed("--wire", str(slow)) < plain
    assert speed("--latency-us", "100") < plain
    assert speed("--memory-gbytes-per-s", "470") > 1.4 * plain
    assert speed("--context", "100000") < plain
    assert speed("--context", "50000", "--kv-cache-dtype", "fp8") > speed("--context", "50000")
    assert speed("--expert-parallel") < plain
    assert speed("--gpu", "h200") > 2 * plain
    assert (
        speed("--batch", "8", "--routing-skew", "0")
        < speed("--batch", "8")
        < speed("--batch", "8", "--routing-skew", "2")
    )
    assert speed("--batch", "8", "--routing-skew", "0.00") == speed("--batch", "8", "--routing-skew", "0")
    assert speed("--speculate", "3", "--draft", "ngram", "--acceptance", "1") > 2 * plain


def test_a_head_and_a_smaller_model_as_drafts(tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text(json.dumps(EAGLE3_HEAD))
    small = {**read_model_config("qwen3-32b-int4")[1], "num_hidden_layers": 2, "quantization_config": None}
    (tmp_path / "small.json").write_text(json.dumps(small))
    costs = []
    for draft in (str(head), str(tmp_path / "small.json")):
        (one, *_) = estimated(tmp_path, CODER, "--speculate", "1", "--draft", draft).values()
        parts = one["parts"]
        assert isinstance(parts, list)
        costs.append({part["name"]: part["us"] for part in parts}["draft"])
    assert costs[0] == pytest.approx(2132, rel=0.01)
    assert costs[1] > costs[0]


def test_the_plot_has_a_line_for_each_candidate(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    assert main(["estimate", CODER, "--plot", str(file), "--batches", "1,4"]) == 0
    drawn = file.read_text()
    assert drawn.startswith("<?xml")
    for line in ("one machine", "two, vllm_spark", "two, NCCL", "two, half of the batch each"):
        assert f"<!-- {line} -->" in drawn


def test_which_collectives_are_candidates(tmp_path: Path) -> None:
    rows = [
        {"candidate": "wire", "mode": "graph", "bytes": size, "median": us} for size, us in ((4096, 8), (1 << 20, 60))
    ]
    file = tmp_path / "collectives.json"
    file.write_text(json.dumps({"rows": rows}))
    assert list(estimated(tmp_path, CODER, "--collectives", str(file))) == ["one machine", "two, wire"]
    own, nccl = "two, vllm_spark, direct", "two, NCCL over host memory"
    assert list(estimated(tmp_path, CODER, "--gpu", "h200")) == ["one machine", own, nccl]
    over_the_link = ["one machine", "two, vllm_spark", "two, NCCL"]
    assert list(estimated(tmp_path, CODER, "--gpu", "h200", "--latency-us", "3")) == over_the_link
    assert list(estimated(tmp_path, CODER, "--collective-us", "12")) == ["one machine", "two, 12 us each"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "MODEL is missing"),
        ([CODER, "--published"], f"--published compares known set-ups, and takes no model; leave {CODER} out"),
        (["no-such-model"], "there is no model 'no-such-model' here"),
        ([CODER, "--gpu", "b200"], "there are no figures of the GPU 'b200'; known are gb10, h100, h200"),
        ([CODER, "--speculate", "1"], "the model has no layer that drafts; give another draft with --draft"),
        ([CODER, "--acceptance", "0.5"], "--acceptance 0.5 is for speculation; add --speculate, or leave it out"),
        ([CODER, "--draft", "ngram"], "--draft ngram is for speculation; add --speculate, or leave it out"),
        ([CODER, "--batches", "1,2"], "--batches 1,2 is for the plot; add --plot, or leave it out"),
        ([CODER, "--collective-us", "9", "--collectives", "x"], "--collectives and --collective-us contradict"),
        ([CODER, "--wire", "x", "--latency-us", "3"], "--wire x and --latency-us contradict each other"),
        ([CODER, "--plot", "plot.txt"], "--plot plot.txt must end in .png, .svg, .pdf"),
        ([CODER, "--json", "/no/such/folder/file"], "/no/such/folder/file"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *words]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--batch", "0"],
        ["--context", "9" * 30],
        ["--acceptance", "1.1"],
        ["--speculate", "65"],
        ["--routing-skew", "-1"],
    ],
)
def test_numbers_have_limits(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", CODER, *words]) == 2
    assert f"argument {words[0]}:" in capsys.readouterr().err


def test_neither_torch_nor_vllm_is_loaded() -> None:
    program = (
        "import sys; from vllm_spark.cli import main; "
        f"assert main(['estimate', {CODER!r}]) == 0 and main(['estimate', '--published']) == 0; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'vllm', 'triton', 'numpy', 'matplotlib', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
