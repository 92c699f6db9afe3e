"""The student: scheduler, pipeline, and export to a folder that any diffusers user can load."""

from wadi.onestep.average import average_students
from wadi.onestep.embedding import load_embedding
from wadi.onestep.export import export_output, export_pipeline
from wadi.onestep.fast import FastPath
from wadi.onestep.grids import check_image_path, image_grid, labelled_grid, save_image
from wadi.onestep.importing import import_weights
from wadi.onestep.loading import load_pipeline
from wadi.onestep.pipeline import StudentPipeline, refuse_guidance
from wadi.onestep.scheduler import student_scheduler
from wadi.onestep.student import Student

__all__ = [
    "FastPath",
    "Student",
    "StudentPipeline",
    "average_students",
    "check_image_path",
    "export_output",
    "export_pipeline",
    "image_grid",
    "import_weights",
    "labelled_grid",
    "load_embedding",
    "load_pipeline",
    "refuse_guidance",
    "save_image",
    "student_scheduler",
]
