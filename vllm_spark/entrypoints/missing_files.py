"""What a leader's command line names and this machine lacks, before vLLM looks for it: the follower may have it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError
from vllm_spark.executor.handshake.messages import Sought
from vllm_spark.executor.model_files.hub_cache import cached_snapshot, is_path
from vllm_spark.executor.model_files.loaded import uses_modelscope
from vllm_spark.executor.model_files.weights import CONSOLIDATED, FILE_FORMATS, missing_weights, weight_files

logger = logging.getLogger("vllm_spark")

_ASK_SECONDS = 20.0  # a follower that runs connects within one
_asked = False


def fetch_missing(config: SparkConfig, args: Any) -> None:
    """Copies from the follower what `args` name and this machine lacks, if the follower has it.

    Otherwise nothing is changed: vLLM downloads it, or reports the error. The follower is asked once in a process.

    Args:
        config: the settings.
        args: vLLM's parsed command line, or its engine arguments; a name is replaced by a path if its files cannot be
            put where vLLM looks for that name.

    Raises:
        RefusedError: a copy does not fit on the disk, the follower was lost after it was asked, or the copy failed for
            another reason.
    """
    global _asked
    if config.model_sync == "off" or _asked or uses_modelscope():
        return
    wanted = list(_missing(args))
    if not wanted:
        return
    _asked = True
    # Not without need: a command line with complete files stays as quick as it is.
    from vllm_spark.executor.channel.addresses import leader_address
    from vllm_spark.executor.model_sync.fetch_from_follower import fetch_from_follower

    names = ", ".join(f"{each.what} {each.name}" for each in wanted)
    timeout = min(_ASK_SECONDS, config.join_timeout)
    logger.info("The %s is not complete on this machine; asking a follower for %g s.", names, timeout)
    try:
        places = fetch_from_follower(
            config, leader_address(config), wanted, timeout, getattr(args, "download_dir", None)
        )
    except PeerLostError as error:
        logger.warning("The follower was not asked for the %s: %s.", names, error)
        return
    for sought, place in zip(wanted, places, strict=True):
        if place is not None:
            _use(args, sought, place)


def _missing(args: Any) -> Iterator[Sought]:
    cache = getattr(args, "download_dir", None)
    model = _model_of(args)
    load_format = str(getattr(args, "load_format", "auto"))
    if _lacks_model(model, args.revision, cache, load_format):
        yield Sought("model", _name_for_both(model), "model", args.revision)
    speculative = getattr(args, "speculative_config", None)
    if isinstance(speculative, str):
        try:
            speculative = json.loads(speculative)
        except ValueError:
            speculative = None  # vLLM reports the error
    speculation: dict[str, Any] = speculative if isinstance(speculative, dict) else {}
    draft, revision = speculation.get("model"), speculation.get("revision")
    # vLLM's methods without a draft model, such as "ngram", may be named in its place: without a slash.
    if isinstance(draft, str) and draft != model and "/" in draft and _lacks_model(draft, revision, cache, load_format):
        yield Sought("draft model", _name_for_both(draft), "model", revision)
    tokenizer = getattr(args, "tokenizer", None)
    if isinstance(tokenizer, str) and tokenizer not in (model, draft) and _lacks(tokenizer, args.tokenizer_revision):
        yield Sought("tokenizer", _name_for_both(tokenizer), "tokenizer", args.tokenizer_revision)
    for module in getattr(args, "lora_modules", None) or []:
        path = getattr(module, "path", None)
        if isinstance(path, str) and _lacks(path, None):
            yield Sought("adapter", _name_for_both(path), "adapter")


def _model_of(args: Any) -> str:
    return str(getattr(args, "model_tag", None) or args.model)


def _name_for_both(name: str) -> str:
    """A name that means the same on both machines: a path that is relative to this process's folder does not.

    One that starts with `~` stays: it is below the home folder of each machine's user.
    """
    return os.path.abspath(name) if name.startswith(".") else name


def _lacks_model(name: str, revision: str | None, cache: str | None, load_format: str) -> bool:
    """Whether a model is not here, or a hub's is not complete; False for loaders that choose files by themselves."""
    if load_format != "auto" and load_format not in FILE_FORMATS:
        return False
    if _is_elsewhere(name) or os.path.exists(os.path.expanduser(name)):
        return False
    place = cached_snapshot(name, revision, cache)
    if place is None:
        return True
    if load_format == "auto":
        load_format = "mistral" if any(place.glob(CONSOLIDATED)) else "hf"
    try:
        names = os.listdir(place)
    except OSError:
        return False  # vLLM reports the error
    return not weight_files(place, names, load_format) or bool(missing_weights(place, load_format))


def _lacks(name: str, revision: str | None) -> bool:
    """Whether a tokenizer or an adapter is not here."""
    if _is_elsewhere(name) or os.path.exists(os.path.expanduser(name)):
        return False
    return cached_snapshot(name, revision) is None


def _is_elsewhere(name: str) -> bool:
    """Whether it is in object storage, or a file of a repository in vLLM's notation."""
    return "://" in name or not name or (":" in name and not os.path.isabs(name))


def _use(args: Any, sought: Sought, place: Path) -> None:
    """Has vLLM load a model from where it is, if it does not look there for the name."""
    if is_path(sought.name) or cached_snapshot(sought.name, sought.revision, getattr(args, "download_dir", None)):
        return
    if sought.what != "model":
        logger.warning("Give the path of the %s %s in place of its name: %s", sought.what, sought.name, place)
        return
    args.served_model_name = getattr(args, "served_model_name", None) or [sought.name]
    args.model = str(place)
    if getattr(args, "model_tag", None):
        args.model_tag = str(place)
