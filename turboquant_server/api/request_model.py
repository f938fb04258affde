"""RequestModel: what all bodies of requests have in common. Knows no field."""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import Self

logger = logging.getLogger(__name__)

# Bounds what requests can make the server log and remember.
MAX_LOGGED_FIELDS = 100
MAX_LOGGED_LENGTH = 100

_logged_fields: set[str] = set()


def only(*values: object, reason: str = "This server does not support this parameter") -> GetPydanticSchema:
    """Refuse a field that this server does not support, unless it asks for nothing; the OpenAPI says so.

    Args:
        values: What may be given, besides null, because it means the same as leaving the field out.
        reason: What to tell who gives something else.
    """

    def check(value: object) -> object:
        # True == 1, but n=true is a mistake.
        is_allowed = any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values)
        if value is not None and not is_allowed:
            raise PydanticCustomError("unsupported_parameter", reason)
        return value

    return GetPydanticSchema(
        lambda source, handler: core_schema.no_info_after_validator_function(check, handler(source)),
        lambda schema, handler: {"enum": [None, *values]},
    )


def _check_unicode(text: str) -> str:
    """Refuse a lone surrogate, which JSON can carry and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("not_unicode", "Input should be valid Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(_check_unicode)]


class RequestModel(BaseModel):
    """Take JSON types as they are; ignore unknown fields and log each name once."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    # Fields that are OpenAI's and change nothing here.
    harmless_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _log_unknown_fields(self) -> Self:
        for field in self.model_extra or ():
            if len(_logged_fields) == MAX_LOGGED_FIELDS:
                break
            name = field[:MAX_LOGGED_LENGTH]
            if name not in self.harmless_fields and name not in _logged_fields:
                _logged_fields.add(name)
                logger.warning("ignoring the unknown field %r of a %s", name, type(self).__name__)
        return self
