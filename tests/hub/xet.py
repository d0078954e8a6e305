"""Xet: the released client stores its chunks in a local folder, when a Hub says that this is where they go."""

import struct
import time
from pathlib import Path

HEADER, ENTRY = 48, 48  # bytes of a shard's header and of each of its records


class Xet:
    """The folder of a content-addressed store, and which large files are in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.enabled = False

    def token(self) -> dict[str, str | int]:
        """What a client needs to know to read and write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return {"casUrl": f"local://{self.folder}", "accessToken": "local", "exp": int(time.time()) + 3600}

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of a large file, None if it was not stored this way."""
        return self.files().get(sha256) if self.enabled else None

    def files(self) -> dict[str, str]:
        """sha256 -> Xet hash of everything that was uploaded."""
        found: dict[str, str] = {}
        for shard in self.folder.rglob("*.mdb"):
            found |= _read_shard(shard.read_bytes())
        return found

    def fetch(self, sha256: str, into: Path) -> Path | None:
        """Put a file together from its chunks, so that clients without Xet can read it; None if it is not there."""
        name = self.hash_of(sha256)
        if name is None:
            return None
        from hf_xet import XetFileInfo, XetSession

        target = into / sha256
        with XetSession().new_file_download_group(endpoint=f"local://{self.folder}") as group:
            group.start_download_file(XetFileInfo(name, None), str(target))
        return target


def _read_shard(raw: bytes) -> dict[str, str]:
    """The files of a shard: for each a record with hash, flags and number of segments, then these, then what flags
    announce: as many records for verification (bit 31), one with the sha256 (bit 30)."""
    found, at = {}, HEADER
    while at + ENTRY <= len(raw):
        file_hash = raw[at : at + 32]
        if file_hash == b"\xff" * 32:
            break
        flags, segments = struct.unpack_from("<II", raw, at + 32)
        at += ENTRY + segments * ENTRY * (2 if flags >> 31 & 1 else 1)
        if flags >> 30 & 1:
            found[_hex(raw[at : at + 32])] = _hex(file_hash)
            at += ENTRY
    return found


def _hex(raw: bytes) -> str:
    """As Xet writes its hashes: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
