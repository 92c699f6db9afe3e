"""Run PEFT's own tests on LoRaD: `make peft-suite`, or `python peft_suite/run.py [pytest's arguments]`.

PEFT tests every method that it ships by the same tests, parametrised over the methods. They are part of its
source distribution, which is fetched from PyPI in exactly the installed version and unpacked into build/.
`lorad_plugin.py` puts LoRaD in the place of PEFT's methods. The models that the tests load from the hub are
tiny random stand-ins, made by `stand_ins.py`, so that nothing else comes from the network.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import peft

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "peft_suite"
FILES = [
    f"tests/test_{name}.py"
    for name in (
        "custom_models",
        "config",
        "stablediffusion",
        "decoder_models",
        "encoder_decoder_models",
        "feature_extraction_models",
        "seq_classifier",
    )
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def fetch_source() -> Path:
    """Return the source distribution of the installed PEFT; fetch it unless it is in build/ already."""
    archive = BUILD / f"peft-{peft.__version__}.tar.gz"
    if not archive.exists():
        requirement = f"peft=={peft.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        if subprocess.run([*pip, "--dest", str(BUILD), requirement]).returncode or not archive.exists():
            sys.exit(
                f"peft-suite: {requirement} with its tests could not be fetched from PyPI (see above); "
                f"connect to it, or put {archive.name} into {BUILD} by hand"
            )
    return archive


def unpack_tests(archive: Path) -> None:
    """Unpack the tests of PEFT into build/, and check that they are those of the installed code."""
    source = BUILD / archive.name.removesuffix(".tar.gz")
    for old in (source, BUILD / "tests"):
        shutil.rmtree(old, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(BUILD, filter="data")
    installed = Path(peft.__file__).parent
    names = [str(file.relative_to(source / "src/peft")) for file in source.glob("src/peft/**/*.py")]
    _, differing, missing = filecmp.cmpfiles(source / "src/peft", installed, names, shallow=False)
    if not names or differing or missing:
        sys.exit(
            f"peft-suite: the installed PEFT is not {archive.name}, for example in "
            f"{[*differing, *missing, 'src/peft'][0]}; install it again"
        )
    (source / "tests").rename(BUILD / "tests")
    shutil.rmtree(source)
    for name in ("__init__.py", "conftest.py"):  # not in the distribution, but its tests import each other
        (BUILD / "tests" / name).touch()


def main() -> int:
    """Prepare everything in build/ and run pytest there; returns pytest's exit status."""
    BUILD.mkdir(parents=True, exist_ok=True)
    unpack_tests(fetch_source())
    hub = BUILD / "hub"
    shutil.rmtree(hub, ignore_errors=True)
    environment = {
        **os.environ,
        **OFFLINE,
        "HF_HOME": str(hub),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "src", BUILD))),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    print("peft-suite: making stand-ins for the models of the hub", flush=True)
    subprocess.run([sys.executable, str(HERE / "stand_ins.py"), str(hub)], env=environment, check=True)
    print(f"peft-suite: pytest, the tests of PEFT {peft.__version__}", flush=True)
    options = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(BUILD), *sys.argv[1:]]
    if not any(argument.startswith("tests/") for argument in sys.argv[1:]):
        options += FILES
    return subprocess.run([sys.executable, "-m", "pytest", *options], env=environment, cwd=BUILD).returncode


if __name__ == "__main__":
    sys.exit(main())
