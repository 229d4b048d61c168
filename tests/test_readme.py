"""What the README says is so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_tables_are_those_of_the_schema() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_settings(TEXT) == TEXT, "run scripts/update_readme.py"
    assert "`split_groups_mean`" in module.settings_text()


def test_every_command_and_file_the_readme_names_exists() -> None:
    helped = subprocess.run([sys.executable, "-m", "sdtrain.cli", "--help"], capture_output=True, text=True, check=True)
    for command in set(re.findall(r"^sdtrain ([\w-]+)", TEXT, flags=re.M)):
        assert re.search(rf"^\s+{command}\b", helped.stdout, flags=re.M), command
    for path in set(re.findall(r"(?:scripts|configs|tests|sdtrain|optim)/[\w./-]+\w", TEXT)):
        assert (ROOT / path).exists(), path


def test_the_preset_table_is_what_the_presets_say() -> None:
    from sdtrain.config.presets import preset_values
    from sdtrain.config.schema import OptimizerConfig

    rows = re.findall(r"^\| `([\w-]+)`[^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", TEXT, flags=re.M)
    described = {
        row[0]: row[1:] for row in rows if row[0] in get_args(OptimizerConfig.model_fields["preset"].annotation)
    }
    assert len(described) == 6
    for preset, (steps, d0, mean, coef) in described.items():
        values = OptimizerConfig(**preset_values(preset))  # type: ignore[arg-type]
        freezes = {"at rest, from a quarter on": ("auto", 0.25), "at rest": ("auto", 0.0), "never": (0, 0.0)}
        assert freezes[steps.strip()] == (values.prodigy_steps, values.freeze_share), preset
        assert float(d0) == values.d0, preset
        assert {"by steps": "auto", "1": 1.0}[coef] == values.d_coef, preset
        assert mean.strip().replace(" ", "_") == values.split_groups_mean, preset
