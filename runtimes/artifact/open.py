"""Open an artifact: check it before any part of it is used."""

from __future__ import annotations

from pathlib import Path

from ...errors import LlmcError
from .hashing import sha256_all
from .manifest import MANIFEST, Manifest
from .versions import fits, installed


def open_artifact(folder: str | Path, check_files: bool = True) -> Manifest:
    """Read an artifact's manifest; check installed versions and the files.

    Args:
        folder: the artifact.
        check_files: compare the hash of every file with the manifest; otherwise only the sizes.

    Raises:
        LlmcError: ARTIFACT_NOT_FOUND, ARTIFACT_INVALID, ARTIFACT_NEWER or ARTIFACT_OLDER, RUNTIME_VERSION or
            ARTIFACT_DAMAGED, checked in this order.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_versions(manifest)
    _check_sizes(folder, manifest)
    if check_files:
        _check_hashes(folder, manifest)
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Read an artifact's manifest without checking versions and files.

    Raises:
        LlmcError: ARTIFACT_NOT_FOUND, ARTIFACT_INVALID, ARTIFACT_NEWER or ARTIFACT_OLDER.
    """
    return Manifest.from_json(_read(Path(folder)))


def _read(folder: Path) -> bytes:
    if not folder.is_dir():
        is_file = folder.exists()
        what = f"{str(folder)!r} is a file, not an artifact." if is_file else f"There is no folder {str(folder)!r}."
        hint = f"llmc compile {folder} -o DIR" if is_file else f"llmc compile MODEL -o {folder}"
        raise LlmcError("ARTIFACT_NOT_FOUND", what, f"To create an artifact: {hint}")
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        what = f"{str(folder / MANIFEST)!r} can't be read: {error.strerror}."
        raise LlmcError("ARTIFACT_INVALID", what, f"Check its permissions: ls -l {folder}") from None
    if (folder / "config.json").exists() or next(folder.glob("*.gguf"), None):
        what = f"{str(folder)!r} has a model that is not compiled yet."
        raise LlmcError("ARTIFACT_NOT_FOUND", what, f"Compile it: llmc compile {folder} -o DIR")
    what = f"{str(folder)!r} has no {MANIFEST}."
    raise LlmcError("ARTIFACT_NOT_FOUND", what, "To create an artifact: llmc compile MODEL -o DIR")


def _check_versions(manifest: Manifest) -> None:
    for module, wanted in manifest.requires.items():
        has = installed(module)
        try:
            if has is not None and fits(has, wanted):
                continue
        except ValueError as error:
            what = f"{module} {has} can't be compared with the required version: {error}."
        else:
            what = f"The artifact needs {module}{wanted}; {f'version {has}' if has else 'no version'} is installed."
        raise LlmcError("RUNTIME_VERSION", what, f"Install it: pip install '{module}{wanted}'")


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, spec in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if (has := path.stat().st_size) != spec.bytes:
            raise _damaged(folder, f"{name} has {has:,} bytes instead of {spec.bytes:,}")


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    hashes = sha256_all(folder / name for name in manifest.files)
    for (name, spec), has in zip(manifest.files.items(), hashes, strict=True):
        if has != spec.sha256:
            raise _damaged(folder, f"the content of {name} has changed")


def _damaged(folder: Path, what: str) -> LlmcError:
    return LlmcError(
        "ARTIFACT_DAMAGED",
        f"The artifact {str(folder)!r} is damaged: {what}.",
        f"Copy it again, or compile it again: llmc compile MODEL -o {folder}",
    )
