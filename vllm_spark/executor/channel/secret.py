"""The secret that both machines share: where it is read from, and how a new one is made."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path

from vllm_spark.config.settings import MINIMUM_SECRET_BYTES, SECRET_VARIABLE, SparkConfig, flag_name
from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.channel.addresses import is_loopback
from vllm_spark.files import SMALL_FILE, configuration_folder, open_regular, read_at_most, state_folder
from vllm_spark.variables import find_variable


def load_secret(config: SparkConfig, link_address: str, environment: Mapping[str, str] | None = None) -> bytes:
    """The secret that this process shares with its peer.

    Taken from VLLMSPARK_SECRET or from `config.secret_file`, else from `default_secret_file`. On a loopback address,
    where only this machine's users can connect, a secret of this user's own is made and kept if none is given.

    Raises:
        ConfigurationError: no secret, or one that is unreadable, another user's, readable by others, too short, or not
            in a regular file of at most 64 KiB; or two were given.
    """
    if given := find_variable(SECRET_VARIABLE, environment):
        if config.secret_file is not None:
            raise ConfigurationError(
                f"{given.name} is set, and the secret file {config.secret_file} is given as well; leave one out"
            )
        return _long_enough(os.fsencode(given.value).strip(), f"the secret in {given.name}")
    if config.secret_file is not None:
        return _read_secret(config.secret_file)
    if is_loopback(link_address):
        return _own_secret()
    default = default_secret_file()
    if default is not None and secret_is_there(default):
        return _read_secret(default)
    places = f"{SECRET_VARIABLE} is not set" + (
        f" and there is no {default}" if default is not None else " and this user has no home folder"
    )
    raise ConfigurationError(
        f"the link address {link_address} can be reached from other machines, so both sides need the same secret, and "
        f"none is here: {places}; make one with `vllm-spark doctor --make-secret` and copy it to the other machine, "
        f"or give it with {flag_name('secret_file')} FILE or in {SECRET_VARIABLE}"
    )


def secret_source(config: SparkConfig, link_address: str, environment: Mapping[str, str] | None = None) -> str:
    """Where `load_secret` reads the secret with the same arguments, as `the file /home/me/secret`, for sentences."""
    if given := find_variable(SECRET_VARIABLE, environment):
        return f"the variable {given.name}"
    if config.secret_file is not None:
        return f"the file {config.secret_file}"
    path = _loopback_secret_file() if is_loopback(link_address) else default_secret_file()
    return "no file" if path is None else f"the file {path}"


def default_secret_file() -> Path | None:
    """The default path of the secret; None for a user without a home folder."""
    folder = configuration_folder()
    return None if folder is None else folder / "secret"


def secret_is_there(path: Path) -> bool:
    """Whether the file exists, or may exist: True also if its folder cannot be searched."""
    try:
        return path.exists()
    except OSError:  # reading it reports why
        return True


def make_secret(path: Path) -> None:
    """Writes a fresh secret of 32 random bytes, in hexadecimal digits, to a new file that only its owner may read.

    A folder that is missing is made, for its owner only.

    Raises:
        ConfigurationError: the file is there already, or cannot be written.
    """
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, parents=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if os.path.isdir(path):  # also False for a folder that cannot be searched
            raise ConfigurationError(f"{path} is a folder; name a file in it: --make-secret {path}/secret") from None
        if os.path.lexists(path):
            raise ConfigurationError(
                f"{path} exists already and is left as it is; copy that one to the other machine, or delete it first"
            ) from None
        raise ConfigurationError(
            f"no secret can be written to {path} ({error.strerror}); choose another place: --make-secret PATH"
        ) from None
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            file.write(secrets.token_hex(32) + "\n")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigurationError(f"no secret can be written to {path} ({error.strerror})") from None


def copy_command(path: Path, host: str, *, to_host: bool = True) -> str:
    """The command that copies the secret at `path` to the same place on `host`, or from there.

    A path below the home folder is relative to it there, where ssh and scp start.
    """
    try:
        there = str(path.relative_to(Path.home()))
    except (RuntimeError, ValueError):
        there = str(path)
    here, place = shlex.quote(str(path)), f"{f'[{host}]' if ':' in host else host}:{shlex.quote(there)}"
    folder = os.path.dirname(there if to_host else path)
    make = f"mkdir -p -m 700 {shlex.quote(folder)} && " if folder else ""
    if to_host:
        return f"{f'ssh {host} {make}' if make else ''}scp -p {here} {place}"
    return f"{make}scp -p {place} {here}"


def same_secret_command(config: SparkConfig, host: str, *, to_host: bool = True) -> str:
    """What gives this machine and `host` the same secret: a command, or for a variable a sentence."""
    if given := find_variable(SECRET_VARIABLE):
        return f"set {given.name} to the same value on both machines"
    path = config.secret_file or default_secret_file()
    if path is None:
        return f"set {SECRET_VARIABLE} to the same value on both machines"
    return copy_command(path.absolute(), host, to_host=to_host)


def _read_secret(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            mounted_read_only = bool(os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY)
            content = read_at_most(file, SMALL_FILE).strip()
    except OSError as error:
        raise ConfigurationError(
            f"the secret file {path} cannot be read ({error.strerror}); give another with {flag_name('secret_file')}"
        ) from None
    if not mounted_read_only:
        _check_rights(path, found)
    return _long_enough(content, f"the secret in {path}")


def _check_rights(path: Path, found: os.stat_result) -> None:
    """Checks that only this user and root can read or replace the file.

    Not done for a read-only mount, where owner and mode cannot be changed: container runtimes mount secrets like that,
    owned by root and with mode 0444, and control access to them in another way.
    """
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"the secret file {path} belongs to another user (id {found.st_uid}), who can replace it; "
            f"chown {os.geteuid()} {path}, or, in a container, mount it read-only"
        )
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"the secret file {path} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 {path}"
        )


def _long_enough(secret: bytes, what: str) -> bytes:
    if len(secret) < MINIMUM_SECRET_BYTES:
        raise ConfigurationError(
            f"{what} has {len(secret)} bytes, and needs at least {MINIMUM_SECRET_BYTES}; "
            "make one: vllm-spark doctor --make-secret"
        )
    return secret


def _loopback_secret_file() -> Path | None:
    folder = state_folder()
    return None if folder is None else folder / "loopback.secret"


def _own_secret() -> bytes:
    """This user's secret for loopback links, made on first use."""
    path = _loopback_secret_file()
    if path is None:
        raise ConfigurationError(f"this user has no home folder to keep a secret in; give one in {SECRET_VARIABLE}")
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written to a temporary file and linked: two processes that start together use the file of the first one.
        draft = folder / f".loopback.{os.getpid()}.{secrets.token_hex(4)}"
        draft.touch(mode=0o600, exist_ok=False)
        try:
            draft.write_text(secrets.token_hex(32))
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"no secret can be kept in {folder} ({error.strerror}); give one in {SECRET_VARIABLE}"
        ) from None
    return _read_secret(path)
