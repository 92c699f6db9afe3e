"""Which adapters go on which models: finite ones of the same base, and one student at most."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tiny import mark_student, tiny_pipeline, tiny_pixart
from wadi import LoRaDConfig, cli
from wadi.backbones import student_config
from wadi.distill import DistillConfig, distill
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import Student, StudentPipeline, export_pipeline
from wadi.onestep.adapters import merge_adapters
from wadi.onestep.pipeline import load_for_steps
from wadi.onestep.student import check_teacher

WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "lorad": lambda names: LoRaDConfig(r=2, target_modules=names, init_weights=False),
    "lora": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False),
    "dora": lambda names: LoraConfig(r=2, target_modules=names, use_dora=True, init_lora_weights=False),
}


def with_unet(**changes):
    """The tiny pipeline with a U-Net of another shape."""
    pipeline = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**pipeline.unet.config, **changes}
        del config["_use_default_values"]  # else diffusers takes its own default for what was one
        pipeline.unet = UNet2DConditionModel.from_config(config)
    return pipeline


BASES = {
    "its own": tiny_pipeline,
    "wider text": lambda: with_unet(cross_attention_dim=24),
    "projections as convolutions": lambda: with_unet(use_linear_projection=False),
    "wider": lambda: tiny_pipeline(channels=(24, 32)),
    "more layers": lambda: with_unet(layers_per_block=2),
    "transformer": tiny_pixart,
}


def write_adapter(folder, kind="lorad", student=True):
    """An adapter of the tiny pipeline, a student's or not."""
    unet = tiny_pipeline().unet
    names = sorted(student_config(unet).target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        get_peft_model(unet, KINDS[kind](names)).save_pretrained(folder)
    if student:
        mark_student(folder)
    return folder


def spoil(folder, value=float("nan")):
    tensors = load_file(folder / WEIGHTS)
    tensors[min(tensors)].view(-1)[:3] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Kind -> the adapter of a student; read only."""
    folder = tmp_path_factory.mktemp("students")
    return {kind: write_adapter(folder / kind / "adapter", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "student")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "subject", student=False)


@pytest.fixture(scope="module")
def exported(teacher_folder, adapter):
    export_pipeline(teacher_folder, adapter, adapter.parent / "pipeline")
    return adapter.parent / "pipeline"


# --- another base ---


@pytest.mark.parametrize(
    ("kind", "base"),
    [*(("lorad", base) for base in BASES), ("lora", "its own"), ("lora", "wider"), ("dora", "its own")],
)
def test_an_adapter_goes_on_its_own_base_alone(students, kind, base):
    folder, pipeline = students[kind], BASES[base]()
    if base == "its own":
        assert merge_adapters(pipeline, folder) == Student.read(folder)
        return
    with pytest.raises(WadiError, match=r"adapter: the adapter was made for another base model"):
        merge_adapters(pipeline, folder)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        *(("lorad", base) for base in ("wider text", "wider", "more layers", "transformer")),
        ("lora", "wider text"),
        ("dora", "more layers"),
    ],
)
def test_without_a_record_every_tensor_must_find_its_place(students, tmp_path, kind, base):
    folder = shutil.copytree(students[kind], tmp_path / "adapter")
    (folder / "student.json").unlink()
    with pytest.raises(WadiError, match="adapter: the adapter does not fit the model") as error:
        merge_adapters(BASES[base](), folder)
    assert "\n" not in str(error.value)


def test_a_student_of_another_prediction_is_refused(v_teacher_folder, adapter):
    with pytest.raises(WadiError, match=r"predicts epsilon, and .* predicts v_prediction"):
        StudentPipeline.from_pretrained(v_teacher_folder, adapter)


# --- numbers that are not finite ---


@pytest.mark.parametrize(
    ("kind", "value"), [("lorad", float("nan")), ("lora", float("inf")), ("dora", -float("inf"))]
)
def test_an_adapter_that_is_not_finite_is_named(students, tmp_path, teacher_folder, kind, value):
    spoil(shutil.copytree(students[kind], tmp_path / "bad"), value)
    with pytest.raises(WadiError, match=rf"bad/{WEIGHTS}: 1 of \d+ tensors .* \(3 of its numbers\)"):
        StudentPipeline.from_pretrained(teacher_folder, tmp_path / "bad")


def test_every_command_that_reads_an_adapter_refuses_it(tmp_path, teacher_folder, adapter, capsys):
    bad, base = shutil.copytree(adapter, tmp_path / "bad"), str(teacher_folder)
    spoil(bad)
    nested = shutil.copytree(adapter, tmp_path / "nested")
    shutil.copytree(bad, nested / "text_encoder")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    evaluate = ["--captions", tmp_path / "prompts.txt", "--num-samples", "1", "--spread-prompts", "1"]
    commands = (
        ["generate", "a cat", "--model", base, "--adapter", bad],
        ["generate", "a cat", "--model", base, "--adapter", nested],
        ["generate", "a cat", "--model", base, "--adapter", adapter, "--subject-adapter", bad],
        ["export", bad, "--model", base],
        ["average", bad, adapter],
        ["average", adapter, bad],
        ["directions", base, bad],
        ["directions", "swap", base, bad, "--take", "norms"],
        ["evaluate", "--model", base, "--adapter", bad, *evaluate],
        ["distill", "--teacher", base, "--student-adapter", bad, "--prompts", tmp_path / "prompts.txt"],
    )
    for command in commands:
        assert cli.main([*map(str, command), "--out", str(tmp_path / "out")]) == 2, command
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wadi: error")]
        assert len(error) == 1
        assert "not finite" in error[0]
        assert not (tmp_path / "out" / "pictures").exists()


# --- students, subjects and teachers ---


def test_a_student_is_not_turned_twice(teacher_folder, adapter, exported, tmp_path):
    other = DDIMScheduler.from_pretrained(teacher_folder / "scheduler")
    for kept in ("student.json", "scheduler"):  # either of them tells
        folder = shutil.copytree(exported, tmp_path / kept)
        if kept == "scheduler":
            (folder / "student.json").unlink()
        else:
            other.save_pretrained(folder / "scheduler")
            index = json.loads((folder / "model_index.json").read_text())
            index["scheduler"][1] = "DDIMScheduler"
            (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(WadiError, match="is a student already; omit one of"):
            StudentPipeline.from_pretrained(folder, adapter)
        with pytest.raises(WadiError, match="a one-step student takes 1 step, not 4"):
            load_for_steps(folder, None, 4)
    with pytest.raises(WadiError, match="is a student already; omit one of"):
        StudentPipeline.from_pretrained(teacher_folder, [adapter, adapter])


def test_a_subject_goes_on_students_of_both_forms(teacher_folder, adapter, subject, exported):
    stacked = StudentPipeline.from_pretrained(teacher_folder, [adapter, subject]).pipeline.unet
    later = StudentPipeline.from_pretrained(exported, subject).pipeline.unet
    before = StudentPipeline.from_pretrained(exported).pipeline.unet.state_dict()
    for name, tensor in stacked.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in later.state_dict().items())


def test_only_what_is_not_known_to_be_a_student_is_told(teacher_folder, adapter, subject, exported):
    for model, adapters in ((teacher_folder, adapter), (exported, None), (exported, subject)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", WadiWarning)
            StudentPipeline.from_pretrained(model, adapters)
    for adapters in (None, subject):
        with pytest.warns(WadiWarning, match="nothing says that this is a one-step model") as told:
            StudentPipeline.from_pretrained(teacher_folder, adapters)
        assert len([one for one in told if one.category is WadiWarning]) == 1


def test_a_student_is_no_teacher(exported, adapter, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    weights = exported / "unet" / "diffusion_pytorch_model.safetensors"
    images = tmp_path / "images"
    images.mkdir()
    tiny_pipeline()("a", num_inference_steps=1).images[0].save(images / "0.png")
    commands = {
        "distill": ["--teacher", exported, "--prompts", tmp_path / "prompts.txt", "--student-rank", 2],
        "extract": ["--teacher", exported, "--student", exported],
        "import": [weights, "--model", exported],
        "export": [adapter, "--model", exported],
        "dreambooth": [images, "--pretrained-model-name-or-path", exported],
        "invert": [images, "--model", exported],
    }
    before = sorted(exported.rglob("*"))
    for command, arguments in commands.items():
        assert cli.main([command, *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert "is a student already" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert sorted(exported.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda pipeline: None, None),
        (lambda pipeline: {"scheduler": LCMScheduler()}, "its scheduler is LCMScheduler"),
        (lambda pipeline: {"unet": with_unet(time_cond_proj_dim=8).unet}, "time_cond_proj_dim"),
    ],
)
def test_teachers_of_few_steps_are_told(change, sign):
    pipeline = tiny_pipeline()
    for name, part in (change(pipeline) or {}).items():
        setattr(pipeline, name, part)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_teacher("turbo", pipeline.scheduler, pipeline.unet)
    assert [sign in str(one.message) for one in told] == ([] if sign is None else [True])


# --- the record ---


@pytest.mark.parametrize("alpha_T_squared", [None, 0.0047])
def test_the_record_is_what_was_written(tmp_path, alpha_T_squared):
    for number, pipeline in enumerate((tiny_pipeline(), tiny_pipeline("v_prediction"), tiny_pixart())):
        mark_student(tmp_path, pipeline, alpha_T_squared)
        found = Student.read(tmp_path)
        assert found.alpha_T_squared == alpha_T_squared
        assert found.prediction == ("v_prediction" if number == 1 else "epsilon")
    assert Student.read(tmp_path / "none") is None


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "sample"},
        {"steps": [1.0, 0.6]},
        {"steps": [1.0, 0.75, 0.5]},
        {"alpha_T_squared": 2.0},
        {"alpha_T_squared": "0.1"},
        {"base": {"class": "UNet2DConditionModel"}},
        {"base": None},
    ],
)
def test_a_broken_record_is_one_line(adapter, tmp_path, teacher_folder, change):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    value = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(value | change))
    with pytest.raises(WadiError, match=r"student\.json: ") as error:
        StudentPipeline.from_pretrained(teacher_folder, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_record_that_is_no_object_is_one_line(adapter, tmp_path, teacher_folder, text):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "student.json").write_text(text)
    with pytest.raises(WadiError, match=r"student\.json: "):
        StudentPipeline.from_pretrained(teacher_folder, folder)


def test_what_a_run_writes_says_what_it_is(teacher_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    run = distill(
        DistillConfig.of(
            pretrained_model_name_or_path=str(teacher_folder),
            prompts=str(tmp_path / "prompts.txt"),
            output_dir=str(tmp_path / "run"),
            train_batch_size=1,
            student_rank=2,
            fake_rank=2,
            max_train_steps=1,
            validation_steps=0,
        )
    )
    expected = Student.of(tiny_pipeline().unet, tiny_pipeline().scheduler)
    assert Student.read(run / "adapter") == Student.read(run / "pipeline") == expected
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(teacher_folder)
