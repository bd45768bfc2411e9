"""What takes long to make of text, kept in a folder by a hash of what it was made of."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from apexlib.files import atomic_write

_log = logging.getLogger(__name__)


def corpus_hash(documents: Iterable[str]) -> str:
    """SHA-256, in hex, over documents and their borders: the fingerprint of a corpus."""
    return hashlib.sha256(b"".join(map(text_hash, documents))).hexdigest()


def text_hash(text: str) -> bytes:
    """SHA-256 of a text, by which texts are ordered and split."""
    return hashlib.sha256(text.encode()).digest()


def cached(folder: Path | None, name: str, key: str, build: Callable[[], bytes]) -> bytes:
    """Return `build()`, kept in `folder` under its key; what is damaged is built anew, no folder keeps nothing."""
    if folder is None:
        return build()
    path = Path(folder) / f"{name}-{key[:32]}.bin"
    if path.is_file():
        stored = path.read_bytes()
        if hashlib.sha256(stored[32:]).digest() == stored[:32]:
            return stored[32:]
        _log.warning("%s is damaged; it is built anew", path)
    content = build()
    with atomic_write(path) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
    return content
