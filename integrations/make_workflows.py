"""Write the example workflows of the ComfyUI nodes: in API form, in UI form, and as images that carry both.

    python integrations/make_workflows.py

ComfyUI opens the UI form (`example_workflows/*.json`) and the images by drag and drop; its server takes the
API form (`example_workflows/api/*.json`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

FOLDER = Path(__file__).parent / "comfyui" / "example_workflows"
CHECKPOINT, ADAPTER = "v1-5-pruned-emaonly.safetensors", "my-student/adapter_model.safetensors"
SEED_BEHIND = ("seed", "noise_seed")
"""Widgets behind which the UI form has one more: what happens to the seed after an image."""
OUTPUTS = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "LoadLoRaD": ("MODEL", "LORAD_STUDENT"),
    "LoRaDOneStepSampling": ("MODEL", "SAMPLER", "SIGMAS"),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "SamplerCustom": ("LATENT", "LATENT"),
    "VAEDecode": ("IMAGE",),
    "SaveImage": (),
}
TITLES = {"LoadLoRaD": "Load LoRaD", "LoRaDOneStepSampling": "One-step sampling"}
WIDTH, LINE, HEAD = 330, 22, 34
"""Of a node in pixels: its width, the height of a line and of the title."""

Node = tuple[str, tuple[int, int], dict[str, Any]]


def link(node: int, output: int = 0) -> list[Any]:
    """What an input is that comes from another node."""
    return [str(node), output]


def nodes(steps: int) -> dict[int, Node]:
    """The nodes of a workflow, by number: kind, place and inputs."""
    sampled = {"model": link(3), "add_noise": True, "noise_seed": 0, "cfg": 1.0, "positive": link(4)}
    sampled |= {"negative": link(5), "sampler": link(3, 1), "sigmas": link(3, 2), "latent_image": link(6)}
    return {
        1: ("CheckpointLoaderSimple", (20, 20), {"ckpt_name": CHECKPOINT}),
        2: ("LoadLoRaD", (400, 20), {"model": link(1), "adapter": ADAPTER, "strength": 1.0}),
        3: (
            "LoRaDOneStepSampling",
            (780, 20),
            {"model": link(2), "student": link(2, 1), "steps": steps, "alpha_T_squared": 0.0},
        ),
        4: ("CLIPTextEncode", (400, 210), {"clip": link(1, 1), "text": "a hedgehog on a bicycle"}),
        5: ("CLIPTextEncode", (400, 340), {"clip": link(1, 1), "text": ""}),
        6: ("EmptyLatentImage", (400, 470), {"width": 512, "height": 512, "batch_size": 1}),
        7: ("SamplerCustom", (1160, 20), sampled),
        8: ("VAEDecode", (1540, 20), {"samples": link(7), "vae": link(1, 2)}),
        9: ("SaveImage", (1540, 160), {"images": link(8), "filename_prefix": "lorad"}),
    }


def api_form(found: dict[int, Node]) -> dict[str, Any]:
    """What the server's /prompt takes."""
    return {
        str(number): {
            "class_type": kind,
            "inputs": inputs,
            "_meta": {"title": TITLES.get(kind, kind)},
        }
        for number, (kind, _, inputs) in found.items()
    }


def is_link(value: Any) -> bool:
    """Whether an input comes from another node."""
    return isinstance(value, list)


def links_of(found: dict[int, Node]) -> list[list[Any]]:
    """Every link in UI form: its number, from which node and output, to which node and input, its type."""
    result: list[list[Any]] = []
    for number, (_, _, inputs) in found.items():
        joined = [value for value in inputs.values() if is_link(value)]
        for slot, (source, output) in enumerate(joined):
            kind = OUTPUTS[found[int(source)][0]][output]
            result.append([len(result) + 1, int(source), output, number, slot, kind])
    return result


def ui_form(found: dict[int, Node]) -> dict[str, Any]:
    """What the editor opens."""
    links = links_of(found)
    entries = []
    for number, (kind, place, inputs) in found.items():
        names = [name for name, value in inputs.items() if is_link(value)]
        ends = {slot: (i, type_) for i, _, _, to, slot, type_ in links if to == number}
        widgets = []
        for name, value in inputs.items():
            if not is_link(value):
                widgets += [value, "randomize"] if name in SEED_BEHIND else [value]
        entries.append(
            {
                "id": number,
                "type": kind,
                "pos": list(place),
                "size": [WIDTH, height_of(inputs, kind)],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": [
                    {"name": name, "type": ends[slot][1], "link": ends[slot][0]}
                    for slot, name in enumerate(names)
                ],
                "outputs": [
                    {
                        "name": type_,
                        "type": type_,
                        "slot_index": output,
                        "links": [i for i, source, out, *_ in links if (source, out) == (number, output)],
                    }
                    for output, type_ in enumerate(OUTPUTS[kind])
                ],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets,
            }
        )
    top = {"last_node_id": max(found), "last_link_id": len(links), "nodes": entries, "links": links}
    return top | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def lines_of(kind: str, inputs: dict[str, Any]) -> dict[str, int]:
    """The line of every input: first those of links, beside the outputs, and then the widgets."""
    joined = [name for name, value in inputs.items() if is_link(value)]
    first = max(len(joined), len(OUTPUTS[kind]))
    widgets = [name for name in inputs if name not in joined]
    lines = {name: line for line, name in enumerate(joined)}
    return lines | {name: first + line for line, name in enumerate(widgets)}


def height_of(inputs: dict[str, Any], kind: str) -> int:
    """Height of a node in pixels."""
    lines = max([len(OUTPUTS[kind]), *(line + 1 for line in lines_of(kind, inputs).values())])
    return HEAD + LINE * lines + 6


def drawing(found: dict[int, Node]) -> Image.Image:
    """A drawing of the nodes and their links."""
    width = max(x for _, (x, _), _ in found.values()) + WIDTH + 20
    height = max(y + height_of(inputs, kind) for kind, (_, y), inputs in found.values()) + 20
    image = Image.new("RGB", (width, height), "#202020")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for kind, (x, y), inputs in found.values():  # links first, so that they pass behind nodes
        for name, line in lines_of(kind, inputs).items():
            if is_link(value := inputs[name]):
                _, (from_x, from_y), _ = found[int(value[0])]
                start = (from_x + WIDTH, from_y + HEAD + LINE * value[1] + 8)
                draw.line((start, (x, y + HEAD + LINE * line + 8)), fill="#e0b050", width=2)
    for number, (kind, (x, y), inputs) in found.items():
        box = (x, y, x + WIDTH, y + height_of(inputs, kind))
        own = kind in TITLES
        draw.rounded_rectangle(box, 8, fill="#35443a" if own else "#353535", outline="#606060")
        draw.text((x + 10, y + 8), f"{number}  {TITLES.get(kind, kind)}", fill="#ffffff", font=font)
        for name, line in lines_of(kind, inputs).items():
            text = name if is_link(inputs[name]) else f"{name}: {inputs[name]}"
            draw.text((x + 14, y + HEAD + LINE * line), text, fill="#c0c0c0", font=font)
        for line, type_ in enumerate(OUTPUTS[kind]):
            place = (x + WIDTH - 12, y + HEAD + LINE * line)
            draw.text(place, type_, fill="#9fc5e8", font=font, anchor="ra")
    return image


def written(folder: Path) -> list[Path]:
    """Write all files; return them."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    files = []
    for name, steps in (("one_step", 1), ("four_steps", 4)):
        found = nodes(steps)
        forms = {folder / "api" / f"{name}.json": api_form(found), folder / f"{name}.json": ui_form(found)}
        for file, form in forms.items():
            file.write_text(json.dumps(form, indent=1) + "\n", encoding="utf-8")
        carried = PngImagePlugin.PngInfo()
        carried.add_text("prompt", json.dumps(api_form(found)))
        carried.add_text("workflow", json.dumps(ui_form(found)))
        drawing(found).quantize(64).save(folder / f"{name}.png", pnginfo=carried, optimize=True)
        files += [*forms, folder / f"{name}.png"]
    return files


if __name__ == "__main__":
    for path in written(FOLDER):
        print(path, file=sys.stderr)
