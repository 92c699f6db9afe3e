"""Make the gallery: docs/gallery.md, and its pictures, each by the command lines that the page shows.

    python docs/gallery.py                             # all of it; two cores, about a minute
    python docs/gallery.py --only inpaint --out runs/gallery   # a part of it, elsewhere

The commands run one after the other in one empty folder, so that a picture of one is there for the next.
Another entry is another line of `ENTRIES`. What a command says when it fails is told, and nothing is written.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from wadi import cli
from wadi.errors import WadiError
from wadi.files import replacing_file, write_text

MASK = (
    "from PIL import Image; mask = Image.new('L', (64, 64)); mask.paste(255, (37, 6, 63, 58)); "
    "mask.save('mask.png')"
)
"""Writes a mask: white is repainted."""


@dataclass(frozen=True)
class Entry:
    """A picture of the gallery.

    Attributes:
        name: of the picture's file, without its suffix.
        title: heading.
        words: what there is to see, and which page has more.
        commands: command lines; the last one writes the picture.
        needs: names of entries whose pictures the commands read.
        made_by: of what trains for minutes: the experiment that made the picture in docs/images. That one
            is shown, the commands are not run, and the page says so.
        suffix: of the picture's file.
        module: what the commands import beyond what wadi always needs. Where it is not installed they are not
            run: the entry keeps the picture that is there, or is left out.
        package: that has the module.
    """

    name: str
    title: str
    words: str
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    made_by: str = ""
    suffix: str = ".jpg"
    module: str = ""
    package: str = ""

    @property
    def file(self) -> str:
        """Name of the picture."""
        return self.name + self.suffix

    @property
    def picture(self) -> str:
        """Where the image is, as the page names it."""
        return f"images/{self.file}" if self.made_by else f"images/gallery/{self.file}"

    @property
    def runs(self) -> bool:
        """Whether its commands are run here."""
        return not self.made_by and not (self.module and importlib.util.find_spec(self.module) is None)


ENTRIES = (
    Entry(
        "generate",
        "A prompt, eight images, one step each",
        "What the prompt leaves free (place, size, angle) differs from image to image.",
        ('wadi generate "a unicorn on a yellow background" -n 8 --out generate.jpg',),
    ),
    Entry(
        "two-objects",
        "Two objects, and where they are",
        "Training showed no image of these two together: [prompts of several things](uses/prompts.md).",
        ('wadi generate "a penguin left of a sunflower" -n 8 --out two-objects.jpg',),
    ),
    Entry(
        "plain-large",
        "Twice as high and wide: as it is",
        "A student of 64 px asked for 128: the object repeats, or grows out of shape.",
        (
            'wadi generate "a rocket on a blue background" --height 128 --width 128 --no-redilate -n 4 '
            "--out plain-large.jpg",
        ),
    ),
    Entry(
        "large",
        "Twice as high and wide: re-dilated",
        "The same noise, with the inner convolutions stretched, as `wadi generate` does unless told not to: "
        "one object each, but speckled all over, and hardly to be recognised "
        "([larger images](uses/high-resolution.md)).",
        ('wadi generate "a rocket on a blue background" --height 128 --width 128 -n 4 --out large.jpg',),
    ),
    Entry(
        "panda",
        "An image to start from",
        "It is the input of what follows.",
        ('wadi generate "a big panda on the left on a red background" --seed 3 --out panda.png',),
        suffix=".png",
    ),
    Entry(
        "image-to-image",
        "Image to image, in one step",
        "Another object in the place of the first, on its background. It is seldom right: in 9 of 24 images "
        "by eye ([image to image](uses/editing.md)).",
        ('wadi image-to-image panda.png --prompt "a tiger" --out image-to-image.jpg',),
        ("panda",),
    ),
    Entry(
        "image-to-image-teacher",
        "Image to image, by the teacher",
        "The same with the multi-step model.",
        (
            'wadi image-to-image panda.png --prompt "a tiger" --num-inference-steps 25 --guidance-scale 2 '
            "--out image-to-image-teacher.jpg",
        ),
        ("panda",),
    ),
    Entry(
        "inpaint",
        "Inpainting, in one step",
        "White of the mask is repainted, all else is kept to the bit: of eight candidates the one whose edge "
        "shows least. The edge often shows: 9 of 24 images are right by eye "
        "([image to image](uses/editing.md)).",
        (
            f'python -c "{MASK}"',
            'wadi inpaint panda.png mask.png --prompt "a panda left of a sunflower" --out inpaint.jpg',
        ),
        ("panda",),
    ),
    Entry(
        "inpaint-teacher",
        "Inpainting, by the teacher",
        "The same with the multi-step model.",
        (
            f'python -c "{MASK}"',
            'wadi inpaint panda.png mask.png --prompt "a panda left of a sunflower" --num-inference-steps 25 '
            "--guidance-scale 2 --out inpaint-teacher.jpg",
        ),
        ("panda",),
    ),
    Entry(
        "control",
        "A ControlNet of the teacher, on the student",
        "The edges of the panda, and images that keep to them: [control](uses/control.md). Edges take "
        "OpenCV (`pip install opencv-python-headless`); without it the command says so.",
        ('wadi control panda.png --prompt "a panda on a green background" --out control.jpg',),
        ("panda",),
        module="cv2",
        package="opencv-python-headless",
    ),
    Entry(
        "inversion",
        "A relation, from images, as a new word",
        'One word for what pairs of objects have in common. "Side by side, in either order" is learned; '
        "which of the two is where hardly, and what training never showed not at all: "
        "[a new word](uses/inversion.md).",
        (
            "wadi emoji relation-examples --out images",
            "wadi invert images --out runs/word",
            'wadi generate "a panda <R> a rocket" --embedding runs/word -n 8 --out word.jpg',
        ),
        made_by="python experiments/inversion.py",
        suffix=".png",
    ),
    Entry(
        "dreambooth",
        "A new subject, from six images",
        "Emoji that the models never saw. The teacher (25 steps) learns some of them, at the places and on "
        "the backgrounds of the prompt. The student in one step paints blots, of which none is right by eye: "
        "[a new subject](uses/dreambooth.md).",
        (
            "wadi emoji subject-examples --out hedgehog",
            "wadi dreambooth hedgehog --out runs/hedgehog",
            'wadi generate "a big zwx on a purple background" --subject-adapter runs/hedgehog/adapter -n 4 '
            "--out zwx.jpg",
        ),
        made_by="python experiments/dreambooth.py",
    ),
)
"""The gallery, in order."""

HEAD = """# Gallery

Made by `python docs/gallery.py`, which runs the commands below with the models that come with wadi. All is
made in one step unless a command says otherwise. Before and after, by `python docs/pictures.py`:

![The teacher in one step, the student in one step, the teacher in 25.](images/before-after.png)
"""


@dataclass
class Options:
    """Make the gallery."""

    out: Path = Path("docs")
    """Folder of gallery.md; the pictures go to images/gallery in it."""
    only: tuple[str, ...] = ()
    """Only these entries, and those that they need."""


def chosen(only: Sequence[str]) -> list[Entry]:
    """Entries by name, with those that they need, in order; all if none is named.

    Raises:
        WadiError: there is no such entry.
    """
    known = {entry.name: entry for entry in ENTRIES}
    if unknown := sorted(set(only) - set(known)):
        raise WadiError(f"--only: no entry {unknown[0]!r}; known are {', '.join(known)}")
    wanted = {need for name in only for need in (name, *known[name].needs)}
    return [entry for entry in ENTRIES if not only or entry.name in wanted]


def run(command: str) -> None:
    """Run one command line in the current folder.

    Raises:
        WadiError: it fails.
    """
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    if program == "wadi":
        status = cli.main(arguments)  # in this process: libraries are imported once
    else:
        status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        raise WadiError(f"{command}: ended with status {status}; nothing was written")


def page(entries: Sequence[Entry]) -> str:
    """The gallery as Markdown."""
    parts = [HEAD]
    for entry in entries:
        commands = "\n".join(entry.commands)
        words = entry.words
        if entry.made_by:
            words += " This trains for minutes, so the gallery did not run it; the image is by "
            words += f"`{entry.made_by}`."
        picture = f"![{entry.title}.]({entry.picture})"
        parts.append(f"## {entry.title}\n\n{words}\n\n```sh\n{commands}\n```\n\n{picture}\n")
    return "\n".join(parts)


def told_if_left_out(entry: Entry, out: Path) -> bool:
    """Whether the page has the entry; says what is missing if its commands cannot be run here."""
    if entry.made_by or entry.runs:
        return True
    kept = (out / entry.picture).exists()
    does = "its picture is left as it is" if kept else "it is left out"
    print(f"{entry.name}: needs {entry.module} (pip install {entry.package}); {does}", file=sys.stderr)
    return kept


def main(options: Options) -> None:
    """Run the commands, then write pictures and page."""
    entries, out, start = chosen(options.only), options.out.resolve(), Path.cwd()
    for entry in entries:
        if entry.made_by and not (out / entry.picture).exists():
            raise WadiError(f"{options.out / entry.picture}: is missing; run {entry.made_by}")
    entries = [entry for entry in entries if told_if_left_out(entry, out)]
    own = [entry for entry in entries if entry.runs]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for entry in own:
                for command in entry.commands:
                    run(command)
                if not Path(entry.file).exists():
                    raise WadiError(f"{entry.name}: its commands wrote no {entry.file}")
        finally:
            os.chdir(start)
        for entry in own:
            with replacing_file(out / entry.picture) as temporary:
                shutil.copyfile(Path(folder) / entry.file, temporary)
    write_text(out / "gallery.md", page(entries))
    print(f"{options.out / 'gallery.md'}: {len(entries)} pictures")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
