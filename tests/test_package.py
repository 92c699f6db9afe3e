"""What `import wadi` does, and what it does not."""

import subprocess
import sys

import pytest

import wadi
from wadi.errors import WadiError


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_alone_loads_nothing_heavy_and_hooks_nothing():
    heavy = "{'torch', 'peft', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys; hooks = list(sys.meta_path); import wadi; print({heavy} & set(sys.modules)"
    assert python(f"{code}, hooks == sys.meta_path)") == "set() True"


def test_every_name_is_there_before_and_after_the_rooms_are_imported():
    """Importing a module sets a name of its package, and one of the names is a room's too."""
    code = (
        "import wadi; before = wadi.distill; assert callable(before); from wadi import *; "
        "import wadi.distill.run; from wadi.onestep import export_pipeline; "
        "assert export is export_pipeline is wadi.export; "
        "assert distill is before is wadi.distill; assert set(wadi.__all__) <= set(dir(wadi)); "
        "print(len([getattr(wadi, name) for name in wadi.__all__]), len(wadi.distill.PRESETS) > 5)"
    )
    assert python(code) == f"{len(wadi.__all__)} True"


def test_calling_the_package_distils():
    with pytest.raises(WadiError, match="--prompts"):
        wadi.distill(wadi.DistillConfig.of(pretrained_model_name_or_path="nowhere"))


def test_options_of_a_distillation_do_not_load_diffusers():
    code = "import sys; from wadi.distill import DistillConfig, PRESETS"
    assert python(f"{code}; print({{'diffusers', 'transformers', 'peft'}} & set(sys.modules))") == "set()"


def test_wadi_distill_has_the_names_that_it_lists():
    import wadi.distill

    assert all(getattr(wadi.distill, name) is not None for name in wadi.distill.__all__)
    with pytest.raises(AttributeError, match="Distiller"):
        _ = wadi.distill.Distiller


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="LoRaX"):
        _ = wadi.LoRaX
