"""The example workflows: both forms are of one graph, the images carry them, and they are what is written."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from integrations.make_workflows import FOLDER, written
from tests.docs.test_links import ROOT

NAMES = ("one_step", "four_steps")


def read(name):
    api, ui = FOLDER / "api" / f"{name}.json", FOLDER / f"{name}.json"
    return json.loads(api.read_text()), json.loads(ui.read_text())


def test_the_files_are_what_the_script_writes(tmp_path):
    for file in written(tmp_path):
        committed = FOLDER / file.relative_to(tmp_path)
        if file.suffix == ".json":
            assert committed.read_text() == file.read_text()
        else:
            assert Image.open(committed).text == Image.open(file).text
    assert len(list(FOLDER.rglob("*.*"))) == 3 * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_carries_both_forms(name):
    api, ui = read(name)
    with Image.open(FOLDER / f"{name}.png") as image:
        assert json.loads(image.text["prompt"]) == api
        assert json.loads(image.text["workflow"]) == ui


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_of_one_graph(name):
    api, ui = read(name)
    links = {link[0]: link for link in ui["links"]}
    assert {str(entry["id"]) for entry in ui["nodes"]} == api.keys()
    for entry in ui["nodes"]:
        inputs = api[str(entry["id"])]["inputs"]
        assert entry["type"] == api[str(entry["id"])]["class_type"]
        joined = {}
        for slot, found in enumerate(entry["inputs"]):
            _, source, output, target, target_slot, kind = links[found["link"]]
            assert (target, target_slot, kind) == (entry["id"], slot, found["type"])
            joined[found["name"]] = [str(source), output]
        assert joined == {key: value for key, value in inputs.items() if isinstance(value, list)}
        values = [value for value in entry["widgets_values"] if value != "randomize"]
        assert values == [value for value in inputs.values() if not isinstance(value, list)]
        for slot, output in enumerate(entry["outputs"]):
            assert output["links"] == [i for i, link in links.items() if link[1:3] == [entry["id"], slot]]


def test_the_pack_needs_only_what_comfyui_has():
    allowed = {"__future__", "collections", "dataclasses", "json", "math", "os", "pathlib", "re", "typing"}
    allowed |= {"torch", "safetensors", "comfy", "folder_paths"}
    files = sorted((Path(ROOT) / "integrations" / "comfyui").glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)) <= allowed
    assert (files[0].parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
