"""Modules that only POSIX systems have are not needed to import the package, to classify, to save and to load."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
POSIX = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc")

CODE = """
import json, sys
from pathlib import Path

folder, *absent = sys.argv[1:]
import filelock, torch  # other packages choose by the platform what they import

for name in absent:
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
sys.path.insert(0, "tests")
from core_checks import import_everything

facts = {"modules": import_everything()}

import cg3d
from cg3d.core.atomic import exclusive_lock
from cg3d.core.errors import PathTaken
from cg3d.core.timing import peak_memory
from cg3d.data.furniture import furniture

model, shapes = cg3d.load("nano", device="cpu"), furniture()
facts["label"] = model.classify(shapes[1], ["sofa", "lamp"], top=1)["label"][0]
with exclusive_lock(folder):
    try:
        exclusive_lock(folder)
    except PathTaken as error:
        facts["lock"] = "held"
    model.save(folder)
again = cg3d.load(folder, device="cpu")
facts["same"] = again.fingerprint() == model.fingerprint()
facts["peak"] = peak_memory() > 100
print(json.dumps(facts))
"""


def test_nothing_that_windows_lacks_is_imported(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CG3D_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CODE, str(tmp_path / "model"), *POSIX]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts.pop("modules") > 110
    assert facts == {"label": "sofa", "lock": "held", "same": True, "peak": True}
