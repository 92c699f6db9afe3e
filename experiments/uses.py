"""The tables of docs/uses.md and of its pages, from the JSON files of the uses' experiments.

    python experiments/uses.py             # write the tables
    python experiments/uses.py --check     # only tell whether the pages are what the files give

Tables stand between `<!-- table: NAME -->` and `<!-- /table -->`; all else is written by hand. The table
`uses` has the rows that each docs/results/NAME.json gives under "summary":

    {"use": str, "measure": str, "teacher": number or null, "student": number or null, "time_ratio": likewise}

A file that is not there yet, or that has no such rows, is named on stderr; its page keeps what it has. How
many images of a sheet are right by eye comes from docs/results/sheets.json of experiments/sheets.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tables import find_tables, markdown, with_tables

from wadi.errors import WadiError
from wadi.files import read_json, write_text

USES = ("control", "inversion", "dreambooth", "high-resolution", "editing", "prompts")
"""Names of JSON files and pages, in the order of the table."""

SHEETS = {
    "a condition, by ControlNet": "control",
    "a word for a relation that no caption names": "word",
    "a new subject from six images, stacked on the student": "subject-stacked",
    "images 2 times as high and wide": "larger",
    "image to image": "image-to-image",
    "inpainting, best of 8 in one step: replace": "inpaint-replace",
    "inpainting, best of 8 in one step: add": "inpaint-add",
    "prompts of several things": "prompts",
    "prompts beyond the grammar": "prompts-beyond",
}
"""Names of the sheets that show the student's images of a use, by the use."""


@dataclass
class Options:
    """Write the tables of the uses."""

    folder: Path = Path("docs")
    """Folder of uses.md, uses/ and results/."""
    check: bool = False
    """Write nothing; exit with status 1 if the tables are not what the files give."""


# --- the table of all uses ---


def uses_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each row of a summary, with a link to its page, and by eye in the first row of a use.

    Args:
        results: contents of the JSON files by name; those that are no use of `USES`, or have no summary, are
            left out.
    """
    rows, sheets = [], dict(results.get("sheets", {}))
    for name in (name for name in USES if name in results):
        for row in results[name].get("summary", ()):
            figures = [figure(row["teacher"]), figure(row["student"])]
            figures += [by_eye(sheets.pop(SHEETS.get(row["use"]), None)), ratio(row["time_ratio"])]
            rows.append([f"[{row['use']}](uses/{name}.md)", row["measure"], *figures])
    return markdown(("use", "measure", "teacher, 25 steps", "student, 1 step", "by eye", "time"), rows)


def sheets_table(sheets: Mapping[str, Any]) -> str:
    """A row for each sheet that was looked at."""
    rows = [
        [f"[{name}](images/sheets/{found['sheet']})", found["looked_for"], by_eye(found)]
        for name, found in sheets.items()
        if found["right"] is not None
    ]
    return markdown(("sheet", "right means", "by eye"), rows)


def by_eye(found: Mapping[str, Any] | None) -> str:
    """How many images of a sheet are right; - for no sheet, or one that nobody has looked at."""
    if found is None or found["right"] is None:
        return "-"
    return f"{len(found['right'])} of {len(found['prompts'])}"


def check_summary(path: Path, found: Any) -> None:
    """Raise unless the rows of a summary are as this file's first lines say.

    Raises:
        WadiError: it names the file, the row and what is wrong with it.
    """
    if not isinstance(found, dict):
        raise WadiError(f"{path}: is not an object of JSON")
    for number, row in enumerate(found.get("summary", ())):
        for name, kinds in (
            ("use", str),
            ("measure", str),
            ("teacher", (int, float, type(None))),
            ("student", (int, float, type(None))),
            ("time_ratio", (int, float, type(None))),
        ):
            if name not in row or not isinstance(row[name], kinds):
                wrong = "is missing" if name not in row else f"must not be {row[name]!r}"
                raise WadiError(f"{path}: summary[{number}].{name} {wrong}; write it again by its experiment")


def figure(value: float | None) -> str:
    """Shares with three decimals, others with two; - for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """How many times the student's time the teacher takes; - for none."""
    return "-" if value is None else f"1/{value:.3g}"


# --- tables of single pages ---


def control_table(found: Mapping[str, Any]) -> str:
    """A row for each way; times also as a share of the steered teacher's."""
    whole = next((row["seconds"] for row in found["rows"] if row["name"] == "teacher, scale 1"), math.nan)
    rows = []
    for row in found["rows"]:
        how, duration = ["the scenes through the autoencoder", "", ""], ""
        if row["seconds"] is not None:
            how = [row["name"].split(",")[0], str(row["steps"]), f"{row['scale']:g}"]
            duration = f"{row['seconds']:.3f} s (1/{whole / row['seconds']:.1f})"
        shares = [f"{row[part]:.3f}" for part in ("edge_f1", "objects", "background")]
        lengths = [f"{row[part]:.1f}" for part in ("place_error", "size_error")]
        rows.append([*how, *shares, *lengths, duration])
    headings = ("edges, F1", "objects right", "background right", "place, px", "size, px", "time")
    return markdown(("", "steps", "scale", *headings), rows)


def pairs_table(found: Mapping[str, Any]) -> str:
    """A row for one ControlNet, and for two."""
    rows = [
        [
            str(row["controlnets"]),
            *(f"{row[part]:.3f}" for part in ("edge_f1", "objects")),
            *(f"{row[part]:.1f}" for part in ("place_error", "size_error")),
        ]
        for row in found["pairs"]
    ]
    return markdown(("ControlNets", "edges, F1", "objects right", "place, px", "size, px"), rows)


def high_resolution_table(found: Mapping[str, Any]) -> str:
    """A row for each model, size and way, with its time as a multiple of the plain one's."""
    plain = {(row["steps"], row["size"]): row["seconds"] for row in found["rows"] if not row["redilated"]}
    rows = []
    for row in found["rows"]:
        way = "re-dilated" if row["redilated"] else "plain"
        way += f", damping {row['damping']:g}" if row["damping"] else ""
        shares = [f"{row[part]:.3f}" for part in ("alignment", "close_up", "clean", "right")]
        figures = [*shares, f"{row['grain']:.1f}", f"{row['objects']:.2f}"]
        own = plain.get((row["steps"], row["size"]))
        duration = "-" if own is None else f"{row['seconds'] / own:.2f}"
        rows.append([model(row["steps"]), str(row["size"]), way, str(row["samples"]), *figures, duration])
    shares = ("all right, reduced", "object, close up", "no grain", "right")
    headings = ("", "side, px", "convolutions", "images", *shares, "grain", "objects seen", "time")
    return markdown(headings, rows)


def model(steps: int) -> str:
    """Who makes pictures in so many steps."""
    return "student" if steps == 1 else f"teacher, {steps} steps"


def prompts_table(found: Mapping[str, Any]) -> str:
    """A row for each kind of prompt; what of it is right, by teacher and student."""
    rows = []
    for row in found["rows"]:
        new = "never taught" if not row["taught"] else "held out" if row["held_out"] else ""
        pairs = [
            " / ".join(
                f"{row[name][part]:.3f}" if part in row[name] else "" for name in ("teacher", "student")
            )
            for part in ("all", "objects", "relation", "sizes", "leaked")
        ]
        rows.append([row["kind"], row["example"], new, *("" if pair == " / " else pair for pair in pairs)])
    headings = (
        "kind",
        "for instance",
        "",
        "all right",
        "objects",
        "relation",
        "sizes",
        "colour on the ground",
    )
    return markdown(headings, rows)


def image_to_image_table(found: Mapping[str, Any]) -> str:
    """A row for each model and strength."""
    parts = ("object", "background", "place", "size", "all")
    rows = [
        [row["model"], str(row["steps"]), f"{row['strength']:g}", *(f"{row[part]:.3f}" for part in parts)]
        for row in found["image_to_image"]
    ]
    headings = ("", "steps", "strength", "new object", "ground kept", "place kept", "size kept", "all")
    return markdown(headings, rows)


def inpainting_table(study: str) -> Callable[[Mapping[str, Any]], str]:
    """Makes the table of `replace` or `add`: a row for each model, strength and number of candidates."""

    def build(found: Mapping[str, Any]) -> str:
        rows = []
        for row in sorted(found[study], key=lambda row: (row["model"], row["candidates"])):
            strength = "pure noise" if row["strength"] is None else f"{row['strength']:g}"
            how = [row["model"], str(row["steps"]), strength, str(row["candidates"])]
            figures = [f"{row[part]:.3f}" for part in ("object", "background", "all")]
            rows.append([*how, *figures, f"{row['seam']:.1f}"])
        objects = "new object" if study == "replace" else "both objects"
        return markdown(("", "steps", "strength", "best of", objects, "ground", "all", "seam"), rows)

    return build


def guidance_table(found: Mapping[str, Any]) -> str:
    """A row for each scale of guidance that was forced on the student."""
    parts = {"alignment": 3, "frechet_distance": 2, "precision": 3, "recall": 3, "background_entropy": 2}
    rows = [
        [f"{row['guidance_scale']:g}", *(f"{row[part]:.{digits}f}" for part, digits in parts.items())]
        for row in found["guidance"]
    ]
    headings = ("guidance", "alignment", "Fréchet distance", "precision", "recall", "free background, bits")
    return markdown(headings, rows)


def negative_table(found: Mapping[str, Any]) -> str:
    """A row for each way to say what shall not be there."""
    rows = []
    for row in found["negative"]:
        scale = "" if row["scale"] is None else f"{row['scale']:g}"
        figures = [f"{row['still']:.3f}", f"{row['object']:.3f}"]
        rows.append([row["model"], str(row["steps"]), row["way"], scale, *figures])
    return markdown(("", "steps", "way", "scale or weight", "still there", "object right"), rows)


@dataclass(frozen=True)
class Table:
    """Where a table stands, where its data are, and what makes it of them."""

    page: str
    source: str
    build: Callable[[Mapping[str, Any]], str]


TABLES = {
    "control": Table("uses/control.md", "control", control_table),
    "control-pairs": Table("uses/control.md", "control", pairs_table),
    "high-resolution": Table("uses/high-resolution.md", "high-resolution", high_resolution_table),
    "prompts": Table("uses/prompts.md", "prompts", prompts_table),
    "image-to-image": Table("uses/editing.md", "editing", image_to_image_table),
    "replace": Table("uses/editing.md", "editing", inpainting_table("replace")),
    "add": Table("uses/editing.md", "editing", inpainting_table("add")),
    "guidance": Table("uses/editing.md", "editing", guidance_table),
    "negative": Table("uses/editing.md", "editing", negative_table),
}
"""Tables of single pages by the name in their marker."""


# --- the pages ---


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of `USES` and `TABLES` that are there; tells what is lacking."""
    results = {}
    for name in dict.fromkeys((*USES, *(table.source for table in TABLES.values()), "sheets")):
        path = folder / "results" / f"{name}.json"
        if not path.exists():
            print(f"{path}: is not there yet", file=sys.stderr)
            continue
        results[name] = read_json(path)
        check_summary(path, results[name])
        if name in USES and not results[name].get("summary"):
            print(f"{path}: has no summary, and no row in the table of uses", file=sys.stderr)
    return results


def blocks_of(page: Path, places: Iterable[str], results: Mapping[str, dict[str, Any]], folder: Path) -> dict:
    """The contents of a page's tables, of those that have data."""
    blocks = {}
    for name in places:
        if name == "uses":
            blocks[name] = uses_table(results) + "\n"
            continue
        if name == "sheets":
            blocks |= {name: sheets_table(results[name]) + "\n"} if name in results else {}
            continue
        table = TABLES[name]
        if folder / table.page != page:
            raise WadiError(f"{page}: the table {name} belongs on {folder / table.page}")
        if table.source not in results:
            continue
        found = results[table.source]
        try:
            blocks[name] = f"{table.build(found)}\n\n{found['header']}.\n"
        except (KeyError, TypeError, ZeroDivisionError) as error:
            path = folder / "results" / f"{table.source}.json"
            raise WadiError(f"{path}: does not hold the table {name}: {error!r}; write it again") from error
    return blocks


def main(options: Options) -> int:
    """Write the pages, or compare them.

    Returns:
        0, or 1 if `--check` found a difference.
    """
    folder, other = options.folder, []
    results = read_results(folder)
    pages = {}
    for path in sorted({folder / "uses.md", *(folder / table.page for table in TABLES.values())}):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise WadiError(f"{path}: could not read the page: {error}") from error
        places = find_tables(text, path, ("uses", "sheets", *TABLES))
        blocks = blocks_of(path, places, results, folder)
        other += [f"{path} ({name})" for name, block in blocks.items() if text[slice(*places[name])] != block]
        pages[path] = with_tables(text, places, blocks)
        tell_missing(path, places, folder)
    if options.check:
        if other:
            print(f"not what the files give: {', '.join(other)}", file=sys.stderr)
            print("run python experiments/uses.py", file=sys.stderr)
        return int(bool(other))
    for path, text in pages.items():
        write_text(path, text)
    print(f"{folder / 'uses.md'} and {len(pages) - 1} pages: {len(other)} tables changed")
    return 0


def tell_missing(path: Path, places: Sequence[str] | Mapping[str, Any], folder: Path) -> None:
    """Raise if a page lacks the place of one of its tables.

    Raises:
        WadiError: it names page and table.
    """
    wanted = {name for name, table in TABLES.items() if folder / table.page == path}
    wanted |= {"uses", "sheets"} if path == folder / "uses.md" else set()
    if lacking := sorted(wanted - set(places)):
        raise WadiError(f"{path}: has no <!-- table: {lacking[0]} -->; put it where the table shall stand")


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except WadiError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
