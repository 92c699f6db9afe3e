"""The rule that says where a command may write, for every folder and file that a user names.

    with Output(out, "export", inputs=(adapter, model), overwrite=overwrite).writing() as folder:
        ...  # write into `folder`, which is then renamed to `out`

A folder may be written if it is new or empty. The file `MARKER` in it then says which command wrote which
files. Only that command may replace the folder, only with ``--overwrite``, and only if nothing else is in it.
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
"""A file in every folder that a command wrote. It names the command and the files in the folder. diffusers,
transformers and PEFT ignore it."""

FILE_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".zip"}
    | {".bmp", ".gif", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"}
    | {".csv", ".html", ".json", ".jsonl", ".parquet", ".txt", ".yaml", ".yml"}
)
"""Suffixes of files. A new folder with such a suffix is refused as a mistake."""


def unsigned(path: Path) -> str | None:
    """Return ``None``, for files that cannot say which command wrote them."""


@dataclass(frozen=True)
class Output:
    """A folder or a file that a user names for a command to write.

    Args:
        path: as the user gave it. A symbolic link is followed, and stays.
        command: the words of the command on the command line: "export", "directions swap".
        inputs: folders, files or hub ids that the command reads; ``None`` is ignored.
        overwrite: whether a folder of the same command, or any file, may be replaced.
        suffixes: the suffixes that a file may have; empty for a folder.
        resume: whether the command resumes in a folder that it wrote before. See `open`.
        option: the option that named the path, for messages.
        instead: what a message suggests if the command has no `overwrite`.
        signed: a function that returns the command that a file names as its writer, or ``None``.
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
        """Check that the command may write here. Call it before any long work.

        Raises:
            WadiError: the command may not; the message says why, and what to do instead.
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
        """Yield a temporary folder or file beside `path`. If the block succeeds, it is renamed to `path`.

        If the block fails, `path` stays unchanged.

        Raises:
            WadiError: as `check`, which runs before and after the block, or a file cannot be written.
        """
        self.check()
        write = replacing_file(self.real) if self.suffixes else self._new_folder()
        with write as temporary:
            yield temporary
            if not self.suffixes:
                _mark(temporary, self.command, sorted(_entries(temporary)))
            self.check()

    def open(self) -> None:
        """Make and mark a folder that the command fills step by step. It is never replaced as a whole.

        Raises:
            WadiError: as `check`, or the folder cannot be made.
        """
        self.check()
        with explain_os_errors(self.path, "create the folder"):
            self.real.mkdir(parents=True, exist_ok=True)
        if _marker(self.real) is None:
            _mark(self.real, self.command)

    def _refuse_protected(self) -> None:
        """Refuse to replace the current folder, the home folder, or a folder that holds them."""
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
        """The reason why an existing folder may not be replaced, or None. `folder` is its present place."""
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
        """Move the old folder aside, check it again there, where nobody writes to it, and remove it."""
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
        Whether the folder was removed. If not, a warning says what was kept.
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
    """Whether `path` is the other file or folder, or holds it, also by another name in the file system.

    Names are compared too, because the other name may be a hub id without a file.
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
    """Names below `folder` of all files, links and empty folders, except the folder's own marker."""

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
    """The command and the file names of the marker, or None if there is no readable marker."""
    try:
        value = read_json(folder / MARKER)
        return str(value["command"]), {str(name) for name in value["files"]}
    except (WadiError, KeyError, TypeError):
        return None
