# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""fscrypt without a kernel: numbers, the identifier, and what is left in memory."""

from __future__ import annotations

import errno
import fcntl
import platform
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt, ioctl

KEY = bytes(range(64))
#: What a kernel answered for that key (tests/integration/test_storage_fscrypt.py asks the one at hand).
IDENTIFIER = "8699c2c53707405da5aba5ae4d8583c0"


def test_identifier_of_a_known_key() -> None:
    assert fscrypt.identifier(KEY) == IDENTIFIER


#: As a C program prints them that includes linux/fscrypt.h and linux/fs.h, on x86_64; s390x and aarch64 have the same.
HEADER = {
    "_SET_POLICY": 0x800C6613,
    "_GET_POLICY_EX": 0xC0096616,
    "_ADD_KEY": 0xC0506617,
    "_REMOVE_KEY": 0xC0406618,
    "_KEY_STATUS": 0xC080661A,
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64", "s390x"), reason="another layout of ioctl numbers")
def test_ioctl_numbers_are_those_of_the_header() -> None:
    assert {name: getattr(fscrypt, name) for name in HEADER} == HEADER


@pytest.mark.parametrize(
    ("machine", "expected"), [("x86_64", 0x800C6613), ("s390x", 0x800C6613), ("ppc64le", 0x400C6613), ("mips64", 0x400C6613)]
)
def test_ioctl_numbers_follow_the_processor(machine: str, expected: int) -> None:
    assert ioctl.number(ioctl.READ, "f", 19, 12, machine) == expected


class Kernel:
    """Answers fcntl.ioctl, and keeps the buffers that it was given."""

    def __init__(self, *answers: int | OSError) -> None:
        self.answers = list(answers)
        self.buffers: list[bytearray] = []
        self.seen: list[bytes] = []

    def __call__(self, fd: int, number: int, buffer: bytearray) -> int:
        self.buffers.append(buffer)
        self.seen.append(bytes(buffer))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, OSError):
            raise OSError(answer.errno, answer.strerror)
        if number == fscrypt._ADD_KEY:
            buffer[8:24] = bytes.fromhex(IDENTIFIER)
        return answer


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> t.Callable[..., Kernel]:
    def answering(*answers: int | OSError) -> Kernel:
        made = Kernel(*answers)
        monkeypatch.setattr(fcntl, "ioctl", made)
        return made

    return answering


@pytest.mark.parametrize("answer", [0, OSError(errno.EDQUOT, "")])
def test_the_key_is_wiped_and_was_never_on_the_stack(tmp_path: Path, kernel: t.Callable[..., Kernel], answer: t.Any) -> None:
    made = kernel(answer)
    if answer:
        with pytest.raises(TdeError):
            fscrypt.add_key(str(tmp_path), KEY)
    else:
        assert fscrypt.add_key(str(tmp_path), KEY) == IDENTIFIER
    assert KEY in made.seen[0]
    assert not any(made.buffers[0])
    # fcntl.ioctl copies buffers of up to 1024 bytes to the C stack.
    assert len(made.buffers[0]) > 1024


@pytest.mark.parametrize("length", [0, 32, 63, 65])
def test_only_keys_of_full_length(tmp_path: Path, kernel: t.Callable[..., Kernel], length: int) -> None:
    made = kernel()
    with pytest.raises(TdeError) as caught:
        fscrypt.add_key(str(tmp_path), bytes(length))
    assert caught.value.code == "fscrypt_key_invalid"
    assert not made.seen


@pytest.mark.parametrize(
    ("number", "filesystem", "sizes", "reason", "how"),
    [
        (errno.EOPNOTSUPP, "ext4", (4096, 4096), "no encrypt feature", "tune2fs -O encrypt /dev/sda2"),
        (errno.EOPNOTSUPP, "ext4", (4096, 4096), "no encrypt feature", "GRUB"),
        (errno.EOPNOTSUPP, "ext4", (1024, 4096), "no encrypt feature", "1024 bytes and the memory's pages 4096"),
        (errno.ENOTTY, "ext4", (4096, 4096), "older than 5.4", "CONFIG_FS_ENCRYPTION"),
        (errno.ENOTTY, "xfs", (4096, 4096), "xfs has no file encryption", "storage=image"),
        (errno.ENOTTY, "overlay", (4096, 4096), "overlay has no file encryption", "storage=image"),
    ],
)
def test_why_not_and_what_helps(number: int, filesystem: str, sizes: tuple[int, int], reason: str, how: str) -> None:
    said, helps = fscrypt._why_not(OSError(number, ""), filesystem, "/dev/sda2", *sizes)
    assert reason in said
    assert how in helps
