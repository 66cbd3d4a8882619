"""Which texts have been seen: their digests, in a hash table that lies on the disk.

A set of Python objects takes a hundred bytes a document, of memory that cannot be given back. Here a document takes 32 to 128 bytes of
a file without a name, mapped: what is read and written often stays in memory while there is room, the kernel puts the rest on the disk.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_SLOT = 16  # bytes of a digest
_EMPTY = bytes(_SLOT)
_FIRST_SLOTS = 256


class DigestSet:
    """A set of 16-byte digests, in a file in `folder` that vanishes with it. Raises OSError where the disk has no room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._slots = _FIRST_SLOTS
        self._table = self._allocate()

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new; from now on it is not."""
        if 2 * self._count >= self._slots:
            self._grow()
        new = self._place(digest)
        self._count += new
        return new

    def update(self, digests: Iterable[bytes]) -> None:
        """Adds all of them."""
        for digest in digests:
            self.add(digest)

    def close(self) -> None:
        """Gives the file back."""
        self._table.close()

    def _place(self, digest: bytes) -> bool:
        """Open addressing with linear probing (Knuth, volume 3, section 6.4, algorithm L). The digest is its own hash."""
        table, last = self._table, (self._slots - 1) * _SLOT
        at = int.from_bytes(digest[8:], "little") * _SLOT & last
        while (held := table[at : at + _SLOT]) != _EMPTY:
            if held == digest:
                return False
            at = at + _SLOT & last
        table[at : at + _SLOT] = digest
        return True

    def _grow(self) -> None:
        old = self._table
        self._slots *= 4
        self._table = self._allocate()
        for at in range(0, len(old), _SLOT):
            if (held := old[at : at + _SLOT]) != _EMPTY:
                self._place(held)
        old.close()

    def _allocate(self) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # Reserved, since a mapped hole for which the disk then has no room ends the process.
            os.posix_fallocate(file.fileno(), 0, self._slots * _SLOT)
            return mmap.mmap(file.fileno(), self._slots * _SLOT)
