"""The record of a student, of betas or of a flow, and how a student is told from a teacher."""

import json
import shutil
import warnings

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from tests.tiny import mark_student, tiny_pipeline, tiny_sd3
from wadi.diffusion import Schedule
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import Student, StudentPipeline, load_pipeline
from wadi.onestep.loading import load_denoiser
from wadi.onestep.scheduler import check_places, fractions, steps_of, student_scheduler
from wadi.onestep.student import check_teacher, is_student, network_of, student_of

KINDS = {
    "epsilon": tiny_pipeline,
    "v_prediction": lambda: tiny_pipeline("v_prediction"),
    "flow_prediction": tiny_sd3,
}
every = pytest.mark.parametrize("prediction", KINDS)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A student's pipeline as `wadi export` writes it, and what it predicts."""
    folder = tmp_path_factory.mktemp("student") / "pipeline"
    StudentPipeline(KINDS[request.param]()).save_pretrained(folder)
    return folder, request.param


def change(folder, **fields):
    file = folder / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@every
def test_a_teacher_is_none(prediction):
    pipeline = KINDS[prediction]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        check_teacher("mine", pipeline.scheduler, network_of(pipeline))
    assert student_of(pipeline) is None


def test_a_written_pipeline_is_a_student(exported):
    folder, prediction = exported
    pipeline = load_pipeline(folder)
    found = student_of(pipeline)
    assert found == Student.read(folder)
    assert (found.prediction, found.steps, found.alpha_T_squared) == (prediction, (1.0,), None)
    found.check_fits(folder, network_of(pipeline), pipeline.scheduler, folder)


@pytest.mark.parametrize("named", ["its folder", "a run", "something else"])
def test_a_student_is_refused_as_a_teacher_however_it_is_named(exported, named, tmp_path):
    """The name may be that of a run, or of a model on the hub, whose files lie elsewhere."""
    run = tmp_path / "run"
    shutil.copytree(exported[0], run / "pipeline")
    name = {"its folder": run / "pipeline", "a run": run, "something else": "owner/name"}[named]
    pipeline = load_pipeline(run / "pipeline")
    network, scheduler = load_denoiser(run / "pipeline")
    for parts in ((pipeline.scheduler, network_of(pipeline)), (scheduler, network)):
        with pytest.raises(WadiError, match=f"{name}: is a student already"):
            check_teacher(name, *parts)


def test_a_record_for_another_prediction_than_the_schedulers_is_told(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "pipeline")
    other = next(name for name in KINDS if name != exported[1])
    change(folder, prediction=other)
    with pytest.raises(WadiError, match=f"says that the student predicts {other}, and its scheduler is for"):
        StudentPipeline.from_pretrained(folder)


@pytest.mark.parametrize("steps", [[1.0], [1.0, 0.5]])
def test_a_record_of_other_steps_than_the_schedulers_is_told(steps, tmp_path):
    StudentPipeline(tiny_pipeline(), steps=fractions(4)).save_pretrained(tmp_path / "pipeline")
    change(tmp_path / "pipeline", steps=steps)
    with pytest.raises(WadiError, match=rf"takes {len(steps)} steps at most, and its scheduler is for 4"):
        student_of(load_pipeline(tmp_path / "pipeline"))


def test_the_steps_of_a_flow_are_where_its_scheduler_takes_them():
    """Only the last of them makes the scheduler; another one that was changed would be ignored."""
    pipeline = tiny_sd3()
    steps = steps_of(pipeline.scheduler, Schedule.from_config(pipeline.scheduler), 4, even=False)
    assert StudentPipeline(pipeline, steps=steps).steps == steps
    with pytest.raises(WadiError, match=r"student\.json: its steps are 1, 0\.9, .* takes them at"):
        StudentPipeline(pipeline, steps=(1.0, 0.9, 0.8, steps[-1]))
    tiny = (1.0, 1e-9)
    scheduler = student_scheduler(pipeline.scheduler, None, tiny, even=True)
    with pytest.raises(WadiError, match=r"student\.json: its steps are 1, 1e-09, .* takes them at"):
        check_places(scheduler, tiny, even=True)


@pytest.mark.parametrize("prediction", ["sample", "flow", None, 1])
def test_an_unknown_prediction_is_told(exported, prediction, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "pipeline")
    change(folder, prediction=prediction)
    with pytest.raises(
        WadiError, match=r"student\.json: prediction is .* one of epsilon, v_prediction, flow_"
    ):
        StudentPipeline.from_pretrained(folder)


def test_a_flow_has_no_alpha(tmp_path):
    mark_student(tmp_path, tiny_sd3())
    change(tmp_path, alpha_T_squared=0.0047)
    with pytest.raises(WadiError, match=r"student\.json: alpha_T_squared must be null for a student that"):
        Student.read(tmp_path)
    with pytest.raises(WadiError, match=r"--alpha-T-squared 0\.0047: the model is a rectified flow"):
        StudentPipeline(tiny_sd3(), 0.0047)


@every
def test_a_student_of_another_prediction_is_refused(prediction, tmp_path):
    """A record goes with models that predict the same, in either direction."""
    pipeline = KINDS[prediction]()
    mark_student(tmp_path, pipeline)
    student, network = Student.read(tmp_path), network_of(pipeline)
    others = (
        DDIMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    )
    for name, scheduler in zip(KINDS, others, strict=True):
        if name == prediction:
            student.check_fits(tmp_path, network, scheduler, "mine")
        else:
            with pytest.raises(WadiError, match=f"predicts {prediction}, and mine predicts {name}"):
                student.check_fits(tmp_path, network, scheduler, "mine")


def test_the_scheduler_of_a_flow_tells_nothing():
    """FLUX.1-schnell, which takes four steps, comes with the same one."""
    pipeline = tiny_sd3()
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        assert not is_student(scheduler)
        check_teacher("schnell", scheduler, network_of(pipeline))
    with pytest.warns(WadiWarning, match="distilled to a few steps already .its scheduler is FlowMatchLCM"):
        check_teacher("turbo", FlowMatchLCMScheduler(), network_of(pipeline))
