"""What the package offers, and that asking for it is cheap."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refusal_direction


def test_every_public_name_exists():
    for name in refusal_direction.__all__:
        assert getattr(refusal_direction, name).__name__ == name


def test_every_modules_public_names_exist():
    for module in pkgutil.walk_packages(refusal_direction.__path__, "refusal_direction."):
        if not module.name.endswith("__main__"):
            loaded = importlib.import_module(module.name)
            named = set(getattr(loaded, "__all__", ()))
            assert not {name for name in named if not hasattr(loaded, name)}, module.name
            own = {
                name
                for name, value in vars(loaded).items()
                if callable(value) and getattr(value, "__module__", None) == module.name and not name.startswith("_")
            }
            assert own <= named, module.name


def test_the_readme_says_what_every_module_is():
    root = Path(refusal_direction.__file__).parent
    readme = (root.parent / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## What is where")[2]
    modules = {path.name for path in root.glob("*.py") if not path.name.startswith("_")}
    folders = {f"{path.parent.name}/" for path in root.glob("*/__init__.py")}
    assert len(modules | folders) > 15
    assert {name for name in modules | folders if name not in tree} == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'extrac'"):
        _ = refusal_direction.extrac


def test_importing_the_package_does_not_import_torch():
    script = (
        "import sys, refusal_direction, refusal_direction.cli, refusal_direction.demo; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_error_is_drawn_in_the_tree_of_the_errors_module():
    from refusal_direction import errors

    drawn = set(re.findall(r"\w+Error\b", errors.__doc__ or "")) - {"ValueError", "TypeError", "IndexError"}
    assert drawn == set(errors.__all__)
    assert drawn == {name for name, value in vars(errors).items() if isinstance(value, type)}
    for name in drawn:
        assert issubclass(getattr(errors, name), errors.RefusalDirectionError)
