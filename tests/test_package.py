"""What `import wadi` does, and what it does not."""

import subprocess
import sys

import pytest

import wadi
from wadi.errors import WadiError


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


REGISTERED = "'LORAD' in peft.PeftType.__members__"


@pytest.mark.parametrize(
    "imports",
    ["import wadi.lorad, peft", "import peft, wadi.lorad", "import peft; from wadi import LoRaDConfig"],
)
def test_lorad_is_registered_whatever_is_imported_first(imports):
    assert python(f"{imports}; print({REGISTERED})") == "True"


def test_import_alone_loads_nothing_heavy_and_hooks_nothing():
    heavy = "{'torch', 'peft', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys; hooks = list(sys.meta_path); import wadi; print({heavy} & set(sys.modules)"
    assert python(f"{code}, hooks == sys.meta_path)") == "set() True"


@pytest.mark.parametrize("first", ["wadi", "wadi.distill.run"])
def test_every_name_is_there_whatever_is_imported_first(first):
    """Importing a module replaces a name of its package, and one of the names is a package's too."""
    code = f"import {first}, wadi; from wadi import *; from wadi.onestep import export_pipeline; "
    code += "assert set(wadi.__all__) <= set(dir(wadi)); assert export is export_pipeline is wadi.export; "
    code += "print(all(getattr(wadi, name) is not None for name in wadi.__all__), callable(distill), "
    assert python(f"{code}distill is wadi.distill, bool(wadi.distill.PRESETS))") == "True True True True"


def test_calling_the_package_distils():
    with pytest.raises(WadiError, match="--prompts"):
        wadi.distill(wadi.DistillConfig(pretrained_model_name_or_path="nowhere"))


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
