"""What `import wadi` does, and what it does not."""

import subprocess
import sys

import pytest


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import peft, wadi",
        "import wadi, importlib.util; importlib.util.find_spec('peft'); import peft",  # as transformers looks
    ],
)
def test_lorad_is_registered_whatever_is_imported_first(imports):
    registered = "print('LORAD' in {kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING})"
    assert python(f"{imports}; import peft; {registered}") == "True"


def test_import_alone_loads_nothing_heavy():
    heavy = "{'torch', 'peft', 'diffusers', 'transformers', 'numpy'}"
    assert python(f"import sys, wadi; print({heavy} & set(sys.modules))") == "set()"


def test_options_of_a_distillation_do_not_load_diffusers():
    code = "import sys; from wadi.distill import DistillConfig, PRESETS"
    assert python(f"{code}; print({{'diffusers', 'transformers', 'peft'}} & set(sys.modules))") == "set()"


def test_wadi_distill_has_the_names_that_it_lists():
    import wadi.distill

    assert all(getattr(wadi.distill, name) is not None for name in wadi.distill.__all__)
    with pytest.raises(AttributeError, match="Distiller"):
        _ = wadi.distill.Distiller


def test_unknown_names_are_attribute_errors():
    import wadi

    with pytest.raises(AttributeError, match="LoRaX"):
        _ = wadi.LoRaX
