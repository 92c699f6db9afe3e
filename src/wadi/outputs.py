"""Where a command may write: one rule for every folder and every file that a user names.

    with Output(out, "export", inputs=(adapter, model), overwrite=overwrite).writing() as folder:
        ...  # write into `folder`, which then takes the place of `out`

A folder is written if it is new or empty. `MARKER`, a file in it, then says which command wrote what. Only
that command replaces it, only with ``--overwrite``, and only as long as nothing else is in it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors, read_json, replacing_file, write_json

MARKER = ".wadi.json"
"""In every folder that a command wrote: the command, and the names of the files in the folder. Loaders of
diffusers, transformers and PEFT do not look at it."""

FILE_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".zip"}
    | {".bmp", ".gif", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"}
    | {".csv", ".html", ".json", ".jsonl", ".parquet", ".txt", ".yaml", ".yml"}
)
"""Endings that nobody gives to a folder: a new folder of such a name is a mistake."""


def unsigned(path: Path) -> str | None:
    """The command that wrote a file of a kind that cannot say so: nobody knows."""


@dataclass(frozen=True)
class Output:
    """A folder or a file that a user names for a command to write.

    Args:
        path: as the user gave it. A symbolic link is followed, and stays.
        command: who writes it, in the words of the command line: "export", "directions swap".
        inputs: folders and files that the command reads, or hub ids; ``None`` among them is ignored.
        overwrite: whether what this command wrote there before may be replaced; for a file, whether any file.
        suffixes: of a file, the endings that its name may have; a folder has none.
        resume: whether the command goes on in a folder that it wrote before. See `open`.
        option: what the messages call it.
        instead: what the message names beside another folder where `overwrite` is not to be had.
        signed: returns the command that a file says it was written by, as `command` is given, or ``None``.
    """

    path: str | os.PathLike
    command: str
    inputs: Sequence[str | os.PathLike | None] = ()
    overwrite: bool = False
    suffixes: tuple[str, ...] = ()
    resume: bool = False
    option: str = "--out"
    instead: str | None = None
    signed: Callable[[Path], str | None] = unsigned

    @property
    def real(self) -> Path:
        """The absolute path, without symbolic links and dots."""
        return Path(os.path.realpath(self.path))

    def check(self) -> None:
        """Decide whether the command may write here. Call it before anything that takes long.

        Raises:
            WadiError: it may not; the message says why, and what to do instead.
        """
        with explain_os_errors(self.path, "write there"):
            self._refuse_inputs()
            if self.resume and (_marker(self.real) or ("",))[0] == self.command:
                return  # nothing is replaced
            self._refuse_protected()
            if self.suffixes:
                self._check_file()
            else:
                self._check_folder()
            _check_parent(self.path, self.real)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield a temporary folder or file beside the place, which takes it when the block succeeds.

        If it does not, what was there before is there still.

        Raises:
            WadiError: as `check`, which is done before and after the block; or a file cannot be written.
        """
        self.check()
        write = replacing_file(self.real) if self.suffixes else self._new_folder()
        with write as temporary:
            yield temporary
            if not self.suffixes:
                _mark(temporary, self.command, sorted(_entries(temporary)))
            self.check()

    def open(self) -> None:
        """Make a folder that the command fills little by little, and mark it; it is never replaced whole.

        Raises:
            WadiError: as `check`, or it cannot be made.
        """
        self.check()
        with explain_os_errors(self.path, "create the folder"):
            self.real.mkdir(parents=True, exist_ok=True)
        if _marker(self.real) is None:
            _mark(self.real, self.command)

    def _refuse_protected(self) -> None:
        """Nothing may take the place of the current folder, of the home folder, or of what holds them."""
        found = {"the home folder": os.path.expanduser("~")}
        with suppress(OSError):  # a folder that was deleted
            found["the current folder"] = os.getcwd()
        for name, place in found.items():
            if _is_or_holds(self.real, place):
                raise WadiError(
                    f"{self.path}: is or holds {name}, which cannot be replaced; name another {self.option}"
                )

    def _refuse_inputs(self) -> None:
        for name in self.inputs:
            if name is not None and _is_or_holds(self.real, name):
                raise WadiError(
                    f"{self.path}: is or holds {os.fspath(name)}, which is read and would be lost; "
                    f"name another {self.option}"
                )

    def _check_file(self) -> None:
        path, endings = self.real, ", ".join(self.suffixes)
        if path.is_dir():
            raise WadiError(f"{self.path}: is a folder; name a file ({endings}) as {self.option}")
        if Path(self.path).suffix.lower() not in self.suffixes:
            raise WadiError(f"{self.option} {self.path}: the name of the file must end in {endings}")
        if not path.exists():
            return
        if not path.is_file():
            raise WadiError(f"{self.path}: is no regular file; name another {self.option}")
        if not self.overwrite and self.signed(path) != self.command:
            raise WadiError(
                f"{self.path}: exists; give --overwrite (Python: overwrite=True) to replace it, "
                f"or name another {self.option}"
            )

    def _check_folder(self) -> None:
        path, suffix = self.real, Path(self.path).suffix.lower()
        if path.exists() and not path.is_dir():
            raise WadiError(
                f"{self.path}: is a file, and wadi {self.command} writes a folder; name another {self.option}"
            )
        if not path.exists() and suffix in FILE_SUFFIXES:
            raise WadiError(
                f"{self.option} {self.path}: a folder is written here; omit the {suffix} at the end"
            )
        if path.exists() and (reason := self._unreplaceable(path)):
            raise WadiError(f"{self.path}: {reason}")

    def _unreplaceable(self, folder: Path) -> str | None:
        """Why this existing folder may not be replaced, or None if it may. `folder` is where it is now."""
        names = set(_entries(folder))
        if not names:
            return None
        marker, new = _marker(folder), f"name a new folder as {self.option}"
        if marker is None:
            instead = f", or {self.instead}" if self.instead else ""
            return f"is not empty, and wadi {self.command} did not write it; {new}{instead}"
        command, written = marker
        if command != self.command:
            return f"was written by wadi {command}, not by wadi {self.command}; {new}"
        if not self.overwrite:
            instead = self.instead or "give --overwrite (Python: overwrite=True) to replace it"
            return f"was written by wadi {command} before; {instead}, or {new}"
        if own := names - written:
            return f"holds {min(own)}, which wadi {command} did not write; move that away, or {new}"
        return None

    @contextmanager
    def _new_folder(self) -> Iterator[Path]:
        path = self.real
        with explain_os_errors(self.path, "write the folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _sibling(path, ".tmp")
            try:
                yield temporary
                if path.exists():
                    self._exchange(temporary)
                else:
                    os.replace(temporary, path)
            finally:
                rmtree(temporary, ignore_errors=True)

    def _exchange(self, temporary: Path) -> None:
        """Move the old folder aside, look at it again there, where nobody writes into it, and remove it."""
        path, moved = self.real, False
        old = _sibling(path, ".old")
        try:
            os.replace(path, old)
            moved = True
            if reason := self._unreplaceable(old):
                raise WadiError(f"{self.path}: {reason}")
            os.replace(temporary, path)
        except BaseException:
            if moved:
                os.replace(old, path)
            else:
                old.rmdir()
            raise
        remove_written(old)


def remove_written(folder: Path) -> bool:
    """Remove the files that the folder's `MARKER` lists, and then the folder if nothing else is in it.

    Returns:
        Whether it is gone; if not, the user is told what was kept.
    """
    _, written = _marker(folder) or ("", set())
    with explain_os_errors(folder, "remove the old folder"):
        found = set(_entries(folder))
        if own := found - written:
            tell(f"{folder}: kept, because it holds {min(own)}, which wadi did not write")
            return False
        for name in (*found, MARKER):
            path = folder / name
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
        for below, _, _ in os.walk(folder, topdown=False):
            os.rmdir(below)
    return True


def _is_or_holds(path: Path, other: str | os.PathLike) -> bool:
    """Whether `path` is the other file or folder or one above it, by any name that the file system knows.

    Names are compared as well, because a hub id may be the name of no file yet.
    """
    other = Path(os.path.realpath(other))
    above = (other, *other.parents)
    if path in above:
        return True
    if not path.exists():
        return False
    return any(place.exists() and os.path.samefile(path, place) for place in above)


def _check_parent(given: str | os.PathLike, path: Path) -> None:
    parent = next(place for place in path.parents if os.path.lexists(place))
    if not parent.is_dir():
        raise WadiError(f"{given}: {parent} is a file; name a path below a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WadiError(f"{given}: you may not write into {parent}; name another place")


def _sibling(path: Path, suffix: str) -> Path:
    """A new empty folder beside `path`."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent))
    folder.chmod(0o755)
    return folder


def _entries(folder: Path) -> Iterator[str]:
    """Names below `folder` of all files, links and empty folders but the folder's own marker."""

    def fail(error: OSError) -> None:
        raise error

    for below, folders, files in os.walk(folder, onerror=fail):
        place = Path(below)
        links = [name for name in folders if (place / name).is_symlink()]
        names = [place / name for name in (*files, *links)]
        if not names and not folders and place != folder:
            names = [place]
        yield from (name.relative_to(folder).as_posix() for name in names if name != folder / MARKER)


def _mark(folder: Path, command: str, files: Sequence[str] = ()) -> None:
    write_json(folder / MARKER, {"command": command, "files": list(files)})


def _marker(folder: Path) -> tuple[str, set[str]] | None:
    """Command and names of files of the marker, or None where there is none that can be read."""
    try:
        value = read_json(folder / MARKER)
        return str(value["command"]), {str(name) for name in value["files"]}
    except (WadiError, KeyError, TypeError):
        return None
