"""A base that is stored small: which layers, from which values, and a student that fits the full base."""

import copy
import shutil
import sys

import pytest
import torch
from diffusers import TorchAoConfig, UNet2DConditionModel

from tests.tiny import PROMPTS, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from tests.tiny_flows import tiny_sana
from wadi.backbones import load_backbone, student_config
from wadi.backbones.storage import store_base
from wadi.distill import DistillConfig, Trainer, distill, make_accelerator
from wadi.distill.methods import merged_state, method_config
from wadi.distill.roles import build_roles, enable_gradient_checkpointing, trainable
from wadi.errors import WadiError, WadiWarning
from wadi.lorad.io import load_adapter, save_adapter
from wadi.lorad.small import small_layers
from wadi.onestep import Student
from wadi.onestep.export import export_pipeline
from wadi.prompts import encode_prompts

TEACHERS = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "pixart": tiny_pixart, "sana": tiny_sana}
STORED = {"int8": torch.int8, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines of each kind, in float32; read only."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, make in TEACHERS.items():
        make().save_pretrained(folder / name)
    return folder


def state_of(backbone):
    return {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}


def predict(backbone, network=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    condition = backbone.encode(PROMPTS[:2])
    return backbone.predict(network or backbone.network, x, torch.tensor([900.0, 500.0]), condition)


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("kind", TEACHERS)
def test_what_adapters_turn_is_stored_small_and_nothing_else(folders, kind, precision):
    full, small = load_backbone(folders / kind), load_backbone(folders / kind, precision=precision)
    layers = small_layers(small.network)
    assert list(layers) == full.student_layers() == small.student_layers()
    assert (small.dtype, small.network.dtype) == (torch.float32, torch.float32)
    assert not [p for p in small.network.parameters() if p.requires_grad]
    before, after = full.network.state_dict(), small.network.state_dict()
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(after[name], tensor), name
    for name, layer in layers.items():
        assert layer.weight.dtype == STORED[precision]
        norms = before[f"{name}.weight"].double().norm(dim=1)
        torch.testing.assert_close(layer.wide_weight(torch.float64).norm(dim=1), norms, rtol=1e-6, atol=0)
    expected = predict(full)
    assert 0 < (predict(small) - expected).norm() < 0.05 * expected.norm()


def test_weights_are_read_as_the_files_have_them_and_not_rounded_before(folders):
    exact = load_backbone(folders / "sd", precision="int8").network
    rounded = load_backbone(folders / "sd", torch.bfloat16, precision="int8")
    assert rounded.dtype == torch.bfloat16
    for name, layer in small_layers(rounded.network).items():
        own = exact.get_submodule(name)
        assert torch.equal(layer.weight, own.weight)
        assert torch.equal(layer.scale, own.scale)
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    assert predict(rounded).isfinite().all()


def test_names_of_the_files_that_differ_from_the_networks(folders, tmp_path):
    """Weights in bfloat16 and in two shards, as large models have them."""
    pipeline = tiny_sd3()
    pipeline.transformer.bfloat16().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    network = pipeline.transformer.float()
    exact = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for parameter in network.parameters():  # so that what is stored can only come from the files
        parameter.data.zero_()
    names = list(student_config(network, 2).target_modules)
    store_base(network, names, "int8", "cpu", tmp_path / "transformer")
    for name, layer in small_layers(network).items():
        norms = exact[f"{name}.weight"].double().norm(dim=1)
        torch.testing.assert_close(layer.wide_weight(torch.float64).norm(dim=1), norms, rtol=1e-6, atol=0)


def test_where_the_precision_is_the_compute_dtype_nothing_is_done(folders):
    plain = load_backbone(folders / "sd", torch.bfloat16)
    same = load_backbone(folders / "sd", torch.bfloat16, precision="bf16")
    assert not small_layers(same.network)
    assert all(torch.equal(tensor, state_of(plain)[name]) for name, tensor in state_of(same).items())


def test_three_views_hold_one_small_base(folders):
    base = load_backbone(folders / "sd", precision="int8").network
    config = student_config(base, 2)
    roles = build_roles(base, config, config, seed=0)
    networks = roles.teacher, roles.student, roles.fake
    small = [
        {layer.weight.data_ptr(): layer.weight.nbytes for layer in small_layers(network).values()}
        for network in networks
    ]
    assert small[0] == small[1] == small[2]
    assert sum(small[0].values()) == sum(
        layer.in_features * layer.out_features for layer in small_layers(base).values()
    )
    held = {p.data_ptr(): p.nbytes for network in networks for p in network.parameters()}
    own = sum(p.nbytes for p in base.parameters())
    adapters = sum(p.nbytes for network in networks[1:] for p in trainable(network).values())
    assert sum(held.values()) == own + adapters
    roles.fake.to(torch.bfloat16)  # a view that is cast stays one
    assert all(
        layer.scale is roles.teacher.get_submodule(name.removesuffix(".base_layer")).scale
        for name, layer in small_layers(roles.fake).items()
    )


def test_checkpointing_gives_the_same_bits(folders):
    backbone = load_backbone(folders / "sd", precision="int8")
    config = student_config(backbone.network, 2)
    gradients = []
    for checkpointed in (False, True):
        student = build_roles(backbone.network, config, config, seed=0).student
        if checkpointed:
            enable_gradient_checkpointing(student)
        loss = predict(backbone, student).square().mean()
        gradients.append(torch.autograd.grad(loss, list(trainable(student).values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_two_steps_on_int8_and_the_adapter_goes_onto_the_full_base(folders, tmp_path, kind):
    config = DistillConfig.of(
        train_batch_size=2, student_rank=2, fake_rank=2, student_learning_rate=1e-2, max_train_steps=2
    )
    accelerator = make_accelerator(config)
    backbone = load_backbone(folders / kind, precision="int8")
    before = state_of(backbone)
    prompts = encode_prompts(backbone.text, PROMPTS, PROMPTS[:1])
    trainer = Trainer(config, backbone, prompts, accelerator)
    for step in range(2):
        assert all(value.isfinite() for value in trainer.step(step).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(backbone).items())
    assert any(p.any() for name, p in trainer.student_parameters.items() if "lorad_A" in name)

    save_adapter(trainer.student, tmp_path / "adapter")
    full = load_backbone(folders / kind)
    turned = load_adapter(copy.deepcopy(full.network), tmp_path / "adapter")
    trained = predict(backbone, trainer.student)
    merged = predict(full, turned)
    # the two bases differ by less than training has moved the student
    assert (merged - trained).norm() < 0.05 * trained.norm()
    assert (merged - trained).norm() < 0.5 * (predict(full) - merged).norm()
    student = Student.of(backbone.network, backbone.pipeline.scheduler)
    student.check_fits(tmp_path, full.network, full.pipeline.scheduler, folders / kind)
    full.network.load_state_dict(merged_state(trainer.student, full.network.state_dict()))
    torch.testing.assert_close(predict(full), merged, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_small_base_is_exported_onto_the_teacher_of_the_files(folders, tmp_path):
    backbone = load_backbone(folders / "sd", precision="int8")
    network, scheduler = backbone.network, backbone.pipeline.scheduler
    student = build_roles(network, student_config(network, 2), student_config(network, 2), seed=0).student
    with torch.no_grad():
        for parameter in trainable(student).values():
            parameter.add_(0.01)
    save_adapter(student, tmp_path / "adapter")
    Student.of(network, scheduler).write(tmp_path / "adapter")
    export_pipeline(folders / "sd", tmp_path / "adapter", tmp_path / "pipeline")
    merged = load_backbone(tmp_path / "pipeline").network.state_dict()
    full = load_backbone(folders / "sd")
    changed = {
        name for name, tensor in full.network.state_dict().items() if not torch.equal(tensor, merged[name])
    }
    assert changed == {f"{name}.weight" for name in full.student_layers()}
    for name in changed:  # turned, and so of the full teacher's norms
        norms = [state[name].double().norm(dim=1) for state in (merged, full.network.state_dict())]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_lora_is_merged_into_the_full_base(folders, kind):
    full, small = (load_backbone(folders / kind, precision=precision) for precision in (None, "int8"))
    config = method_config("lora", student_config(small.network, 2))
    student = build_roles(small.network, config, config, seed=0).student
    with torch.no_grad():
        for parameter in trainable(student).values():
            parameter.add_(0.01)
    before = state_of(full)
    state = merged_state(student, before)
    assert state.keys() == before.keys()
    layer = full.student_layers()[0]
    own = student.get_submodule(layer)
    exact = before[f"{layer}.weight"] + own.get_delta_weight("default")
    torch.testing.assert_close(state[f"{layer}.weight"], exact)


def test_the_whole_of_a_small_base_is_not_trained(folders):
    base = load_backbone(folders / "sd", precision="int8").network
    with pytest.raises(WadiError, match=r"^--student-method, --fake-method: full .*--base-precision.*$"):
        build_roles(base, None, student_config(base, 2), seed=0)


def test_a_base_that_rounds_its_inputs_is_refused(folders):
    quantization = pytest.importorskip("torchao.quantization")
    base = load_backbone(folders / "sd").network
    quantization.quantize_(base, quantization.Int8DynamicActivationInt8WeightConfig())
    config = student_config(base, 2)
    with pytest.raises(WadiError, match=r"round their inputs too .*--base-precision int8"):
        build_roles(base, config, config, seed=0)


def test_nf4_says_what_it_needs(folders, monkeypatch):
    with pytest.raises(WadiError, match=r"^--base-precision nf4: needs a GPU; use int8 here$"):
        load_backbone(folders / "sd", precision="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python makes of a package that is not there
    network = tiny_pipeline().unet
    with pytest.raises(WadiError, match=r"^--base-precision nf4: .*pip install 'wadi\[nf4\]'"):
        store_base(network, [], "nf4", "cuda")


def test_a_base_that_is_quantized_already_is_refused(folders):
    network = load_backbone(folders / "sd", precision="int8").network
    names = list(student_config(network, 2).target_modules)
    message = r"^--base-precision int8: the network is quantized already \(int8 .*; omit the option.*$"
    with pytest.raises(WadiError, match=message):
        store_base(network, names, "int8", "cpu")


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    """A pipeline whose U-Net torchao has quantized; read only."""
    quantization = pytest.importorskip("torchao.quantization")
    folder = tmp_path_factory.mktemp("quantized") / "sd"
    tiny_pipeline().save_pretrained(folder)
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    options = {"quantization_config": how, "torch_dtype": torch.bfloat16}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


def quantized_run(quantized_folder, tmp_path, **changes):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return DistillConfig.of(
        pretrained_model_name_or_path=str(quantized_folder),
        prompts=str(tmp_path / "prompts.txt"),
        output_dir=str(tmp_path / "run"),
        student_rank=2,
        fake_rank=2,
        max_train_steps=1,
        train_batch_size=2,
        validation_steps=0,
        mixed_precision="bf16",
        **changes,
    )


def test_a_teacher_that_is_quantized_already_gives_an_adapter_for_the_full_one(
    quantized_folder, folders, tmp_path
):
    with pytest.warns(WadiWarning, match=r"is quantized, so the run ends with adapter/"):
        run = distill(quantized_run(quantized_folder, tmp_path))
    assert not (run / "pipeline").exists()
    export_pipeline(folders / "sd", run / "adapter", tmp_path / "pipeline")
    with pytest.raises(WadiError, match=r"adapter could not be merged: .*stored small \(torchao\)"):
        export_pipeline(quantized_folder, run / "adapter", tmp_path / "other")
    with pytest.raises(WadiError, match=r"^--base-precision int8: .*is quantized already \(torchao"):
        load_backbone(quantized_folder, torch.bfloat16, precision="int8")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_an_adapter_of_lorad_comes_out_of_a_quantized_teacher(quantized_folder, tmp_path, method):
    precision = "no" if method == "full" else "bf16"
    config = quantized_run(quantized_folder, tmp_path).replace(
        student_method=method, mixed_precision=precision
    )
    with pytest.raises(WadiError, match=rf"^--student-method {method}: .*is quantized"):
        distill(config)
