"""The command line: arguments to a ServerConfig, or to one sentence that says which of them is wrong."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from turboquant_server import __version__
from turboquant_server.config import ENV_PREFIX, GROUPS, ServerConfig
from turboquant_server.config_file import ALIASES, ConfigFileError, did_you_mean, flag

PROGRAM = "turboquant-server"
SECRETS = ("api_key", "admin_key")

logger = logging.getLogger(__name__)


def parse_config(argv: Sequence[str]) -> ServerConfig:
    """Return the configuration that flags, TURBOQUANT_* variables and a file make.

    Raises:
        SystemExit: ``--help``, ``--version`` (0) or a wrong flag, variable or file (2).
    """
    parser = _build_parser()
    namespace, unknown = parser.parse_known_args(_name_model([_with_dashes(argument) for argument in argv]))
    if unknown:
        parser.error(_describe_unknown(unknown))
    arguments = vars(namespace)
    arguments.pop("enable_auto_tool_choice", None)
    try:
        return ServerConfig(**arguments)
    except ConfigFileError as error:
        parser.error(str(error))
    except ValidationError as error:
        finding = error.errors()[0]
        message = finding["msg"]
        if not finding["loc"]:  # about several fields
            parser.error(message)
        name = str(finding["loc"][0])
        value = "" if name in SECRETS else f", got {finding['input']!r}"
        parser.error(f"{_source(name, arguments)}: {message[:1].lower()}{message[1:]}{value}")


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Log each TURBOQUANT_* variable that is no setting.

    It is no error: Kubernetes makes such variables of the names of services.
    """
    known = [ENV_PREFIX + name.upper() for name in ServerConfig.model_fields]
    for name in environment:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            logger.warning("ignoring the unknown variable %s%s", name, did_you_mean(name.upper(), known))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one sentence, without the usage that would bury it."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {PROGRAM} --help)\n")


def _build_parser() -> _Parser:
    parser = _Parser(
        PROGRAM,
        usage=f"{PROGRAM} [model] [flags]",
        description="Serve a Hugging Face model with OpenAI's API, each request on a compressed KV cache.",
        epilog=f"Each flag may also be set by a variable, --max-model-len by {ENV_PREFIX}MAX_MODEL_LEN, and "
        "in the file, as max-model-len.",
        argument_default=argparse.SUPPRESS,  # so that a variable counts where a flag is not given
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _add_flag(parser, "config", ServerConfig.model_fields["config"])
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, field in settings.model_fields.items():
            _add_flag(group, name, field)
    parser.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="changes nothing, because it is always so: a model that can call tools may do so",
    )
    return parser


def _add_flag(parser: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    default = "" if field.default in (None, (), False) else f" (default: {format_default(field)})"
    options: dict[str, Any] = {"help": f"{field.description}{default}".replace("%", "%%")}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = name.upper().rpartition("_")[2]
    if field.default == ():
        options |= {"action": "extend", "nargs": "+"}
    parser.add_argument(flag(name), dest=name, **options)
    for alias in (alias for alias, meant in ALIASES.items() if meant == name):
        parser.add_argument(flag(alias), dest=name, **{**options, "help": argparse.SUPPRESS})


def format_default(field: FieldInfo) -> str:
    """Return the default of a field as a person writes it."""
    return "on" if field.default is True else str(field.default)


def _with_dashes(argument: str) -> str:
    """Read --max_model_len=1 as --max-model-len=1; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _name_model(arguments: list[str]) -> list[str]:
    """Read a model that comes first, as after ``vllm serve``, as --model."""
    is_named = any(argument.partition("=")[0] == "--model" for argument in arguments)
    if is_named or not arguments or arguments[0].startswith("-"):
        return arguments
    return ["--model", *arguments]


def _describe_unknown(arguments: Sequence[str]) -> str:
    """Name the flags only: what follows them may be a secret."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if not flags:
        return "unrecognized arguments: a value without a flag; the model is given by --model"
    fields = ServerConfig.model_fields
    known = [flag(name) for name in (*fields, *ALIASES)]
    known += [flag(f"no_{name}") for name, field in fields.items() if field.annotation is bool]
    return f"unrecognized arguments: {' '.join(flags)}{did_you_mean(flags[0], known)}"


def _source(name: str, arguments: Mapping[str, object]) -> str:
    """Return where the value of a setting has come from."""
    if name in arguments:
        return flag(name)
    variable = ENV_PREFIX + name.upper()
    if any(key.upper() == variable and value for key, value in os.environ.items()):
        return variable
    file = arguments.get("config", os.environ.get(f"{ENV_PREFIX}CONFIG"))
    return f"--config {file}: {name.replace('_', '-')}"
