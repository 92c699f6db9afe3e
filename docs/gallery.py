"""Make the gallery: docs/gallery.md, and its images, each by the command lines that the page shows.

    python docs/gallery.py                             # all of it; two cores, about a minute
    python docs/gallery.py --only inpaint --out runs/gallery   # a part of it, elsewhere

The commands run one after the other in one empty folder, so that an image of one is there for the next.
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
    """An image of the gallery.

    Attributes:
        name: of the image's file, without its suffix.
        title: heading.
        words: what there is to see, and which page has more.
        commands: command lines; the last one writes the image.
        needs: names of entries whose images the commands read.
        made_by: for commands that train for minutes, the experiment that made the image in docs/images. The
            image is shown, the commands are not run, and the page says so.
        suffix: of the image's file.
        module: what the commands import beyond what wadi always needs. Where it is not installed they are not
            run: the entry keeps the image that is there, or is left out.
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
        """Name of the image file."""
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
        "Eight images of a prompt, one step each",
        "Place, size and angle differ from image to image, because the prompt does not state them.",
        ('wadi generate "a unicorn on a yellow background" -n 8 --out generate.jpg',),
    ),
    Entry(
        "two-objects",
        "Two objects, and where they are",
        "No image of the training showed these two together: [prompts of several things](uses/prompts.md).",
        ('wadi generate "a penguin left of a sunflower" -n 8 --out two-objects.jpg',),
    ),
    Entry(
        "plain-large",
        "Twice the height and width, without a change",
        "A student of 64 px makes images of 128 px. The object is repeated, or loses its shape.",
        (
            'wadi generate "a rocket on a blue background" --height 128 --width 128 --no-redilate -n 4 '
            "--out plain-large.jpg",
        ),
    ),
    Entry(
        "large",
        "Twice the height and width, with stretched convolutions",
        "The noise is the same. By default `wadi generate` stretches the inner convolutions. Each image has "
        "one object, but it is speckled and hardly recognisable ([larger images](uses/high-resolution.md)).",
        ('wadi generate "a rocket on a blue background" --height 128 --width 128 -n 4 --out large.jpg',),
    ),
    Entry(
        "panda",
        "An image to start from",
        "The next commands start from this image.",
        ('wadi generate "a big panda on the left on a red background" --seed 3 --out panda.png',),
        suffix=".png",
    ),
    Entry(
        "image-to-image",
        "Image to image, in one step",
        "The new object takes the place of the first one, on its background. By eye 9 of 24 such images are "
        "right ([image to image](uses/editing.md)).",
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
        "The white part of the mask is repainted, and the rest stays the same to the bit. Of eight "
        "candidates, the one with the least visible edge is kept. The edge is often visible: by eye 9 of 24 "
        "images are right ([inpainting](uses/editing.md#inpainting)).",
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
        "The images keep to the edges of the panda: [ControlNet](uses/control.md). The command needs OpenCV "
        "to find edges (`pip install opencv-python-headless`).",
        ('wadi control panda.png --prompt "a panda on a green background" --out control.jpg',),
        ("panda",),
        module="cv2",
        package="opencv-python-headless",
    ),
    Entry(
        "inversion",
        "A new word for a relation, from images",
        'The word names what pairs of objects have in common. "Side by side, in either order" is learned. '
        "The order of the two is hardly learned, and a relation that training never showed is not learned: "
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
        "The models never saw these emoji. The teacher (25 steps) learns some of them, with the place and "
        "the background of the prompt. The student in one step draws blots; by eye none is right: "
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

`python docs/gallery.py` makes this page. It runs the commands below with the models that come with wadi.
Images are made in one step unless the command says otherwise. `python docs/pictures.py` makes the first one:

![The teacher in one step, the student in one step, the teacher in 25.](images/before-after.png)
"""


@dataclass
class Options:
    """Make the gallery."""

    out: Path = Path("docs")
    """Folder of gallery.md; the images go to images/gallery in it."""
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
            words += " The training takes minutes, so the gallery did not run it. The image is from "
            words += f"`{entry.made_by}`."
        picture = f"![{entry.title}.]({entry.picture})"
        parts.append(f"## {entry.title}\n\n{words}\n\n```sh\n{commands}\n```\n\n{picture}\n")
    return "\n".join(parts)


def told_if_left_out(entry: Entry, out: Path) -> bool:
    """Whether the page has the entry; says what is missing if its commands cannot be run here."""
    if entry.made_by or entry.runs:
        return True
    kept = (out / entry.picture).exists()
    does = "its image is left as it is" if kept else "it is left out"
    print(f"{entry.name}: needs {entry.module} (pip install {entry.package}); {does}", file=sys.stderr)
    return kept


def main(options: Options) -> None:
    """Run the commands, then write images and page."""
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
    print(f"{options.out / 'gallery.md'}: {len(entries)} images")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
