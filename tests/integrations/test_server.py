"""The real ComfyUI, headless on the CPU: images of students equal those of their exported pipelines."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.integrations.cases import NETWORKS, layout, merged, turned_network
from tests.integrations.server import Server
from tests.tiny import tiny_sdxl
from wadi.emoji import student_folder, teacher_folder
from wadi.lorad import save_adapter
from wadi.onestep import Student, export_pipeline

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT,
    reason="COMFYUI_PATH is not set: it names a checkout of ComfyUI (COMFYUI_PYTHON: its Python)",
)
SEED, PROMPT = 7, "a red apple"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(CHECKOUT, tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class Case:
    """A student: its adapter in ComfyUI's folder, its base and its prompt as files, and its latents."""

    def __init__(self, server, name, base, adapter, kind, head, prompt):
        self.server, self.adapter = server, f"{name}/adapter_model.safetensors"
        files = server.folder / "files" / name
        files.mkdir(parents=True)
        if not (server.folder / "models" / "lorad" / name).exists():
            shutil.copytree(adapter, server.folder / "models" / "lorad" / name)
        export_pipeline(base, adapter, files / "pipeline", dtype=torch.float32)
        pipeline = DiffusionPipeline.from_pretrained(files / "pipeline", torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        self.expected = pipeline(prompt, generator=generator, **options).images
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        save_file(
            {key: value.contiguous() for key, value in layout(unet).items()}, files / "unet.safetensors"
        )
        encoded = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        tensors = {"cond": encoded[0].detach()} | ({"pooled": encoded[2].detach()} if kind == "SDXL" else {})
        save_file({key: value.contiguous() for key, value in tensors.items()}, files / "cond.safetensors")
        pixels = unet.config.sample_size * pipeline.vae_scale_factor
        self.size, self.scale = unet.config.sample_size * 8, {"SD15": 0.18215, "SDXL": 0.13025}[kind]
        self.loaders = {
            "base": node("TestModel", file=str(files / "unet.safetensors"), kind=kind, head=head),
            "text": node("TestCondition", file=str(files / "cond.safetensors"), size=pixels),
            "empty": node("EmptyLatentImage", width=self.size, height=self.size, batch_size=1),
        }

    def loaded(self, *strengths):
        """Nodes that load the base and, one after the other, the adapter at these strengths."""
        nodes, before = dict(self.loaders), ["base", 0]
        for i, strength in enumerate(strengths):
            name = f"lorad{i}"
            nodes[name] = node("LoadLoRaD", model=before, adapter=self.adapter, strength=strength)
            before = [name, 0]
        return nodes, before

    def error(self, nodes, expected=None):
        """The largest error of the latents of the node `sample`, relative to the largest latent."""
        expected = self.expected if expected is None else expected
        nodes["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="test")
        history = self.server.run(nodes)
        assert history["status"]["status_str"] == "success", messages(history)
        file = history["outputs"]["save"]["latents"][0]["filename"]
        found = load_file(self.server.folder / "output" / file)["latent_tensor"] * self.scale
        return float((found - expected).abs().max() / expected.abs().max())


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def one_step(model, student=None, steps=0, alpha_T_squared=0.0):
    """Nodes that sample a model as a student does."""
    more = {"student": student} if student else {}
    step = node("LoRaDOneStepSampling", model=model, steps=steps, alpha_T_squared=alpha_T_squared, **more)
    inputs = {
        "model": ["step", 0],
        "sampler": ["step", 1],
        "sigmas": ["step", 2],
        "latent_image": ["empty", 0],
    }
    inputs |= {
        "positive": ["text", 0],
        "negative": ["text", 0],
        "add_noise": True,
        "noise_seed": SEED,
        "cfg": 1.0,
    }
    return {"step": step, "sample": node("SamplerCustom", **inputs)}


def k_sampler(model):
    inputs = {"model": model, "seed": SEED, "steps": 1, "cfg": 1.0, "sampler_name": "lcm", "denoise": 1.0}
    inputs |= {"scheduler": "simple", "positive": ["text", 0], "negative": ["text", 0]}
    return {"sample": node("KSampler", latent_image=["empty", 0], **inputs)}


def messages(history):
    """What ComfyUI shows of the errors of a run."""
    found = history["status"]["messages"]
    return " ".join(message["exception_message"] for kind, message in found if kind == "execution_error")


@pytest.fixture(scope="module")
def emoji(server):
    return Case(server, "emoji", teacher_folder(), student_folder(), "SD15", 32, PROMPT)


def sdxl_base(folder, prediction):
    """A tiny SDXL whose norms and sizes of conditions are those that ComfyUI builds in."""
    pipeline = tiny_sdxl()
    config = dict(pipeline.unet.config) | {"norm_num_groups": 32, "block_out_channels": (32, 64)}
    config |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 24 + 6 * 256}
    torch.manual_seed(0)
    parts = pipeline.components | {"unet": UNet2DConditionModel.from_config(config).eval()}
    parts["scheduler"] = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=prediction
    )
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    return parts["unet"], parts["scheduler"]


@pytest.mark.parametrize("strengths", [(1.0,), (0.4, 0.6), (1.5, -0.5)])
def test_the_emoji_student_is_its_pipeline(emoji, strengths):
    nodes, model = emoji.loaded(*strengths)
    assert emoji.error(nodes | one_step(model, ["lorad0", 1])) < 1e-5
    assert emoji.error(nodes | k_sampler(model)) < 1e-5


def test_the_teacher_is_another_model(emoji):
    nodes, model = emoji.loaded()
    assert emoji.error(nodes | one_step(model)) > 0.01


@pytest.mark.parametrize(("prediction", "alpha_T_squared"), [("epsilon", 0.02), ("v_prediction", None)])
def test_a_tiny_sdxl_is_its_pipeline(server, tmp_path, prediction, alpha_T_squared):
    unet, scheduler = sdxl_base(tmp_path / "base", prediction)
    record = Student.of(unet, scheduler, alpha_T_squared)
    save_adapter(turned_network(unet)[0], tmp_path / "adapter")
    record.write(tmp_path / "adapter")
    case = Case(server, prediction, tmp_path / "base", tmp_path / "adapter", "SDXL", 32, "a red cat")
    nodes, model = case.loaded(1.0)
    assert case.error(nodes | one_step(model, ["lorad0", 1])) < 1e-5
    if alpha_T_squared:
        assert case.error(nodes | one_step(model, alpha_T_squared=alpha_T_squared)) < 1e-5
    assert case.error(nodes | k_sampler(model)) > 0.01  # another alpha_T, or another prediction


def failure(server, nodes):
    nodes["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="test")
    return messages(server.run(nodes))


def test_what_does_not_fit_gets_a_sentence(emoji, server):
    nodes, model = emoji.loaded(1.0)
    assert "5 asked for" in failure(server, nodes | one_step(model, ["lorad0", 1], steps=5))
    other = server.folder / "models" / "lorad" / "other"
    shutil.copytree(student_folder(), other)
    record = json.loads((other / "student.json").read_text()) | {"prediction": "flow_prediction"}
    (other / "student.json").write_text(json.dumps(record))
    nodes["lorad0"]["inputs"]["adapter"] = "other/adapter_model.safetensors"
    message = failure(server, nodes | one_step(model, ["lorad0", 1]))
    assert "predicts flow_prediction, and this model predicts epsilon" in message


@pytest.mark.parametrize("family", NETWORKS)
def test_comfyui_patches_every_family_as_diffusers_merges_it(server, tmp_path, family):
    network = NETWORKS[family]().float()
    save_file(
        {key: value.contiguous() for key, value in layout(network).items()}, tmp_path / "base.safetensors"
    )
    save_adapter(turned_network(network)[0], server.folder / "models" / "lorad" / f"random-{family}")
    adapter, result = f"random-{family}/adapter_model.safetensors", tmp_path / "result.safetensors"
    nodes = {"base": node("TestWeights", file=str(tmp_path / "base.safetensors"))}
    for i, strength in enumerate((0.25, 0.75)):
        before = [f"lorad{i - 1}" if i else "base", 0]
        nodes[f"lorad{i}"] = node("LoadLoRaD", model=before, adapter=adapter, strength=strength)
    nodes["save"] = node("TestSaveWeights", model=["lorad1", 0], file=str(result))
    history = server.run(nodes)
    assert history["status"]["status_str"] == "success", messages(history)
    merged(network)
    found, expected = load_file(result), layout(network)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=5e-6, rtol=1e-5)


def example(name):
    return json.loads((ROOT / "integrations/comfyui/example_workflows/api" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["one_step", "four_steps"])
def test_example_workflows_are_of_nodes_that_are_there(server, name):
    known = server.ask("object_info")
    for entry in example(name).values():
        inputs = known[entry["class_type"]]["input"]
        required, optional = inputs["required"].keys(), inputs.get("optional", {}).keys()
        assert required <= entry["inputs"].keys() <= required | optional


def with_emoji(nodes, case, adapter):
    """An example workflow with another checkpoint, the prompt of a case, and the latents as its result."""
    nodes |= {"1": case.loaders["base"], "4": case.loaders["text"], "5": case.loaders["text"]}
    nodes |= {"6": case.loaders["empty"]}
    nodes["2"]["inputs"]["adapter"] = adapter
    nodes["7"]["inputs"]["noise_seed"] = SEED
    nodes["sample"] = nodes.pop("7")
    return {key: value for key, value in nodes.items() if key not in ("8", "9")}


def test_the_example_of_one_step_makes_the_image_of_the_student(emoji):
    assert emoji.error(with_emoji(example("one_step"), emoji, emoji.adapter)) < 1e-5


@pytest.mark.parametrize("count", [4, 2, 1])
def test_the_example_of_four_steps_is_the_lcm_pipeline_of_diffusers(emoji, server, count):
    assert "4 asked for" in failure(server, with_emoji(example("four_steps"), emoji, emoji.adapter))
    four = server.folder / "models" / "lorad" / "four"
    shutil.copytree(student_folder(), four, dirs_exist_ok=True)
    record = json.loads((four / "student.json").read_text()) | {"steps": [1.0, 0.75, 0.5, 0.25]}
    (four / "student.json").write_text(json.dumps(record))
    nodes = with_emoji(example("four_steps"), emoji, "four/adapter_model.safetensors")
    nodes["3"]["inputs"]["steps"] = count

    folder = server.folder / "files" / "emoji" / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    teacher = LCMScheduler.load_config(teacher_folder(), subfolder="scheduler")
    options = {"original_inference_steps": 4, "timestep_scaling": 1e6, "clip_sample": False}
    pipeline.scheduler = LCMScheduler.from_config(teacher, **options)
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": count, "guidance_scale": 1.0, "output_type": "latent"}
    assert emoji.error(nodes, pipeline(PROMPT, generator=generator, **options).images) < 1e-4
