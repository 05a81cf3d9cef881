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
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import cached_snapshot
from vllm_spark.executor.model_files.loaded import uses_modelscope
from vllm_spark.executor.model_files.weights import CONSOLIDATED, missing_weights

logger = logging.getLogger("vllm_spark")

_ASK_SECONDS = 20.0  # a follower that runs connects within one
_asked = False


def fetch_missing(config: SparkConfig, args: Any) -> None:
    """Copies from the follower what `args` name and this machine lacks, if the follower has it.

    Otherwise nothing is changed: vLLM downloads it, or says what is wrong. The follower is asked once in a process.

    Args:
        config: the settings.
        args: vLLM's parsed command line, or its engine arguments; a name is replaced by a path if its files cannot be
            put where vLLM looks for that name.

    Raises:
        RefusedError: a copy does not fit on the disk, or failed for another reason.
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
    from vllm_spark.executor.model_sync.reverse import fetch_from_follower

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
    if getattr(args, "load_format", "auto") != "dummy" and _lacks_model(model, args.revision, cache):
        yield Sought("model", model, "model", args.revision)
    speculative = getattr(args, "speculative_config", None)
    if isinstance(speculative, str):
        try:
            speculative = json.loads(speculative)
        except ValueError:
            speculative = None  # vLLM says what is wrong
    draft = speculative.get("model") if isinstance(speculative, dict) else None
    if isinstance(draft, str) and draft != model:
        revision = speculative.get("revision") if isinstance(speculative, dict) else None
        if _lacks_model(draft, revision, cache) and ("/" in draft):
            yield Sought("draft model", draft, "model", revision)
    tokenizer = getattr(args, "tokenizer", None)
    if isinstance(tokenizer, str) and tokenizer not in (model, draft) and _lacks(tokenizer, args.tokenizer_revision):
        yield Sought("tokenizer", tokenizer, "tokenizer", args.tokenizer_revision)
    for module in getattr(args, "lora_modules", None) or []:
        path = getattr(module, "path", None)
        if isinstance(path, str) and _lacks(path, None):
            yield Sought("adapter", path, "adapter")


def _model_of(args: Any) -> str:
    return str(getattr(args, "model_tag", None) or args.model)


def _lacks_model(name: str, revision: str | None, cache: str | None) -> bool:
    """Whether a model is not here, or a hub's is not complete."""
    if _is_elsewhere(name) or os.path.exists(os.path.expanduser(name)):
        return False
    place = cached_snapshot(name, revision, cache)
    if place is None:
        return True
    load_format = "mistral" if any(place.glob(CONSOLIDATED)) else "hf"
    identity = ModelIdentity.of(place, load_format=load_format)
    return not identity.weights or bool(missing_weights(place, load_format))


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
    from vllm_spark.executor.model_sync.reverse import is_path

    if is_path(sought.name) or cached_snapshot(sought.name, sought.revision, getattr(args, "download_dir", None)):
        return
    if sought.what != "model":
        logger.warning("Give the path of the %s %s in place of its name: %s", sought.what, sought.name, place)
        return
    args.served_model_name = getattr(args, "served_model_name", None) or [sought.name]
    args.model = str(place)
    if getattr(args, "model_tag", None):
        args.model_tag = str(place)
