# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What each version of openCryptoki takes in its configuration files, and why it would not. Pure.

Four grammars of ``opencryptoki.conf``: until 3.11 and until 3.14 (usr/sbin/pkcsslotd/lexer.l and parser.y), until 3.17
(usr/lib/common/), and since 3.18 (usr/lib/config/). The older daemons drop what stands behind an error without a word and start.
"""

from __future__ import annotations

import os
import re
import typing as t

from . import opencryptoki_conf as conf

Version = t.Tuple[int, int]

#: Keys of a slot, and the version that brought each (parser.y, slotmgr.c of the tags v3.8.1 to v3.27.0).
SLOT_KEYS: dict[str, Version] = {
    "stdll": (3, 0),
    "tokname": (3, 0),
    "tokversion": (3, 12),
    "usergroup": (3, 24),
    "confname": (3, 0),
    "description": (3, 0),
    "manufacturer": (3, 0),
    "hwversion": (3, 0),
    "firmwareversion": (3, 0),
}
#: usr/include/slotmgr.h: NUMBER_SLOTS_MANAGED.
MAX_SLOT = 1023
#: CK_SLOT_INFO (PKCS#11 v2.20): widths in bytes.
_WIDTHS = {"description": 64, "manufacturer": 32}
#: The folder of a token without tokname, by its library (each stdll's SUB_DIR in tok_specific.h).
TOKEN_FOLDERS = {
    "libpkcs11_sw.so": "swtok",
    "libpkcs11_ica.so": "lite",
    "libpkcs11_cca.so": "ccatok",
    "libpkcs11_ep11.so": "ep11tok",
    "libpkcs11_tpm.so": "tpm",
    "libpkcs11_icsf.so": "icsf",
}
#: The first versions with the one parser for all files, with a disable-event-support, with statistics, with ccatok.conf.
_ONE_PARSER, _DISABLE_EVENTS, _STATISTICS, CCA_FILE = (3, 18), (3, 17), (3, 18), (3, 20)
#: Files of EP11 tokens go through the one parser since:
_EP11_ONE_PARSER = (3, 20)

#: Words of ep11tok.conf that stand alone, and the version that brought each (ep11_specific.c of the tags).
EP11_MODES: dict[str, Version] = {
    "FORCE_SENSITIVE": (3, 9),
    "STRICT_MODE": (3, 9),
    "VHSM_MODE": (3, 9),
    "OPTIMIZE_SINGLE_PART_OPERATIONS": (3, 11),
    "USE_PRANDOM": (3, 14),
    "FIPS_SESSION_MODE": (3, 22),
}
#: Those with a value.
EP11_VALUES: dict[str, Version] = {
    "LOGLEVEL": (3, 0),
    "CPFILTER": (3, 9),
    "DIGEST_LIBICA": (3, 11),
    "PKEY_MODE": (3, 16),
    "EXPECTED_WKVP": (3, 20),
}
PKEY_MODES = ("DISABLED", "DEFAULT", "ENABLE4NONEXTR", "ENABLE4EXTR", "ENABLE4ALL")
#: ep11_specific.c: adapters and domains are 0 to 255.
MAX_APQN = 255
_ALLOWLIST: Version = (3, 17)
#: ccatok.conf: key and what it may be (cca_specific.c).
CCA_VALUES: dict[str, tuple[Version, tuple[str, ...]]] = {
    "PKEY_MODE": ((3, 21), ("DISABLED", "DEFAULT", "ENABLED")),
    "AES_KEY_MODE": ((3, 24), ("DATA", "CIPHER")),
    "ML_DSA_KEY_MODE": ((3, 27), ("PURE", "PREHASH")),
}
CCA_PATTERNS = ("SYM", "AES", "APKA")
#: Bytes of a verification pattern: of EP11's wrapping key, and of a CCA master key.
WKVP_BYTES, MKVP_BYTES = 16, 8


class Problem(t.NamedTuple):
    """Why a version would not take a file; ``line`` counts from 1, 0 for the file as a whole."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}" if self.line else self.reason


def allowlist_word(version: Version) -> str:
    return "APQN_ALLOWLIST" if version >= _ALLOWLIST else "APQN_WHITELIST"


def folder_of(settings: t.Mapping[str, str]) -> str | None:
    """The name of a slot's token folder; None where the library is not one of openCryptoki's own."""
    return settings.get("tokname") or TOKEN_FOLDERS.get(os.path.basename(settings.get("stdll", "")))


def problems(text: str, version: Version) -> list[Problem]:
    """What is wrong with an ``opencryptoki.conf``, by line; empty if that version takes it as it is meant."""
    try:
        items = conf.parse(text)
    except conf.ConfSyntaxError as exc:
        return [Problem(exc.line, exc.reason)]
    syntax = _one_parser(text) if version >= _ONE_PARSER else _old_parser(text, version)
    if syntax:
        return [syntax]
    found = _top_level(items, version)
    blocks = [item for item in items if isinstance(item, conf.Block) and item.name == "slot"]
    numbers: dict[int, int] = {}
    folders: dict[str, int] = {}
    for block in blocks:
        found += _slot(block, version)
        slot = t.cast(int, block.number)
        if slot in numbers:
            found.append(Problem(block.line, f"slot {slot} is there twice, first on line {numbers[slot]}"))
        numbers.setdefault(slot, block.line)
        folder = folder_of(block.settings())
        if folder in folders:
            found.append(
                Problem(block.line, f"slots {folders[folder]} and {slot} have the same token folder, {folder}: give tokname")
            )
        elif folder:
            folders[folder] = slot
    return found


def _top_level(items: t.Sequence[conf.Item], version: Version) -> list[Problem]:
    found = []
    for item in items:
        if isinstance(item, conf.Block) and item.name == "slot" and item.number is not None:
            continue
        if isinstance(item, conf.Setting) and item.key == "version":
            continue
        if isinstance(item, conf.Flag) and item.word == "disable-event-support" and version >= _DISABLE_EVENTS:
            continue
        if isinstance(item, conf.WordList) and item.name == "statistics" and version >= _STATISTICS:
            wrong = [word for word in item.words if word not in ("on", "off", "implicit", "internal")]
            if wrong:
                found.append(Problem(item.line, f"statistics knows on, off, implicit and internal, not {wrong[0]}"))
            continue
        name = item.word if isinstance(item, conf.Flag) else item.key if isinstance(item, conf.Setting) else item.name
        found.append(Problem(item.line, f"openCryptoki {_dotted(version)} knows no {name} there"))
    return found


def _dotted(version: Version) -> str:
    return "{}.{}".format(*version)


def _slot(block: conf.Block, version: Version) -> list[Problem]:
    found: list[Problem] = []
    if t.cast(int, block.number) > MAX_SLOT:
        found.append(Problem(block.line, f"slots go from 0 to {MAX_SLOT}"))
    for item in block.items:
        if isinstance(item, conf.Flag):
            found.append(Problem(item.line, f"{item.word!r} stands alone: a value of several words needs double quotes"))
            continue
        since = SLOT_KEYS.get(item.key)
        if since is None or since > version:
            known = f" (3.{since[1]} does)" if since else ""
            found.append(Problem(item.line, f"openCryptoki {_dotted(version)} knows no {item.key}{known}"))
            continue
        if len(conf.encode(item.value)) > _WIDTHS.get(item.key, 255):
            found.append(Problem(item.line, f"{item.key} has more than {_WIDTHS.get(item.key, 255)} bytes"))
        found += _value(item, version)
    if "stdll" not in block.settings():
        found.append(Problem(block.line, f"slot {block.number} has no stdll"))
    return found


def _value(item: conf.Setting, version: Version) -> list[Problem]:
    is_version = re.fullmatch(r"[0-9]+\.[0-9]+", item.value)
    bad_name = item.value in (".", "..", "HSM_MK_CHANGE") or "/" in item.value
    if item.key == "tokname" and bad_name:
        return [Problem(item.line, "tokname is the plain name of a folder")]
    if item.key == "confname" and bad_name and not item.value.startswith("/"):
        return [Problem(item.line, "confname is the plain name of a file or an absolute path")]
    if item.key == "tokversion" and not is_version:
        return [Problem(item.line, "tokversion is a number with a dot, such as 3.12")]
    if item.key == "tokversion" and item.quoted and version < _ONE_PARSER:
        return [Problem(item.line, f"openCryptoki {_dotted(version)} reads tokversion without quotes only")]
    if item.key in ("hwversion", "firmwareversion"):
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", item.value):
            return [Problem(item.line, f"{item.key} is a number with a dot, such as 2.32")]
        if is_version and not item.quoted and (3, 12) <= version < _ONE_PARSER:
            return [Problem(item.line, f"openCryptoki {_dotted(version)} reads {item.key} in double quotes only")]
    return []


#: cfglex.l: what a word may be since 3.18.
_WORD = re.compile(r"[a-zA-Z./][a-zA-Z0-9_./-]*|0|[1-9][0-9]*|0x[0-9a-fA-F]+|[0-9]+\.[0-9]+")


def _one_parser(text: str) -> Problem | None:
    """What cfglex.l and cfgparse.y would not take that :func:`.opencryptoki_conf.parse` does."""
    previous: conf.Token | None = None
    for token in conf.tokens(text):
        if token.kind == "word" and not _WORD.fullmatch(token.text):
            return Problem(token.line, f"{token.text!r} needs double quotes")
        if token.kind == "string" and token.text == '""':
            return Problem(token.line, "an empty value")
        if previous is not None and previous.text == "=" and token.kind == "word" and re.fullmatch(r"[0-9]+|0x.*", token.text):
            return Problem(token.line, f"{token.text} alone is read as a number: it needs double quotes")
        if token.kind not in ("space", "comment"):
            previous = token
    return None


#: The older lexers: kind and expression, of which the longest match wins, of equal ones the first.
_OLD: tuple[tuple[str, str], ...] = (
    ("space", r"[\t ]+"),
    ("=", "="),
    ("{", r"\{"),
    ("}", r"\}"),
    ("number", "[0-9]+"),
    ("version", "version"),
    ("slot", "slot"),
    ("text", r'[^"= \t\n]+'),
    ("text", r'"[^"\n]*"'),
)
#: Those of one or the other: a comment with its line end is a line end, a line end before a brace belongs to it.
_UNTIL_3_14 = (("{", r"\n\{"), ("eol", r"\n|#.*\n"))
_UNTIL_3_17 = (("eol", r"\n"), ("comment", r"#[^\n]*"))


def _old_tokens(text: str, version: Version) -> list[conf.Token]:
    rules = [*_OLD[:4], *(_UNTIL_3_17 if version >= (3, 15) else _UNTIL_3_14)]
    if version >= (3, 12):
        rules.append(("dotted", r"[0-9]+\.[0-9]+"))
    if version >= _DISABLE_EVENTS:
        rules.append(("event", "disable-event-support"))
    rules += _OLD[4:]
    compiled = [(kind, re.compile(expression)) for kind, expression in rules]
    found, place, line = [], 0, 1
    while place < len(text):
        best, length = "junk", 1
        for kind, expression in compiled:
            match = expression.match(text, place)
            if match and match.end() - place > length - (best == "junk"):
                best, length = kind, match.end() - place
        if best != "space":
            found.append(conf.Token(best, text[place : place + length], place, place + length, line))
        line += text.count("\n", place, place + length)
        place += length
    return found


class _Old:
    """The grammars before 3.18, as far as their first error."""

    def __init__(self, text: str, version: Version) -> None:
        self._tokens = _old_tokens(text, version)
        self._comments = version >= (3, 15)
        self._version = version
        self._place = 0

    def check(self) -> Problem | None:
        while self._place < len(self._tokens):
            token = self._tokens[self._place]
            if token.kind == "version":
                wrong = self._expect("version", "text") or self._line_end()
            elif token.kind == "event":
                wrong = self._expect("event") or self._line_end()
            elif token.kind == "slot":
                wrong = self._slot()
            else:
                wrong = self._line_end()
            if wrong:
                return wrong
        return None

    def _kind(self) -> str:
        return self._tokens[self._place].kind if self._place < len(self._tokens) else "end"

    def _expect(self, *kinds: str) -> Problem | None:
        for kind in kinds:
            if self._kind() != kind:
                return self._problem()
            self._place += 1
        return None

    def _line_end(self) -> Problem | None:
        if self._comments and self._kind() == "comment":
            self._place += 1
        return self._expect("eol")

    def _slot(self) -> Problem | None:
        wrong = self._expect("slot", "number")
        if not wrong and self._comments and self._kind() == "eol":
            self._place += 1
        wrong = wrong or self._expect("{") or self._line_end()
        while not wrong and self._kind() != "}":
            if self._comments and self._kind() in ("eol", "comment"):
                wrong = self._line_end()
                continue
            wrong = self._expect("text", "=")
            if not wrong:
                dotted = self._kind() == "dotted"
                wrong = self._expect("dotted" if dotted else "text") or self._line_end()
        return wrong or self._expect("}")

    def _problem(self) -> Problem:
        if self._place >= len(self._tokens):
            return Problem(self._tokens[-1].line if self._tokens else 0, "the file ends too early")
        token = self._tokens[self._place]
        before = self._tokens[self._place - 1] if self._place else None
        shown = token.text.strip() or "the line's end"
        reason = f"{shown!r} is not expected"
        if token.kind == "eol" and before is not None and before.kind == "eol":
            reason = (
                f"openCryptoki {_dotted(self._version)} takes no comment and no empty line there (within braces, or before one): "
                "it drops the slot without a word"
            )
        elif before is not None and before.text == "=":
            reason = f"{shown} alone is read as a number or a keyword: it needs double quotes"
        elif before is not None and before.kind == "text" and token.kind in ("text", "number", "version", "slot", "dotted"):
            reason = f"{shown!r} behind a value: a value of several words needs double quotes"
        elif token.text.rstrip() != token.text and "\r" in token.text:
            reason = "a carriage return: the file needs Unix line ends"
        elif "{" in token.text or "}" in token.text:
            reason = f"{shown!r}: a brace needs a blank or a line of its own"
        return Problem(token.line, reason)


def _old_parser(text: str, version: Version) -> Problem | None:
    return _Old(text, version).check()


def ep11_problems(text: str, version: Version) -> list[Problem]:
    """What is wrong with an EP11 token's file."""
    try:
        items = conf.parse(text)
    except conf.ConfSyntaxError as exc:
        return [Problem(exc.line, exc.reason)]
    if version >= _EP11_ONE_PARSER:
        syntax = _one_parser(text)
        if syntax:
            return [syntax]
    found: list[Problem] = []
    words: set[str] = set()
    for item in items:
        if isinstance(item, conf.Pairs):
            words.add("list")
            found += _apqns(item, version)
        elif isinstance(item, conf.Flag) and item.word == "APQN_ANY":
            words.add("any")
        elif isinstance(item, conf.Flag) and EP11_MODES.get(item.word, (99, 0)) <= version:
            words.add(item.word)
        elif isinstance(item, conf.Setting) and EP11_VALUES.get(item.key, (99, 0)) <= version:
            if item.key == "EXPECTED_WKVP" and not is_pattern(item.value, WKVP_BYTES):
                found.append(Problem(item.line, f"EXPECTED_WKVP has {WKVP_BYTES} bytes in hexadecimal"))
            if item.key == "EXPECTED_WKVP" and not item.quoted:
                found.append(Problem(item.line, "EXPECTED_WKVP stands in double quotes"))
            if item.key == "PKEY_MODE" and item.value not in PKEY_MODES:
                found.append(Problem(item.line, f"PKEY_MODE is one of {', '.join(PKEY_MODES)}"))
        elif not (isinstance(item, conf.Setting) and item.key == "version" and version >= _EP11_ONE_PARSER):
            name = item.word if isinstance(item, conf.Flag) else item.key if isinstance(item, conf.Setting) else item.name
            found.append(Problem(item.line, f"openCryptoki {_dotted(version)} knows no {name} in an EP11 token's file"))
    if {"list", "any"} <= words:
        found.append(Problem(0, "APQN_ANY and a list of adapters exclude each other"))
    if not words & {"list", "any"}:
        found.append(Problem(0, "neither APQN_ANY nor a list of adapters is there"))
    if "FIPS_SESSION_MODE" in words and words & {"STRICT_MODE", "VHSM_MODE"}:
        found.append(Problem(0, "FIPS_SESSION_MODE excludes STRICT_MODE and VHSM_MODE"))
    return found


def _apqns(item: conf.Pairs, version: Version) -> list[Problem]:
    if item.name == "APQN_ALLOWLIST" and version < _ALLOWLIST:
        return [Problem(item.line, f"openCryptoki {_dotted(version)} calls it APQN_WHITELIST")]
    if len(item.words) % 2 or not item.words:
        return [Problem(item.line, f"{item.name} has pairs of adapter and domain, one or more")]
    wrong = [word for word in item.words if not 0 <= (-1 if (value := conf.number(word)) is None else value) <= MAX_APQN]
    if wrong:
        return [Problem(item.line, f"{wrong[0]!r} is no adapter or domain (0 to {MAX_APQN})")]
    return []


def cca_problems(text: str, version: Version) -> list[Problem]:
    """What is wrong with a CCA token's file."""
    if version < CCA_FILE:
        return [Problem(0, f"openCryptoki {_dotted(version)} reads no file for CCA tokens (3.20 does)")]
    try:
        items = conf.parse(text)
    except conf.ConfSyntaxError as exc:
        return [Problem(exc.line, exc.reason)]
    syntax = _one_parser(text)
    if syntax:
        return [syntax]
    found: list[Problem] = []
    for item in items:
        if isinstance(item, conf.Setting) and item.key == "version":
            continue
        if isinstance(item, conf.Flag) and item.word.upper() == "FORCE_SENSITIVE" and version >= (3, 23):
            continue
        if isinstance(item, conf.Setting) and item.key.upper() in CCA_VALUES and CCA_VALUES[item.key.upper()][0] <= version:
            choices = CCA_VALUES[item.key.upper()][1]
            if item.value not in choices:
                found.append(Problem(item.line, f"{item.key} is one of {', '.join(choices)}"))
        elif isinstance(item, conf.Block) and item.name.upper() == "EXPECTED_MKVPS" and item.number is None:
            for inner in item.items:
                if not isinstance(inner, conf.Setting) or inner.key.upper() not in CCA_PATTERNS:
                    found.append(Problem(inner.line, f"EXPECTED_MKVPS has {', '.join(CCA_PATTERNS)} only"))
                elif not is_pattern(inner.value, MKVP_BYTES) or not inner.quoted:
                    found.append(Problem(inner.line, f"{inner.key} has {MKVP_BYTES} bytes in hexadecimal, in double quotes"))
        else:
            name = item.word if isinstance(item, conf.Flag) else item.key if isinstance(item, conf.Setting) else item.name
            found.append(Problem(item.line, f"openCryptoki {_dotted(version)} knows no {name} in a CCA token's file"))
    return found


def is_pattern(value: str, size: int) -> bool:
    """Whether a text is a verification pattern of ``size`` bytes, with or without 0x."""
    digits = value[2:] if value[:2].lower() == "0x" else value
    return re.fullmatch(f"[0-9a-fA-F]{{{2 * size}}}", digits) is not None
