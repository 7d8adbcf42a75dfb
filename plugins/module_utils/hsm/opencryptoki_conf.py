# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki's configuration files as text with named places, edited without touching a byte beside. Pure.

One grammar covers ``opencryptoki.conf`` and the tokens' own files (``ep11tok.conf``, ``ccatok.conf``). It is the one of
openCryptoki 3.18 and newer (usr/lib/config/cfgparse.y and cfglex.l), read with patience: what an older or newer daemon
refuses still parses here, so that it can be shown and mended. What each version takes is said by :mod:`.opencryptoki_rules`.

An edit replaces, inserts or removes a piece of the text; comments, order and white space elsewhere stay as they are.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ..common.errors import TdeError

#: Tokens by kind, tried in this order. A word is whatever a space, a quote or a sign of the grammar ends.
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+)|(?P<eol>\n)|(?P<comment>\#[^\n]*)|(?P<string>"[^"]*")|(?P<sign>[={}(),])"""
    r"""|(?P<word>[^\s="{}(),#]+)|(?P<junk>.)""",
    re.VERBOSE,
)
#: The keywords of a list of number pairs, and of its end (ep11tok.conf).
PAIR_LISTS = ("APQN_ALLOWLIST", "APQN_WHITELIST")
_PAIR_LIST_END = "END"
#: What cfglex.l takes without quotes (BARE), and a version.
_BARE = re.compile(r"[a-zA-Z./][a-zA-Z0-9_./-]*")
_VERSION = re.compile(r"[0-9]+\.[0-9]+")


class Token(t.NamedTuple):
    """A piece of the text: kind (a group of the expression above), text, first and last offset, line from 1."""

    kind: str
    text: str
    start: int
    end: int
    line: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """``key = value``, or ``key value`` where the files of tokens have it so.

    ``value`` is without quotes; ``start`` to ``end`` is all of it, ``value_start`` to ``end`` the value as written.
    """

    key: str
    value: str
    quoted: bool
    start: int
    value_start: int
    end: int
    line: int


@dataclasses.dataclass(frozen=True)
class Flag:
    """A word that stands alone."""

    word: str
    start: int
    end: int
    line: int


@dataclasses.dataclass(frozen=True)
class Block:
    """``name number { settings }``; ``number`` is None where there is none. ``body_start`` is after the brace."""

    name: str
    number: int | None
    items: tuple[Setting | Flag, ...]
    start: int
    body_start: int
    body_end: int
    end: int
    line: int

    def settings(self) -> dict[str, str]:
        """Keys and values; of a key that stands twice, the last one."""
        return {item.key: item.value for item in self.items if isinstance(item, Setting)}


@dataclasses.dataclass(frozen=True)
class WordList:
    """``name (word, word)``."""

    name: str
    words: tuple[str, ...]
    start: int
    end: int
    line: int


@dataclasses.dataclass(frozen=True)
class Pairs:
    """``APQN_ALLOWLIST`` pairs of numbers as written ``END``."""

    name: str
    words: tuple[str, ...]
    start: int
    end: int
    line: int


Item = t.Union[Setting, Flag, Block, WordList, Pairs]  # noqa: UP007 - the sanity test takes the other for an operation


class ConfSyntaxError(Exception):
    """The text has no structure that could be edited. ``line`` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(f"line {line}: {reason}")


def tokens(text: str) -> list[Token]:
    """All of the text, piece by piece."""
    found, line = [], 1
    for match in _TOKEN.finditer(text):
        found.append(Token(t.cast(str, match.lastgroup), match[0], match.start(), match.end(), line))
        line += match[0].count("\n")
    return found


def number(word: str) -> int | None:
    """A number as C's ``%i`` reads it: decimal, ``0x`` hexadecimal or, with a leading 0, octal."""
    if not re.fullmatch(r"0[xX][0-9a-fA-F]+|[0-9]+", word):
        return None
    try:
        return int(word, 16 if word[:2].lower() == "0x" else 8 if word.startswith("0") else 10)
    except ValueError:
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._all = [token for token in tokens(text) if token.kind not in ("space", "comment")]
        self._place = 0
        self._last_line = text.count("\n") + 1

    def _peek(self, skip_eol: bool = False) -> Token | None:
        place = self._place
        while place < len(self._all) and skip_eol and self._all[place].kind == "eol":
            place += 1
        return self._all[place] if place < len(self._all) else None

    def _take(self, skip_eol: bool = False) -> Token | None:
        while skip_eol and self._place < len(self._all) and self._all[self._place].kind == "eol":
            self._place += 1
        token = self._peek()
        self._place += token is not None
        return token

    def _is(self, sign: str, skip_eol: bool = False) -> bool:
        token = self._peek(skip_eol)
        return token is not None and token.text == sign and token.kind == "sign"

    def items(self) -> list[Item]:
        found: list[Item] = []
        while (token := self._take(skip_eol=True)) is not None:
            found.append(self._item(token, first=not found))
        return found

    def _item(self, token: Token, *, first: bool) -> Item:
        if token.kind == "string":
            return Flag(_bare(token), token.start, token.end, token.line)
        if token.kind != "word":
            raise ConfSyntaxError(
                token.line, "a quote that does not end" if token.text == '"' else f"{token.text!r} is not expected"
            )
        if self._is("="):
            return self._setting(token)
        if token.text in PAIR_LISTS:
            return self._pairs(token)
        following = self._peek()
        if first and token.text == "version" and following is not None and following.kind == "word":
            self._take()
            return Setting("version", following.text, False, token.start, following.start, following.end, token.line)
        if self._is("(", skip_eol=True):
            return self._word_list(token)
        if self._is("{", skip_eol=True):
            return self._block(token, None)
        if following is not None and following.kind == "word" and number(following.text) is not None:
            place, _taken = self._place, self._take()
            if self._is("{", skip_eol=True):
                return self._block(token, number(following.text))
            self._place = place
        elif following is not None and following.kind in ("word", "string") and token.text in KEY_VALUE_WORDS:
            self._take()
            return Setting(
                token.text, _bare(following), following.kind == "string", token.start, following.start, following.end, token.line
            )
        return Flag(token.text, token.start, token.end, token.line)

    def _setting(self, key: Token) -> Setting:
        self._take()
        value = self._take()
        if value is None or value.kind not in ("word", "string"):
            unended = value is not None and value.text == '"'
            raise ConfSyntaxError(key.line, "a quote that does not end" if unended else f"{key.text} has no value")
        return Setting(key.text, _bare(value), value.kind == "string", key.start, value.start, value.end, key.line)

    def _block(self, name: Token, slot: int | None) -> Block:
        brace = t.cast(Token, self._take(skip_eol=True))
        items: list[Setting | Flag] = []
        while not self._is("}", skip_eol=True):
            token = self._take(skip_eol=True)
            if token is None:
                raise ConfSyntaxError(brace.line, "a brace that does not close")
            item = self._item(token, first=False)
            if not isinstance(item, (Setting, Flag)):
                raise ConfSyntaxError(
                    token.line, f"{token.text!r} is not expected within braces; a closing brace may be missing before"
                )
            items.append(item)
        end = t.cast(Token, self._take(skip_eol=True))
        return Block(name.text, slot, tuple(items), name.start, brace.end, end.start, end.end, name.line)

    def _word_list(self, name: Token) -> WordList:
        self._take(skip_eol=True)
        words: list[str] = []
        while True:
            token = self._take(skip_eol=True)
            if token is None:
                raise ConfSyntaxError(name.line, "a parenthesis that does not close")
            if token.text == ")":
                return WordList(name.text, tuple(words), name.start, token.end, name.line)
            if token.kind == "word":
                words.append(token.text)
            elif token.text != ",":
                raise ConfSyntaxError(token.line, f"{token.text!r} is not expected in a list")

    def _pairs(self, name: Token) -> Pairs:
        words: list[str] = []
        while True:
            token = self._take(skip_eol=True)
            if token is None or token.kind != "word":
                raise ConfSyntaxError(name.line, f"{name.text} has no {_PAIR_LIST_END}")
            if token.text == _PAIR_LIST_END:
                return Pairs(name.text, tuple(words), name.start, token.end, name.line)
            words.append(token.text)


#: Keywords of ep11tok.conf whose value follows without ``=`` (usr/lib/ep11_stdll/ep11_specific.c).
KEY_VALUE_WORDS = ("CPFILTER", "PKEY_MODE", "DIGEST_LIBICA", "EXPECTED_WKVP", "LOGLEVEL")


def _bare(token: Token) -> str:
    return token.text[1:-1] if token.kind == "string" else token.text


def parse(text: str) -> list[Item]:
    """The items of a file, in order.

    :raises ConfSyntaxError: braces, quotes or lists that do not close.
    """
    return _Parser(text).items()


def decode(raw: bytes) -> str:
    """A file's bytes as text that :func:`encode` gives back byte for byte, whatever its encoding."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def slots(text: str) -> dict[int, dict[str, str]]:
    """The slots of ``opencryptoki.conf`` by number; of a number that stands twice, the last one.

    :raises ConfSyntaxError:
    """
    return {block.number: block.settings() for block in slot_blocks(text) if block.number is not None}


def slot_blocks(text: str) -> list[Block]:
    return [item for item in parse(text) if isinstance(item, Block) and item.name == "slot"]


def written(key: str, value: str) -> str:
    """A value as the file has it: bare where every version reads it so, quoted elsewhere.

    Versions of hardware and firmware need quotes from 3.12 to 3.17, and tokversion must have none until 3.17.

    :raises TdeError: ``invalid_option`` for what no version can read.
    """
    if not value or any(sign in value for sign in '"\n\r\0') or value != value.strip():
        raise TdeError(
            "invalid_option",
            "a value of openCryptoki's files is not empty, has no quote, no line break and no blank at its ends",
            obj=f"{key} {value!r}",
        )
    bare = _VERSION.fullmatch(value) if key == "tokversion" else _BARE.fullmatch(value) and value not in ("version", "slot")
    return value if bare and key not in ("hwversion", "firmwareversion") else f'"{value}"'


def _line_start(text: str, place: int) -> int:
    return text.rfind("\n", 0, place) + 1


def _line_end(text: str, place: int) -> int:
    """The offset after the line's end."""
    found = text.find("\n", place)
    return len(text) if found < 0 else found + 1


def _indent(text: str, place: int) -> str:
    found = re.match(r"[ \t]*", text[_line_start(text, place) : place])
    return found[0] if found else ""


def _append(text: str, addition: str) -> str:
    return text + ("\n" if text and not text.endswith("\n") else "") + addition


def set_slot(text: str, slot: int, wish: t.Mapping[str, str | None]) -> str:
    """A slot as wished: made after the last one, or its keys changed one by one.

    :param wish: keys and values; None removes a key, with its line. Keys that it does not name stay.
    :raises ConfSyntaxError: the text cannot be edited.
    """
    blocks = slot_blocks(text)
    block = next((block for block in blocks if block.number == slot), None)
    if block is None:
        body = "".join(f"{key} = {written(key, value)}\n" for key, value in wish.items() if value is not None)
        new = f"slot {slot}\n{{\n{body}}}\n"
        place = _line_end(text, blocks[-1].end) if blocks else len(text)
        head = _append(text[:place], "")
        return head + ("\n" if head.strip() and not head.endswith("\n\n") else "") + new + text[place:]
    for key, value in wish.items():
        text = _set_key(text, slot, key, value)
    return text


def _set_key(text: str, slot: int, key: str, value: str | None) -> str:
    block = next(block for block in slot_blocks(text) if block.number == slot)
    present = [item for item in block.items if isinstance(item, Setting) and item.key == key]
    if value is None:
        for item in reversed(present):
            text = _remove_piece(text, item.start, item.end, block)
        return text
    if present:
        for item in reversed(present):
            if item.value != value:
                text = text[: item.value_start] + written(key, value) + text[item.end :]
        return text
    line = f"{key} = {written(key, value)}"
    if block.items:
        last = block.items[-1]
        place = min(_line_end(text, last.end), block.body_end)
        # After the line of the last key; where the brace closes on that same line, before the brace.
        if text[last.end : place].endswith("\n"):
            return text[:place] + _indent(text, last.start) + line + "\n" + text[place:]
        return text[:place].rstrip(" \t") + "\n" + _indent(text, last.start) + line + "\n" + text[block.body_end :]
    if "\n" in text[block.body_start : block.body_end]:
        place = _line_end(text, block.body_start)
        return text[:place] + line + "\n" + text[place:]
    return text[: block.body_start] + f"\n{line}\n" + text[block.body_end :]


def _remove_piece(text: str, start: int, end: int, block: Block) -> str:
    """Take a setting away, with its line and a comment behind it if nothing else stands there."""
    first, last = _line_start(text, start), _line_end(text, end)
    alone = not text[first:start].strip() and re.fullmatch(r"[ \t\r]*(#[^\n]*)?\n?", text[end:last])
    if alone and first >= block.body_start and last <= block.body_end:
        return text[:first] + text[last:]
    return text[:start] + text[end:].lstrip(" \t")


def remove_slot(text: str, slot: int) -> str:
    """The text without a slot, every one of that number; comments before and behind it stay.

    :raises ConfSyntaxError: the text cannot be edited.
    """
    for block in reversed([block for block in slot_blocks(text) if block.number == slot]):
        first, last = _line_start(text, block.start), _line_end(text, block.end)
        before, behind = text[first : block.start], text[block.end : last]
        if before.strip() or behind.strip():
            text = text[: block.start] + text[block.end :].lstrip(" \t")
            continue
        # Of the empty lines around it, one goes with it.
        rest = text[last:]
        if rest.startswith("\n") and (first == 0 or text[:first].endswith("\n\n")):
            rest = rest[1:]
        elif not rest and text[:first].endswith("\n\n"):
            first -= 1
        text = text[:first] + rest
    return text


def set_flag(text: str, word: str, wished: bool) -> str:
    """A word that stands alone (``disable-event-support``, ``STRICT_MODE`` …), there or not."""
    found = [item for item in parse(text) if isinstance(item, Flag) and item.word == word]
    if wished and not found:
        return _before_slots(text, f"{word}\n")
    if not wished:
        for item in reversed(found):
            text = _without(text, item.start, item.end)
    return text


def set_statistics(text: str, words: t.Sequence[str]) -> str:
    """``statistics (on, implicit)`` as wished.

    :param words: what stands between the parentheses.
    """
    found = [item for item in parse(text) if isinstance(item, WordList) and item.name == "statistics"]
    line = f"statistics ({','.join(words)})"
    if not found:
        return _before_slots(text, line + "\n")
    for item in reversed(found):
        if set(item.words) != set(words):
            text = text[: item.start] + line + text[item.end :]
    return text


def _before_slots(text: str, line: str) -> str:
    """Put a line before the first slot, or at the end."""
    blocks = slot_blocks(text)
    if not blocks:
        return _append(text, line)
    place = _line_start(text, blocks[0].start)
    return text[:place] + line + "\n" + text[place:]


def _without(text: str, start: int, end: int) -> str:
    """Take a piece away, and its line if nothing is left on it."""
    first, last = _line_start(text, start), _line_end(text, end)
    if not (text[first:start] + text[end:last]).strip():
        return text[:first] + text[last:]
    return text[:start] + text[end:].lstrip(" \t")


def set_keyword(text: str, key: str, value: str, *, quoted: bool) -> str:
    """``key value`` in a token's file (``PKEY_MODE DEFAULT``, ``EXPECTED_WKVP "…"``), as it is written where it stands."""
    found = [item for item in parse(text) if isinstance(item, Setting) and item.key == key]
    new = f'"{value}"' if quoted else value
    if not found:
        return _append(text, f"{key} {new}\n")
    for item in reversed(found):
        if item.value != value:
            text = text[: item.value_start] + new + text[item.end :]
    return text


def remove_keyword(text: str, key: str) -> str:
    """The text without a setting."""
    for item in reversed([item for item in parse(text) if isinstance(item, Setting) and item.key == key]):
        text = _without(text, item.start, item.end)
    return text


def set_apqns(text: str, apqns: t.Sequence[tuple[int, int]] | None, word: str) -> str:
    """Which adapters and domains an EP11 token uses.

    :param apqns: pairs of adapter and domain; None for any.
    :param word: the list's keyword for the version in use.
    """
    present = parse(text)
    lists = [item for item in present if isinstance(item, Pairs)]
    if apqns is None:
        for item in reversed(lists):
            text = _without(text, item.start, item.end)
        return set_flag(text, "APQN_ANY", True)
    text = set_flag(text, "APQN_ANY", False)
    lists = [item for item in parse(text) if isinstance(item, Pairs)]
    new = word + "\n" + "".join(f" 0x{adapter:02x} 0x{domain:02x}\n" for adapter, domain in apqns) + _PAIR_LIST_END
    if not lists:
        return _append(text, new + "\n")
    for item in reversed(lists[1:]):
        text = _without(text, item.start, item.end)
    first = lists[0]
    return text if pairs(first) == list(apqns) else text[: first.start] + new + text[first.end :]


def pairs(item: Pairs) -> list[tuple[int, int]]:
    """The pairs of numbers of a list; what is no number becomes -1."""
    numbers = [-1 if (value := number(word)) is None else value for word in item.words]
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def set_expected_mkvps(text: str, patterns: t.Mapping[str, str]) -> str:
    """``EXPECTED_MKVPS { SYM = "…" … }`` of ccatok.conf.

    :param patterns: SYM, AES or APKA and the pattern in hexadecimal; none at all removes the block. Those not named are removed.
    """
    found = [item for item in parse(text) if isinstance(item, Block) and item.name.upper() == "EXPECTED_MKVPS"]
    if found and {key.upper(): value for key, value in found[0].settings().items()} == dict(patterns) and len(found) == 1:
        return text
    new = "EXPECTED_MKVPS\n{\n" + "".join(f'  {key} = "{value}"\n' for key, value in patterns.items()) + "}"
    for item in reversed(found[1:] if patterns else found):
        text = _without(text, item.start, item.end)
    if not patterns:
        return text
    return text[: found[0].start] + new + text[found[0].end :] if found else _append(text, new + "\n")
