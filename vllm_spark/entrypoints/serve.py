"""Starting vLLM with `--spark`: checks options and settings, and puts the settings into vLLM's configuration."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from vllm_spark.backend.ipc_folder import check_socket_folder, make_socket_folder, remove_own_socket_folder
from vllm_spark.backend.logging import log_as, use_vllm_logging
from vllm_spark.backend.speculation import check_draft_ranks
from vllm_spark.backend.status import engine_death, engine_failure
from vllm_spark.backend.support import (
    EXECUTOR,
    adapter_refusal_in,
    check_configuration,
    check_divisible,
    check_experts,
    check_marlin_inputs,
    check_supported,
    disable_fused_collectives,
    user_errors_from_vllm,
)
from vllm_spark.compat.check import check_vllm
from vllm_spark.compat.patching import apply_all
from vllm_spark.config.attachment import attach_settings, with_entry
from vllm_spark.config.settings import FLAG, SparkConfig, log_environment_warnings
from vllm_spark.entrypoints.missing_files import fetch_missing
from vllm_spark.entrypoints.pair_status import leave_start_to_the_first
from vllm_spark.errors import ConfigurationError, RefusedError, SparkError, StoppedError
from vllm_spark.models.regroup import apply_regrouping
from vllm_spark.processes.signals import StopRequest, raise_on_stop_signals
from vllm_spark.ranks import FOLLOWER_RANK, LEADER_RANK, WORLD_SIZE

logger = logging.getLogger("vllm_spark")


def create_leading_arguments(args: Any, create: Callable[[], Any]) -> Any:
    """Creates vLLM's engine arguments in a process that starts a leader.

    Args:
        args: the parsed command line.
        create: creates vLLM's engine arguments.

    Raises:
        ConfigurationError: arguments that vLLM rejects.
    """
    if _serving:
        # Not earlier: vLLM's server has just set its own handlers. uvicorn sets others once it serves.
        raise_on_stop_signals()
    with user_errors_from_vllm(getattr(args, "model", None)):
        return create()


def configure(engine_args: Any, config: SparkConfig, create: Callable[[], Any]) -> Any:
    """Creates vLLM's configuration for a pair.

    Args:
        engine_args: vLLM's; unchanged afterwards, except for a model's relative path.
        config: the settings.
        create: creates vLLM's configuration from `engine_args`.

    Raises:
        ConfigurationError: an option that a pair does not support, an unsupported vLLM, or a path that is too long
            for vLLM's sockets.
    """
    check_vllm()
    apply_all("leading")
    from vllm_spark.executor.environment import record_environment

    record_environment()
    use_vllm_logging()
    starts_engine = not _is_additional_api_server(engine_args)
    if starts_engine:
        log_environment_warnings()
    check_supported(engine_args)
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":  # else an engine has no sockets
        check_socket_folder()
    if starts_engine and engine_args.tensor_parallel_size != WORLD_SIZE:
        logger.info(
            "The tensor parallel size is %d, one rank on each machine, in place of %d.",
            WORLD_SIZE,
            engine_args.tensor_parallel_size,
        )
    if starts_engine:
        fetch_missing(config, engine_args)
    _make_paths_absolute(engine_args)

    from vllm_spark.backend.platform import activate, compute_capability
    from vllm_spark.executor.pickling import dumps_configuration

    activate()
    check_marlin_inputs(compute_capability)
    pairs = {
        "tensor_parallel_size": WORLD_SIZE,
        "distributed_executor_backend": EXECUTOR,
        "disable_custom_all_reduce": True,  # works only between GPUs of one machine
        "additional_config": with_entry(engine_args.additional_config),
    }
    with user_errors_from_vllm(engine_args.model, engine_args), _temporarily_set(engine_args, pairs):
        disable_fused_collectives(engine_args)
        vllm_config = create()
    # Ray's fields are for its own executor; the other machine may not have Ray installed.
    vllm_config.parallel_config.placement_group = vllm_config.parallel_config.ray_runtime_env = None
    check_configuration(vllm_config)
    check_divisible(vllm_config)
    check_experts(vllm_config)
    check_draft_ranks(vllm_config)
    apply_regrouping(vllm_config, WORLD_SIZE)
    if starts_engine:
        check_link(config)  # before its engine listens on the port
    attach_settings(vllm_config, config)
    apply_all("engine")
    dumps_configuration(vllm_config, "VllmConfig")  # reports its error now, and not in the engine's process
    make_socket_folder()

    from vllm_spark.backend.metrics import publish_counters, share_counters

    if starts_engine:
        publish_counters()
    else:
        share_counters()
        leave_start_to_the_first(engine_args._api_process_rank)
    return vllm_config


def _is_additional_api_server(engine_args: Any) -> bool:
    """Whether this is an API server whose engine is started by its parent process (`--api-server-count`).

    The parent creates a configuration too, with the rank -1.
    """
    count, rank = (getattr(engine_args, f"_api_process_{name}", 0) for name in ("count", "rank"))
    return bool(count > 1 and rank >= 0)


@contextlib.contextmanager
def _temporarily_set(engine_args: Any, values: dict[str, Any]) -> Iterator[None]:
    """Sets attributes of vLLM's engine arguments within the body: the caller may use them again."""
    before = {name: getattr(engine_args, name) for name in values}
    for name, value in values.items():
        setattr(engine_args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(engine_args, name, value)


def _make_paths_absolute(engine_args: Any) -> None:
    """Makes a relative model path absolute, for the other machine; the name that clients see stays as given."""
    model = engine_args.model
    if not os.path.isdir(model) or os.path.isabs(model):
        return
    if engine_args.tokenizer == model:
        engine_args.tokenizer = os.path.abspath(model)
    engine_args.served_model_name = engine_args.served_model_name or model
    engine_args.model = os.path.abspath(model)


def check_link(config: SparkConfig) -> None:
    """Checks the link's settings early, in the process that the user started, before the engine does.

    Raises:
        ConfigurationError: no usable address, port, secret, launch table or RDMA port.
    """
    from vllm_spark.collective.launch_table import load_launch_table
    from vllm_spark.executor.bootstrap import modelled_wire
    from vllm_spark.executor.channel.addresses import check_free, check_ports, leader_address
    from vllm_spark.executor.channel.secret import load_secret

    check_ports(config)
    address = leader_address(config)
    load_secret(config, address)
    load_launch_table(config.launch_table)
    modelled_wire(config)
    check_free(address, config.port)


def _check_ports_differ(args: Any, config: SparkConfig) -> None:
    """Checks that server and leader use different ports: with SO_REUSEPORT the kernel would let both bind one.

    Raises:
        ConfigurationError: clients and the follower have the same port.
    """
    from vllm_spark.executor.channel.addresses import leader_address

    everywhere = (None, "", "0.0.0.0", "::")
    if args.port == config.port and not args.uds and args.host in (*everywhere, leader_address(config)):
        raise ConfigurationError(
            f"--port {args.port} and {FLAG}-port {config.port} are the same; "
            "clients and the follower each need a port of their own, choose another for one of them"
        )


_serving = False
"""True in a process that becomes the only API server of `vllm serve`."""


def serve(config: SparkConfig, args: Any, original: Callable[[], Any]) -> None:
    """`vllm serve --spark`: the leader, or the follower if a launcher made this process rank 1.

    Args:
        config: the settings.
        args: the parsed command line, with the settings in its `additional_config`.
        original: vLLM's command.

    Raises:
        SparkError: an option that a pair does not support, or the reason why the engine ended.
    """
    global _serving
    check_vllm()
    if getattr(args, "headless", False):
        raise ConfigurationError(f"--headless cannot be used with {FLAG}; on the other machine run vllm-spark join")
    if os.environ.get("RANK", str(LEADER_RANK)) != str(LEADER_RANK):
        _run_as_rank_1(config)
    check_supported(args)
    check_socket_folder()
    check_link(config)
    _check_ports_differ(args, config)
    use_vllm_logging()
    fetch_missing(config, args)
    apply_all("leading")
    # With several API servers the process that starts them keeps its own handlers. They create vLLM's engine arguments
    # before they load this plugin.
    _serving = (getattr(args, "api_server_count", None) or 1) == 1
    original()
    if death := engine_death():
        # vLLM's server exits with 0 when its engine has ended; a supervisor must see that it failed.
        raise death


@contextlib.contextmanager
def exit_with_sentence(args: Any) -> Iterator[None]:
    """Ends the process on an error in the body that a sentence explains: prints it and exits with its code.

    Args:
        args: the parsed command line of `vllm serve`.
    """
    try:
        yield
    except StopRequest as request:
        _exit_with(request.error)
    except SparkError as error:
        _exit_with(error)
    except OSError as error:
        # vLLM binds its port first. An error with a file name is another one.
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES) or error.filename is not None:
            raise
        _exit_with(
            ConfigurationError(
                f"the server cannot listen at --host {args.host or '0.0.0.0'} --port {args.port} "
                f"({os.strerror(error.errno).lower()}); choose another port, or end what uses it"
            )
        )
    except KeyboardInterrupt:
        _exit_with(engine_failure() or StoppedError("stopped before it served", signal.SIGINT))
    except ValueError as error:
        # vLLM's error if its engine refuses an adapter of the command line.
        sentence = adapter_refusal_in(str(error))
        if sentence is None:
            raise
        _exit_with(RefusedError(sentence))
    except RuntimeError:
        # vLLM's error if its engine did not start; the engine may have recorded the reason.
        failure = engine_failure()
        if failure is None:
            raise
        _exit_with(failure)
    except Exception as error:
        from vllm.v1.engine.exceptions import EngineDeadError

        # Its engine ended before the server served.
        death = engine_death() if isinstance(error, EngineDeadError) else None
        if death is None:
            raise
        _exit_with(death)
    finally:
        # Not only at exit: a second signal may end the process before, now that vLLM's handlers are gone.
        remove_own_socket_folder()


def _run_as_rank_1(config: SparkConfig) -> NoReturn:
    """Runs this process as rank 1 of a launcher (RANK, WORLD_SIZE, MASTER_ADDR: torchrun's variables)."""
    from vllm_spark.entrypoints.join import supervise

    log_as("vllm-spark rank 1")
    log_environment_warnings()
    rank, world_size, master = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if rank != str(FOLLOWER_RANK) or world_size != str(WORLD_SIZE):
        raise ConfigurationError(
            f"RANK={rank} with WORLD_SIZE={world_size or 'unset'} is invalid: "
            f"a pair is RANK {LEADER_RANK} and RANK {FOLLOWER_RANK} of WORLD_SIZE {WORLD_SIZE}"
        )
    if config.leader is None and not master:
        raise ConfigurationError("RANK is 1, but MASTER_ADDR is not set; set it to the leader's address")
    if config.leader is None:
        from vllm_spark.executor.channel.addresses import resolve_master

        # Not `resolve`: it would let the environment override flags.
        config = config.model_copy(update={"leader": resolve_master(master)[0]})
    sys.exit(supervise(config, once=True))


def _exit_with(error: SparkError) -> NoReturn:
    print(f"vllm serve {FLAG}: {error}.", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
