"""`vllm-spark doctor` as a command, and the secret that it makes for both machines."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spark.cli import main
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import is_bare, run_checks
from vllm_spark.doctor.pair import other_secret
from vllm_spark.doctor.system import System
from vllm_spark.errors import EXIT_LOST, EXIT_PROBLEM, EXIT_REFUSED, EXIT_USAGE, EXIT_WARNINGS, ConfigurationError
from vllm_spark.executor.channel.secret import load_secret, make_secret, same_secret_command
from vllm_spark.processes.local import free_ports
from vllm_spark.processes.managed import Process, clean_environment, program

LINK = "10.0.0.1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has nothing yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("VLLMSPARK_SECRET", raising=False)
    return tmp_path / "config"


def spark(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`vllm-spark ARGV` as a process, to its end."""
    environment = clean_environment() | {"XDG_CONFIG_HOME": str(home)}
    return subprocess.run(
        [program("vllm-spark"), *argv], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# --- the secret ------------------------------------------------------------------------------------------------------


def test_a_secret_is_made_and_found(home: Path) -> None:
    done = spark(home, "doctor", "--make-secret")
    assert done.returncode == 0, done.stderr
    path = home / "vllm-spark" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(bytes.fromhex(path.read_text())) == 32
    assert f"scp -p {path} OTHER:{path}" in done.stdout
    assert "by default" in done.stdout
    assert load_secret(SparkConfig(), LINK) == path.read_bytes().strip()


def test_a_secret_is_never_overwritten(home: Path) -> None:
    assert spark(home, "doctor", "--make-secret").returncode == 0
    path = home / "vllm-spark" / "secret"
    before = path.read_bytes()
    done = spark(home, "doctor", "--make-secret")
    assert done.returncode == 2
    assert f"{path} exists already" in done.stderr
    assert path.read_bytes() == before


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="exists already"):
        make_secret(tmp_path / "secret")
    assert not (tmp_path / "elsewhere").exists()


def test_a_secret_in_another_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new folder" / "secret"
    before = os.umask(0)
    try:
        assert main(["doctor", "--make-secret", str(path)]) == 0
    finally:
        os.umask(before)
    output = capsys.readouterr().out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert f"--spark-secret-file '{path}', " in output
    assert f"scp -p '{path}' OTHER:'{path}'" in output
    assert load_secret(SparkConfig(secret_file=path), LINK) == path.read_bytes().strip()


def test_below_the_home_folder_the_other_machines_home_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert main(["doctor", "--make-secret"]) == 0
    assert "OTHER:.config/vllm-spark/secret" in capsys.readouterr().out
    assert main(["doctor", "--make-secret=~/secret"]) == 0
    assert f"    scp -p {tmp_path}/secret OTHER:secret\n" in capsys.readouterr().out


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["doctor", "--make-secret", str(tmp_path / "file" / "secret")]) == 2
    assert "--make-secret PATH" in capsys.readouterr().err


def test_which_secret_counts(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="make one with `vllm-spark doctor --make-secret`"):
        load_secret(SparkConfig(), LINK)
    default = home / "vllm-spark" / "secret"
    make_secret(default)
    make_secret(tmp_path / "given")
    assert load_secret(SparkConfig(), LINK) == default.read_bytes().strip()
    given = SparkConfig(secret_file=tmp_path / "given")
    assert load_secret(given, LINK) == (tmp_path / "given").read_bytes().strip()
    variable = {"VLLMSPARK_SECRET": "the one of the variable"}
    assert load_secret(SparkConfig(), LINK, variable) == b"the one of the variable"
    default.chmod(0o644)
    with pytest.raises(ConfigurationError, match=r"secret is open to other users \(mode 0644\); chmod 600"):
        load_secret(SparkConfig(), LINK)


def test_on_loopback_the_users_own_secret_counts_as_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file meant for the other machine, perhaps unusable, does not keep a demo from running."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    make_secret(home / "vllm-spark" / "secret")
    own = load_secret(SparkConfig(), "127.0.0.1")
    assert own == (tmp_path / "state" / "vllm-spark" / "loopback.secret").read_bytes().strip()


def test_join_finds_the_secret_by_itself(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    make_secret(home / "vllm-spark" / "secret")
    environment = clean_environment() | {"XDG_CONFIG_HOME": str(home)}
    process = Process(
        "vllm-spark join", [program("vllm-spark"), "join", "--leader", "10.255.0.1"], tmp_path / "log", environment
    )
    try:
        process.wait_for_line(r"Waiting for a leader at 10\.255\.0\.1", 60)
    finally:
        process.terminate()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--json", "--make-secret"], ["--json", "leave one out"]),
        (["--make-secret", "~no-such-user/secret"], ["--make-secret", "no home folder for '~no-such-user/secret'"]),
        (["--peer", "--make-secret"], ["--make-secret", "not allowed with"]),
        (["--wait", "0"], ["--wait", "'0' is not a number above 0"]),
        (["--wait", "long"], ["--wait", "'long' is not a number above 0 and at most 86400"]),
        (["--leader", "desk1"], ["--leader", "desk1", "not an IP address"]),
        (["--slot-kib", "64"], ["--slot-kib"]),
    ],
)
def test_bad_input(home: Path, argv: list[str], parts: list[str]) -> None:
    done = spark(home, "doctor", *argv)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_no_exit_code_means_two_things(home: Path) -> None:
    """A script tells a pair that cannot work from a word that was mistyped, and either from a crash."""
    assert len({0, 1, EXIT_USAGE, EXIT_REFUSED, EXIT_LOST, EXIT_WARNINGS, EXIT_PROBLEM}) == 7
    assert spark(home, "doctor", "--peeer").returncode == EXIT_USAGE
    page = " ".join(spark(home, "doctor", "--help").stdout.split())
    assert (
        "exit code: 0 no problems, 5 only warnings, 6 a problem that keeps the pair from working, 2 wrong usage" in page
    )


def test_a_machine_with_nothing_is_told_so_and_what_still_works(home: Path) -> None:
    if not is_bare(run_checks(System(), SparkConfig())):
        pytest.skip("this machine has an RDMA device or a GPU")
    done = spark(home, "doctor")
    assert done.returncode == EXIT_PROBLEM
    assert "no RDMA device" in done.stdout
    assert "vllm-spark demo" in done.stdout
    assert len(done.stdout.splitlines()) < 8
    report = json.loads(spark(home, "doctor", "--json").stdout)
    assert [found["id"] for found in report["machine"]["findings"]] == ["rdma.devices", "gpu.driver"]


def test_a_named_leader_is_checked_with_machine_and_software(home: Path) -> None:
    """Without an RDMA device too: the secret is what keeps two machines apart most often."""
    port = free_ports(1)[0]
    done = spark(home, "doctor", "--leader", f"127.0.0.1:{port}", "--json")
    found = {finding["id"]: finding for finding in json.loads(done.stdout)["machine"]["findings"]}
    assert found["link.port"]["value"] == f"127.0.0.1:{port} can be reached, nothing listens there now"
    assert "software.secret" in found
    assert {name.partition(".")[0] for name in found} >= {"machine", "software"}


def test_the_whole_examination_of_this_machine(home: Path) -> None:
    """Whatever it is: no check stumbles, and the exit code is what the report says."""
    port = str(free_ports(1)[0])
    done = spark(home, "doctor", "--peer", "--wait", "0.1", "--address", "127.0.0.1", "--port", port, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == EXIT_PROBLEM
    assert "A check that failed" not in [found["title"] for found in report["machine"]["findings"]]
    assert report["pair"][0]["id"] == "pair.peer"


def test_examining_imports_neither_vllm_nor_torch() -> None:
    """It shall answer at once, and also where those cannot be loaded."""
    code = (
        "import sys\n"
        "from vllm_spark.cli import doctor\n"
        "from vllm_spark.config.settings import SparkConfig\n"
        "from vllm_spark.doctor.checks import run_checks\n"
        "from vllm_spark.doctor.system import System\n"
        "run_checks(System(), SparkConfig(), '10.0.0.2', thorough=True)\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--wait", "5"], "--wait 5 is the time that --peer and --first-run wait; add one of them, or leave it out"),
        (["--peer", "--leader", LINK], f"--leader {LINK} is an option of the second machine"),
        (["--make-secret", "--wait", "5"], "--wait does not go with --make-secret"),
        (["--make-secret", "--port", "5"], "--port does not go with --make-secret"),
        (["--make-secret", "--json"], "--json does not go with --make-secret"),
    ],
)
def test_no_option_is_ignored(words: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == EXIT_USAGE
    assert sentence in capsys.readouterr().err
    assert not home.exists()


def test_messages_name_the_flags_of_the_command_that_was_typed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`vllm-spark join` has `--port`, which `vllm serve` has as `--spark-port`."""
    assert main(["join", "--leader", f"{LINK}:29650", "--port", "29651"]) == EXIT_USAGE
    assert f"--leader {LINK}:29650 and --port 29651 are different ports" in capsys.readouterr().err
    absent = str(tmp_path / "absent")
    assert main(["join", "--leader", LINK, "--secret-file", absent]) == EXIT_USAGE
    assert "give another with --secret-file" in capsys.readouterr().err
    assert main(["join", "--leader", LINK]) == EXIT_USAGE
    assert "or give it with --secret-file FILE" in capsys.readouterr().err
    assert main(["join", "--leader", ""]) == EXIT_USAGE
    assert "leader '': it is empty; give a numeric address" in capsys.readouterr().err


def test_another_secret_is_copied_to_the_follower(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = SparkConfig(secret_file=tmp_path / "a b" / "secret")
    to_peer = same_secret_command(config, "10.0.0.2")
    assert to_peer == f"ssh 10.0.0.2 mkdir -p -m 700 'a b' && scp -p '{tmp_path}/a b/secret' 10.0.0.2:'a b/secret'"
    assert same_secret_command(SparkConfig(), LINK, to_host=False) == (
        f"mkdir -p -m 700 {home}/vllm-spark && scp -p {LINK}:config/vllm-spark/secret {home}/vllm-spark/secret"
    )
    sentence = "no follower connected within 60 s; the other side has another secret; on the other machine run: join it"
    finding = other_secret(sentence, to_peer)
    assert finding.remedy.splitlines() == [
        f"{to_peer}   # here",
        "join it   # on the other machine, once both have the same secret: it ended",
    ]
    assert finding.explanation == "No follower connected within 60 s; the other side has another secret."
    monkeypatch.setenv("VLLMSPARK_SECRET", "one that is long enough")
    assert same_secret_command(SparkConfig(), LINK) == "set VLLMSPARK_SECRET to the same value on both machines"
