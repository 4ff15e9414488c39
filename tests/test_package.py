"""The wheel holds everything that an editable install finds."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_runs_on_its_own(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from exporter.models import base, recipe\n"
        "from exporter.runtime import resources\n"
        "assert resources.resource('MODEL_CARD_TEMPLATE.md').is_file()\n"
        "assert str(resources.resource('recipes')).startswith(sys.argv[1])\n"
        "print(base.resolve('demo').model_type, *recipe.recipe_names())"
    )
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib")]
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["llava", *sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))]


def test_shipped_modeling_code_imports_torch_and_transformers_only():
    for file in (ROOT / "exporter" / "modeling").glob("modeling_*.py"):
        imports = [line.split()[1] for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        allowed = set(sys.stdlib_module_names) | {"torch", "transformers", ""}
        assert {name.split(".")[0] for name in imports} <= allowed, file
