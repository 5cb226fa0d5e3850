"""results.json: the origin of a study and, in one line per run, the data of its tables and plots."""

import json
from pathlib import Path

from udi_trainer.errors import UserError
from udi_trainer.run_folder import write_atomically


def load(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def save(path: Path, results: dict):
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "runs"]
    runs = ",\n".join(map(json.dumps, results["runs"]))
    write_atomically(path, ("{\n" + ",\n".join([*lines, f'"runs": [\n{runs}\n]']) + "\n}\n").encode())
