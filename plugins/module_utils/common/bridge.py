# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The bridge to Ansible: the only file of module_utils that imports it.

:class:`TdeModule` keeps secrets out of what core prints, where core itself lets them through: in
``invocation`` when an option is misspelt or malformed, and in the system log for options inside
dictionaries. :func:`run_module` is every module's ``main``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import traceback
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.respawn import has_respawned, respawn_module
from ansible.module_utils.parsing.convert_bool import BOOLEANS

from .errors import TdeError
from .files import os_error
from .secret import no_core_dumps

#: Where the role prerequisites puts the target's environment; used when the interpreter in use lacks a library.
TARGET_PYTHON = "/opt/hsm-tde/venv/bin/python"

_MASK = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
_UNKNOWN = "VALUE_OF_AN_UNKNOWN_OR_MALFORMED_OPTION"

#: Secrets shorter than this are kept out by field only: replacing "1234" wherever it stands would turn a
#: slot number into text and punch holes into a serial number, which betrays the PIN.
_SCRUB_LENGTH = 8

Spec = t.Mapping[str, t.Mapping[str, t.Any]]


def _canonical(spec: Spec, name: str) -> str | None:
    for option, definition in spec.items():
        if name == option or name in definition.get("aliases", ()):
            return option
    return None


def _uri_with_pin(value: t.Any) -> bool:
    """Whether a text is a URI that carries a PIN (RFC 7512 section 2.4): it is refused later, and not shown before."""
    return isinstance(value, str) and "pin-value" in value.lower()


def _malformed(definition: t.Mapping[str, t.Any], value: t.Any) -> bool:
    """Whether a text stands where something else belongs: perhaps a secret in the wrong field."""
    kind = definition.get("type", "str")
    if not isinstance(value, str):
        return False
    if definition.get("choices"):
        return value not in definition["choices"]
    if kind == "bool":
        return value.lower() not in BOOLEANS
    number = {"int": r"[+-]?\d+", "float": r"[+-]?\d+(\.\d*)?"}.get(kind)
    return kind == "dict" or (number is not None and not re.fullmatch(number, value.strip()))


def mask(spec: Spec, params: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The options as they may be shown: secrets, unknown options and malformed dictionaries without their values."""
    shown: dict[str, t.Any] = {}
    for name, value in params.items():
        if name.startswith("_ansible_"):
            continue
        option = _canonical(spec, name)
        if option is None:
            shown[name] = _UNKNOWN
        elif value is None:
            shown[name] = None
        elif spec[option].get("no_log") or _uri_with_pin(value):
            shown[name] = _MASK
        elif _malformed(spec[option], value):
            shown[name] = _UNKNOWN
        elif spec[option].get("options") is not None:
            inner = spec[option]["options"]
            if isinstance(value, t.Mapping):
                shown[name] = mask(inner, value)
            elif isinstance(value, list) and all(isinstance(item, t.Mapping) for item in value):
                shown[name] = [mask(inner, item) for item in value]
            else:
                shown[name] = _UNKNOWN
        else:
            shown[name] = value
    return shown


def _hidden_texts(spec: Spec, params: t.Any) -> t.Iterator[str]:
    """Every text that :func:`mask` hides, for scrubbing messages."""
    if not isinstance(params, t.Mapping):
        yield from _texts(params)
        return
    for name, value in params.items():
        option = _canonical(spec, name) if isinstance(name, str) else None
        if isinstance(name, str) and name.startswith("_ansible_"):
            continue
        if option is None or spec[option].get("no_log") or _uri_with_pin(value) or _malformed(spec[option], value):
            yield from _texts(value)
        elif spec[option].get("options") is not None:
            for item in value if isinstance(value, list) else [value]:
                yield from _hidden_texts(spec[option]["options"], item)


def _texts(value: t.Any) -> t.Iterator[str]:
    if isinstance(value, t.Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def not_text(spec: Spec, params: t.Mapping[str, t.Any], prefix: str = "") -> str | None:
    """The first secret option whose value YAML did not read as text, by its path, or None."""
    for name, value in params.items():
        option = _canonical(spec, name)
        if option is None or value is None:
            continue
        definition = spec[option]
        if definition.get("no_log"):
            if definition.get("type", "str") == "str" and not isinstance(value, str):
                return f"{prefix}{name}"
        elif definition.get("options") is not None:
            items = value if isinstance(value, list) else [value]
            for number, item in enumerate(items):
                if isinstance(item, t.Mapping):
                    where = f"{prefix}{name}[{number}]." if isinstance(value, list) else f"{prefix}{name}."
                    found = not_text(definition["options"], item, where)
                    if found:
                        return found
    return None


class TdeModule(AnsibleModule):  # type: ignore[misc]
    """AnsibleModule with secrets kept by field. Made by :func:`run_module` only."""

    def __init__(self, argument_spec: dict[str, t.Any], **kwargs: t.Any) -> None:
        self._spec = argument_spec
        self._given: dict[str, t.Any] = {}
        self._validating = True
        super().__init__(argument_spec, supports_check_mode=kwargs.pop("supports_check_mode", True), **kwargs)
        self._validating = False
        number = not_text(self._spec, self._given)
        if number:
            self.fail(
                TdeError(
                    "secret_not_text",
                    "YAML read it as a number or another type, so it may not be the value that was typed (01234567 is octal)",
                    obj=f"option {number}",
                    kept="It was not tried and nothing was changed.",
                    next_step="Put the value in quotes.",
                )
            )

    def _load_params(self) -> None:
        super()._load_params()
        self._given = copy.deepcopy(dict(self.params))

    def _log_invocation(self) -> None:
        self.log("Invoked with " + json.dumps(mask(self._spec, self._given), default=str))

    def _return_formatted(self, kwargs: dict[str, t.Any]) -> None:
        kwargs["invocation"] = {"module_args": mask(self._spec, self.params if not self._validating else self._given)}
        self.no_log_values = {
            text for text in _hidden_texts(self._spec, self._given) if len(text) >= _SCRUB_LENGTH and not text.isdigit()
        }
        super()._return_formatted(kwargs)

    def fail_json(self, msg: str, **kwargs: t.Any) -> t.NoReturn:  # type: ignore[misc]
        if self._validating:
            # Core's sentence can quote a value; here no field tells which, so every hidden text goes, short ones too.
            for text in sorted(set(_hidden_texts(self._spec, self._given)), key=len, reverse=True):
                if len(text) >= 3:
                    msg = msg.replace(text, "***")
            # Whoever puts a passphrase where a choice belongs must not read it in the answer.
            msg = re.sub(
                r"(must be one of:? .*?,) got( no match for)?: .*", r"\1 and another value was given", msg, flags=re.DOTALL
            )
            name = self._name.removesuffix(".py").rpartition(".")[2]
            error = TdeError(
                "invalid_option", msg, obj="options", next_step=f"Correct them: ansible-doc hsm.tde.{name} lists what there is."
            )
            msg, kwargs = str(error), {**error.result(), **kwargs}
        super().fail_json(msg, **kwargs)

    def fail(self, error: TdeError, **facts: t.Any) -> t.NoReturn:
        """End with one of our errors."""
        self.fail_json(msg=str(error), **{**facts, **error.result()})


def _require(libraries: t.Iterable[str]) -> TdeError | None:
    if sys.version_info < (3, 10):
        return TdeError(
            "python_too_old",
            f"Python {sys.version_info[0]}.{sys.version_info[1]} runs the modules here; 3.10 is the least",
            obj=sys.executable,
            next_step="Run the role hsm.tde.prerequisites, or set ansible_python_interpreter.",
        )
    missing = []
    for name in libraries:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        return TdeError(
            "library_missing",
            f"{sys.executable} has no {', '.join(missing)}",
            obj="the target's Python",
            next_step="Run the role hsm.tde.prerequisites, or set ansible_python_interpreter to an environment that has them.",
        )
    return None


def _target_python_trusted() -> bool:
    try:
        return os.stat(TARGET_PYTHON).st_uid == 0 and os.path.realpath(sys.prefix) != os.path.dirname(
            os.path.dirname(TARGET_PYTHON)
        )
    except OSError:
        return False


def run_module(
    act: t.Callable[[TdeModule], dict[str, t.Any]],
    argument_spec: dict[str, t.Any],
    *,
    libraries: t.Sequence[str] = (),
    read_only: bool = False,
    **rules: t.Any,
) -> None:
    """A module's whole ``main``.

    :param act: does the work and returns the result; check mode is ``module.check_mode``.
    :param argument_spec: the options.
    :param libraries: third-party modules that ``act`` imports; looked for before anything is done, and if they
        are missing the module starts again under the environment that the role prerequisites made.
    :param read_only: the module never changes anything (``_info`` modules and the proof).
    :param rules: ``required_if`` and its kind, ``supports_check_mode``.
    """
    problem = _require(libraries)
    if problem and not has_respawned() and _target_python_trusted():
        respawn_module(TARGET_PYTHON)
    module = TdeModule(argument_spec, **rules)
    if problem and module.check_mode and problem.code == "library_missing":
        # A play in check mode on a fresh host: the role prerequisites only said what it would install.
        module.warn(f"{problem} What this task would change cannot be told before that.")
        module.exit_json(changed=not read_only, prepared=False, error_code=problem.code)
    if problem:
        module.fail(problem)
    if os.geteuid() == 0:
        # Anybody else would lose sight of the own /proc/self with it (proc(5)).
        no_core_dumps()
    try:
        result = act(module)
    except TdeError as error:
        module.fail(error)
    except OSError as exc:
        # Nobody foresaw it here; what the operating system says still helps more than the place in the code.
        where = (
            exc.filename
            if isinstance(exc.filename, str)
            else os.path.basename(traceback.extract_tb(exc.__traceback__)[-1].filename)
        )
        module.fail(os_error(exc, where, kept="The steps before it are in the journal."))
    except Exception as exc:
        # The text of a foreign exception may hold a value; its type and place do not.
        place = traceback.extract_tb(exc.__traceback__)[-1]
        module.fail(
            TdeError(
                "internal_error",
                f"{type(exc).__name__} in {os.path.basename(place.filename)}:{place.lineno} ({place.name})",
                obj="hsm.tde",
                kept="The steps before it are in the journal.",
                next_step="Please report it; run again with --check to see what is left to do.",
            )
        )
    if not module._diff:
        result.pop("diff", None)
    module.exit_json(**result)
