"""Records: dataclasses that are sent to another process or machine, or stored, as JSON.

`from_json` checks JSON against the types of a record's fields, without conversions: "1" is not a number. It raises
`RecordError`, whose text names the first field that does not fit. Unknown fields are ignored, so a record may get
further ones with defaults.
"""

from __future__ import annotations

import base64
import binascii
import functools
from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, ValidationError

from vllm_spark.errors import lower_first

Record = TypeVar("Record")

_LONGEST_NAME = 60  # characters of a name in an error
_OWN_WORDS = {"unexpected_keyword_argument": "unknown field"}
"""pydantic's messages that suit calls and not JSON, by their type."""


class RecordError(ValueError):
    """JSON that is not a record of the expected type; the text is a part of a sentence."""


def to_json(record: Any) -> bytes:
    """The JSON of a record, in UTF-8 and without spaces."""
    kind: Any = type(record)
    return _adapter(kind).dump_json(record, by_alias=True)


def from_json(payload: bytes | str, kind: type[Record]) -> Record:
    """The record of type `kind` in `payload`.

    Raises:
        RecordError: it is not one.
    """
    adapter: TypeAdapter[Record] = _adapter(kind)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(payload, strict=True)
    except ValidationError as error:
        raise RecordError(first_fault(error)) from None


def indented_json(content: Any) -> str:
    """The JSON of records, and of lists and dictionaries with records in them, one value a line, for files.

    A number that is not finite becomes `null`.
    """
    return pydantic_core.to_json(content, indent=1, inf_nan_mode="null").decode()


def first_fault(error: ValidationError) -> str:
    """The first error that pydantic found: field and message."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(_name(part) for part in fault["loc"] if part != "[key]")
    what = _OWN_WORDS.get(fault["type"]) or lower_first(str(fault["msg"]).removeprefix("Value error, "))
    return f"{where}: {what}" if where else what


def _name(part: int | str) -> str:
    """A field, an index or a key, as the JSON has it: a key may be any text."""
    name = str(part)
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"must be base64 ({error})".lower()) from None


Bytes = Annotated[bytes, BeforeValidator(_from_base64), PlainSerializer(_to_base64, return_type=str)]
"""The type of a record's field with bytes, which are base64 in JSON."""
